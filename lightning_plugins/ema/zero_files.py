"""The files of an average beside DeepSpeed's own: each rank writes and reads its parts, and any reader the whole.

``DIR/lightning_plugins_ema/NAME.00000-of-00002.pt``, one for each rank, written first: DeepSpeed's files come after, so
a run that is killed leaves both or a directory whose steps do not agree, which is refused. A file holds plain values:

    version  1
    step     DeepSpeed's count of optimizer steps
    rank, ranks
    keys     of the module's state dict, in order
    parts    of the average, a dictionary each: names, shape, start (in the flattened tensor), values
    others   of what is not averaged, likewise; whole where they are not cut
    snapshots  what a mean of snapshots is made of: values in the order of parts for each, the oldest first
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch
from torch import Tensor

from lightning_plugins.core import checkpoint_keys, torch_file
from lightning_plugins.core.files import replacing
from lightning_plugins.core.stand_ins import UnreadableError
from lightning_plugins.core.validation import shown
from lightning_plugins.core.zero import Fragment
from lightning_plugins.core.zero_directory import full_weights, step_of

FOLDER = checkpoint_keys.EMA
VERSION = 1
_NAME = re.compile(r"(?P<name>.+)\.(?P<rank>\d{5,})-of-(?P<ranks>\d{5,})\.pt")
_MOST_RANKS = 100_000


def _file(directory: Path, name: str, rank: int, ranks: int) -> Path:
    return directory / FOLDER / f"{quote(name, safe='')}.{rank:05}-of-{ranks:05}.pt"


def files_of(directory: Path) -> dict[str, list[Path]]:
    """Return name of an average -> the files of its ranks that are there, in order."""
    found: dict[str, list[Path]] = {}
    for path in sorted((directory / FOLDER).glob("*.pt")):
        match = _NAME.fullmatch(path.name)
        if match:
            found.setdefault(unquote(match["name"]), []).append(path)
    return found


def write_part(
    directory: Path,
    name: str,
    *,
    step: int,
    rank: int,
    ranks: int,
    keys: list[str],
    parts: list[Fragment],
    others: list[Fragment],
    snapshots: list[list[Tensor]] | None = None,
) -> None:
    """Write this rank's file; those of a save by another number of ranks are taken away by rank zero.

    Raises:
        OSError: If it cannot be written.
    """
    path = _file(directory, name, rank, ranks)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "version": VERSION,
        "step": step,
        "rank": rank,
        "ranks": ranks,
        "keys": keys,
        "parts": [_plain(part) for part in parts],
        "others": [_plain(part) for part in others],
    }
    if snapshots:
        content["snapshots"] = [[values.detach().to("cpu", copy=True) for values in one] for one in snapshots]
    with replacing(path, overwrite=True) as file:
        torch.save(content, file)
    if rank == 0:
        for other in files_of(directory).get(name, ()):
            if not other.name.endswith(f"-of-{ranks:05}.pt"):
                other.unlink(missing_ok=True)


def _plain(part: Fragment) -> dict[str, Any]:
    # a view would take the whole partition with it
    values = part.values.detach().to("cpu", copy=True)
    return {"names": list(part.found.names), "shape": list(part.shape), "start": part.start, "values": values}


def read_part(
    directory: Path, name: str, *, step: int, rank: int, ranks: int, parts: list[Fragment]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]] | None:
    """Return this rank's parts of an average by name, and of its snapshots; ``None`` if the directory has none of it.

    Args:
        directory: DeepSpeed's.
        name: The average's.
        step: DeepSpeed's count of steps, as it was restored.
        rank: This one.
        ranks: How many there are.
        parts: Of the masters, which the average must fit.

    Raises:
        ValueError: If the average is incomplete, of another step, or does not fit.
    """
    if name not in files_of(directory):
        return None
    path = _file(directory, name, rank, ranks)
    if not path.is_file():
        raise ValueError(
            f"The average {name!r} in {directory} must be of {ranks} ranks, as this run, but {path.name} is missing: "
            "it was written by another number, or the run that wrote it was killed."
        )
    content = _read(path)
    if content["step"] != step:
        raise ValueError(
            f"The average {name!r} in {directory} must be of step {step}, as the weights there, got step "
            f"{content['step']}: the run that wrote it was killed. Resume from another checkpoint."
        )
    there = [(part["names"], part["start"], part["values"].numel()) for part in content["parts"]]
    here = [(list(part.found.names), part.start, part.values.numel()) for part in parts]
    if there != here:
        raise ValueError(
            f"The average {name!r} in {directory} must be cut as the weights of this run are. Resume with the module, "
            "the optimizer and the stage that wrote it."
        )
    names = [part["names"][0] for part in content["parts"]]
    snapshots = [dict(zip(names, values, strict=True)) for values in content.get("snapshots", [])]
    return {part["names"][0]: part["values"] for part in content["parts"]}, snapshots


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch_file.load(path, trust=False)
    except (torch_file.NeedsTrustError, UnreadableError) as error:
        raise ValueError(f"{path} cannot be read as a part of an average: {error}") from error
    if not isinstance(content, dict) or content.get("version") != VERSION or isinstance(content["version"], bool):
        version = content.get("version") if isinstance(content, dict) else None
        raise ValueError(f"{path} must be a part of an average of version {VERSION}, got {shown(version)}.")
    kinds = {"step": int, "rank": int, "ranks": int, "keys": list, "parts": list, "others": list}
    good = all(type(content.get(key)) is kind for key, kind in kinds.items())
    good = good and all(map(_is_part, (*content["parts"], *content["others"])))
    if not good or not _are_snapshots(content.get("snapshots", []), content["parts"]):
        raise ValueError(f"{path} cannot be read as a part of an average: it is damaged.")
    return content


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict) or part.keys() != {"names", "shape", "start", "values"}:
        return False
    names, shape, start, values = part["names"], part["shape"], part["start"], part["values"]
    return (
        isinstance(names, list)
        and bool(names)
        and all(isinstance(name, str) for name in names)
        and isinstance(shape, list)
        and all(type(size) is int and 0 <= size < 2**40 for size in shape)
        and type(start) is int
        and isinstance(values, Tensor)
        and values.dim() == 1
        and 0 <= start <= start + values.numel() <= math.prod(shape)
    )


def _are_snapshots(found: Any, parts: list[Any]) -> bool:
    sizes = [part["values"].shape for part in parts]
    return isinstance(found, list) and all(
        isinstance(one, list)
        and all(isinstance(values, Tensor) for values in one)
        and [values.shape for values in one] == sizes
        for one in found
    )


def describe_zero_directory(directory: Path) -> dict[str, Any]:
    """Return what a directory of DeepSpeed holds, without running what its files name.

    Returns:
        ``path``, ``file_bytes``, ``kind``, ``global_step``, and ``beside`` (averages -> bytes).

    Raises:
        ValueError: If a file is damaged, or the files of the ranks are of several steps.
    """
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {
        "path": str(directory),
        "file_bytes": sum(path.stat().st_size for path in files),
        "kind": "DeepSpeed",
        "global_step": step_of(directory),
        "beside": {
            f"average of {_technique_of(paths[0])} {shown(name)}": sum(path.stat().st_size for path in paths)
            for name, paths in files_of(directory).items()
        },
    }


def _technique_of(path: Path) -> str:
    return "LatestWeightAveraging" if "snapshots" in _read(path) else "EMA"


def extract(directory: Path, which: str, name: str, *, trust: bool) -> dict[str, Tensor]:
    """Return a complete set of weights of a directory of DeepSpeed.

    The trained weights come by DeepSpeed's own conversion; an average needs neither that nor trust.

    Raises:
        ValueError: If it lacks the set, or is incomplete; for the trained weights also without trust or DeepSpeed.
    """
    if which == "raw":
        return full_weights(directory, trust=trust)
    there = files_of(directory)
    if name not in there:
        has = f"it has {', '.join(map(repr, sorted(there)))}" if there else "it has none, only the trained weights"
        raise ValueError(f"`name` must be that of an average in {directory}, got {shown(name)}; {has}.")
    contents = [_read(path) for path in _complete(directory, name, there[name])]
    steps = {content["step"] for content in contents} | {step_of(directory)}
    if len(steps) > 1:
        listed = ", ".join(map(str, sorted(step for step in steps if step is not None)))
        raise ValueError(
            f"{directory} is incomplete: its average {name!r} and its weights are of several steps ({listed})."
        )
    found: dict[str, Tensor] = {}
    for what in ("parts", "others"):
        for names, whole in _assembled(directory, [part for content in contents for part in content[what]]):
            found.update(dict.fromkeys(names, whole))
    keys = {key.replace("_orig_mod.", ""): key for key in contents[0]["keys"]}
    return {key: found[name] for name, key in keys.items() if name in found}


def _complete(directory: Path, name: str, paths: list[Path]) -> list[Path]:
    """Return the files of all ranks."""
    numbers = [_NAME.fullmatch(path.name) for path in paths]
    ranks = {int(match["ranks"]) for match in numbers if match}
    wanted = min(ranks) if len(ranks) == 1 else 0
    if not 0 < wanted < _MOST_RANKS or len(paths) != wanted:
        raise ValueError(f"{directory} is incomplete: the average {name!r} lacks the parts of some ranks.")
    return paths


def _assembled(directory: Path, parts: list[dict[str, Any]]) -> Iterator[tuple[list[str], Tensor]]:
    """Yield names and full tensors of parts, which must make up each without a gap."""
    sets: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        sets.setdefault(part["names"][0], []).append(part)
    for name, found in sets.items():
        end, shape = 0, found[0]["shape"]
        filled = sorted((part for part in found if part["values"].numel()), key=lambda part: part["start"])
        for part in filled:
            fits = part["start"] == end and part["shape"] == shape and part["values"].dtype == filled[0]["values"].dtype
            if not fits:
                raise ValueError(f"{directory} is incomplete: the parts of {name!r} do not make up the whole.")
            end += part["values"].numel()
        if end != math.prod(shape):
            raise ValueError(f"{directory} is incomplete: the parts of {name!r} do not make up the whole.")
        values = [part["values"] for part in filled] or [found[0]["values"]]
        yield found[0]["names"], torch.cat(values).view(shape)
