"""Averages sharded checkpoints with all processes: each its share of the parts, rank zero writes the whole.

A part is what one rank wrote when the checkpoint was saved; with as many processes as then, each reads its own. Memory
is a process's share of the model; rank zero holds one whole tensor more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, distributed

from lightning_plugins.checkpoints.averaged_file import write_average
from lightning_plugins.checkpoints.formats.sharded import ShardedDirectory
from lightning_plugins.checkpoints.streaming_mean import CheckpointMean
from lightning_plugins.core.checkpoint_file import CheckpointError


def write_together(
    make: Callable[[], CheckpointMean], output: Path, device: torch.device, *, overwrite: bool = False
) -> None:
    """Average with all processes of the default group and write ``output`` on rank zero.

    Every rank must call it, with the same sources. Whatever goes wrong on one rank is raised on all of them.

    Args:
        make: Opens the checkpoints and returns their mean.
        output: The file.
        device: A device that the group's backend can send from.
        overwrite: Whether ``output`` may be replaced.

    Raises:
        CheckpointError: If a rank could not read or average its parts, or rank zero could not write.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    parts: dict[str, list[tuple[int, int]]] = {}
    mine: dict[tuple[str, int], Tensor] = {}
    problem: Exception | None = None
    try:
        mean = make()
        parts = {name: _parts(mean, name) for name in mean.specs}
        for name, ranges in parts.items():
            for number, (start, stop) in enumerate(ranges):
                if number % world == rank:
                    mine[name, number] = mean.part(name, start, stop)
    except (OSError, ValueError) as error:
        problem = error
    _raise_together(problem)
    whole = _gathered(mean, parts, mine, device)
    if rank == 0:
        try:
            write_average(mean, output, overwrite=overwrite, tensors=whole)
        except (OSError, ValueError) as error:
            problem = error
    for _ in whole:  # ranks other than zero send here; rank zero takes in what is left when it could not write
        pass
    _raise_together(problem)


def _parts(mean: CheckpointMean, name: str) -> list[tuple[int, int]]:
    newest = mean.newest
    return newest.parts(name) if isinstance(newest, ShardedDirectory) else [(0, mean.specs[name].numel)]


def _gathered(
    mean: CheckpointMean,
    parts: dict[str, list[tuple[int, int]]],
    mine: dict[tuple[str, int], Tensor],
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the whole tensors on rank zero, in order; on the others only send."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    scratch = mean.scratch() if rank == 0 else torch.empty(0, dtype=torch.uint8)
    for name, ranges in parts.items():
        spec = mean.specs[name]
        whole = mean.cut(name, scratch)
        for number, (start, stop) in enumerate(ranges):
            owner = number % world
            if owner == rank == 0:
                whole[start:stop] = mine.pop((name, number))
            elif owner == rank:
                distributed.send(_sendable(mine.pop((name, number))).to(device), 0)
            elif rank == 0:
                buffer = torch.empty((stop - start) * spec.dtype.itemsize, dtype=torch.uint8, device=device)
                distributed.recv(buffer, owner)
                whole[start:stop] = buffer.cpu().view(spec.dtype)
        if rank == 0:
            yield name, mean.replaced(name, whole.view(spec.shape))


def _sendable(part: Tensor) -> Tensor:
    """Return the bytes: backends do not know every dtype."""
    return part.contiguous().view(torch.uint8)


def _raise_together(problem: Exception | None) -> None:
    """Raise on every rank if any has a problem: on a rank that has one its own, else the first of the others."""
    texts: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(texts, None if problem is None else str(problem))
    if problem is not None:
        raise problem
    first = next((text for text in texts if text is not None), None)
    if first is not None:
        raise CheckpointError(first)


def on_rank_zero(work: Callable[[], None], broadcast: Callable[[str | None], str | None], *, is_zero: bool) -> None:
    """Do ``work`` on rank zero; what it raises is raised on every rank, so that none waits for it.

    Args:
        work: What to do.
        broadcast: Returns rank zero's argument on every rank.
        is_zero: Whether this is rank zero.

    Raises:
        CheckpointError: On the other ranks, if rank zero failed.
    """
    problem: Exception | None = None
    if is_zero:
        try:
            work()
        except Exception as error:  # noqa: BLE001  # raised again below, once the others know
            problem = error
    text = broadcast(None if problem is None else f"{type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
    if text is not None:
        raise CheckpointError(f"Rank zero failed: {text}")
