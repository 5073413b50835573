"""The mean of the latest snapshots of a module's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.core.sharding import collected, local, scatter
from lightning_plugins.ema.shadow import Shadow
from lightning_plugins.ema.tensor_groups import copy, plain_tensors


class LatestShadow(Shadow):
    """The mean of a module's weights as they were at the last updates, and the snapshots that it is made of.

    Snapshots have the type of the weights, so they are exact. Every update replaces the oldest and computes the mean
    anew, in float64 and rounded once: nothing adds up, however many there were. A parameter that was replaced or joined
    has the mean of its own snapshots since.

    Args:
        module: The module.
        last: How many snapshots are kept, at least 1; until there are as many, the mean is of those there are.
        snapshots: Name -> full tensor for each snapshot to begin with, the oldest first.
        **options: Those of :class:`Shadow`.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> latest = LatestShadow(layer, last=2)
        >>> for value in (1.0, 2.0, 4.0):
        ...     _ = nn.init.constant_(layer.weight, value)
        ...     latest.update()
        >>> latest.collect("average")["weight"].item()
        3.0
    """

    def __init__(
        self, module: nn.Module, *, last: int, snapshots: Sequence[Mapping[str, Tensor]] = (), **options: Any
    ) -> None:
        self._last = last
        # of each tensor, the oldest first
        self._histories: list[list[Tensor]] = []
        super().__init__(module, **options)
        with plain_tensors():
            for snapshot in snapshots[-last:]:
                for found, history in zip(self._tensors, self._histories, strict=True):
                    value = next((snapshot[name] for name in found.names if name in snapshot), None)
                    if value is not None:
                        weight = local(found.tensor)
                        self._add(history, scatter(value.to(weight.device), found.tensor), weight.device)
            self._average()

    # -- following the module

    def follow(self, start: Mapping[str, Tensor] | None = None) -> list[str]:
        """Look at the module again; the snapshots of what is new or replaced are dropped."""
        before = self._histories
        joined = super().follow(start)
        self._histories = [[] if origin is None else before[origin] for origin in self._followed.origins]
        with plain_tensors():
            for number in self._followed.pruned:
                zeros = local(self._tensors[number].tensor) == 0
                for snapshot in self._histories[number]:
                    snapshot.masked_fill_(zeros.to(snapshot.device), 0)
        return joined

    def rebind(self) -> None:
        """Find the module's tensors where they are now; the snapshots go with them."""
        super().rebind()
        if len(self._histories) == len(self._shadows):
            for history, shadow in zip(self._histories, self._shadows, strict=True):
                history[:] = [snapshot.to(shadow.device) for snapshot in history]

    def _begin_lost_anew(self) -> list[int]:
        lost = super()._begin_lost_anew()
        with plain_tensors():
            for number in lost:
                group, position = self._where[number]
                # as many as there were: all ranks must have equally many
                for snapshot in self._histories[number]:
                    snapshot.copy_(group.weights[position])
        return lost

    # -- the average

    def update(self, decay: float = 0.0) -> None:
        """Take a snapshot of the weights in place of the oldest, and compute the mean.

        Args:
            decay: Of no effect: the snapshot is the weights as they are.

        Raises:
            RuntimeError: If the module holds the average: there are no trained weights to keep.
        """
        if self.swapped:
            raise RuntimeError("A snapshot cannot be taken while the module holds the average: swap it out first.")
        self._check()
        with plain_tensors():
            self._refresh()
            for number, history in enumerate(self._histories):
                group, position = self._where[number]
                self._add(history, group.weights[position], self._shadows[number].device)
            self._average()

    def collect_snapshots(self, *, keep: bool = True, shares: bool = False) -> list[dict[str, Tensor]]:
        """Return the snapshots, name -> full tensor, the oldest first; a collective when the module is sharded.

        They are references: the next snapshot is written over the oldest.

        Args:
            keep: Whether this rank wants them; if not, it only takes part in the collective.
            shares: Whether sharded tensors stay so, as in a distributed checkpoint; then there is no collective.
        """
        self._wait()
        self._check()
        sets: list[dict[str, Tensor]] = []
        for age in range(max(map(len, self._histories), default=0), 0, -1):
            snapshot: dict[str, Tensor] = {}
            for found, history in zip(self._tensors, self._histories, strict=True):
                if len(history) < age:
                    continue
                if (whole := collected(history[-age], found.tensor, keep=keep, shares=shares)) is not None:
                    snapshot.update(dict.fromkeys(found.names, whole))
            sets.append(snapshot)
        return sets if keep else []

    def _add(self, history: list[Tensor], weight: Tensor, device: torch.device) -> None:
        """Put a copy of ``weight`` behind a history, in place of the oldest one if that is complete."""
        oldest = history.pop(0) if len(history) == self._last else None
        if oldest is None or (oldest.dtype, oldest.shape) != (weight.dtype, weight.shape):
            pinned = device.type == "cpu" and weight.is_cuda
            oldest = torch.empty_like(weight, device=device, pin_memory=pinned, requires_grad=False)
        history.append(oldest.copy_(weight, non_blocking=True))

    def _average(self) -> None:
        devices = [self._where[number][0].weights[self._where[number][1]].device for number in range(len(self))]
        for device in dict.fromkeys(devices):
            numbers = [n for n, found in enumerate(devices) if found == device and self._histories[n]]
            means_into([self._shadows[n] for n in numbers], [self._histories[n] for n in numbers], device)


def means_into(targets: Sequence[Tensor], histories: Sequence[Sequence[Tensor]], device: torch.device) -> None:
    """Write the mean of each history into its target, added in float64 and rounded once.

    Nothing waits for ``device``, where the sums are made piece by piece, wherever the tensors lie. Apple's GPUs, which
    have no float64, add in float32.
    """
    # a mebibyte of sums stays in a processor's cache; a GPU needs more to hide the launch of a kernel
    limit = 2**17 if device.type == "cpu" else 2**22
    wide = torch.float32 if device.type == "mps" else torch.float64
    batch: list[tuple[Tensor, ...]] = []
    size = 0
    for target, history in zip(targets, histories, strict=True):
        for row in _pieces((target, *history), limit):
            size += row[0].numel()
            if batch and (size > limit or len(row) != len(batch[0])):
                _mean_of_rows(batch, device, wide)
                batch, size = [], row[0].numel()
            batch.append(row)
    if batch:
        _mean_of_rows(batch, device, wide)


def _pieces(tensors: tuple[Tensor, ...], limit: int) -> Iterable[tuple[Tensor, ...]]:
    if tensors[0].numel() <= limit or not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return zip(*(torch.split(tensor.view(-1), limit) for tensor in tensors), strict=True)


def _mean_of_rows(rows: list[tuple[Tensor, ...]], device: torch.device, wide: torch.dtype) -> None:
    """Write into the first of each row the mean of the others."""
    targets, first, *others = map(list, zip(*rows, strict=True))
    totals = [
        part.to(device, torch.promote_types(target.dtype, wide), copy=True, non_blocking=True)
        for target, part in zip(targets, first, strict=True)
    ]
    for parts in others:
        torch._foreach_add_(totals, [part.to(device, non_blocking=True) for part in parts])
    torch._foreach_div_(totals, len(others) + 1)
    copy(targets, totals)
