"""Files with the power averages of one step: complete or absent, cheap to write and to read in part.

A directory holds one file per snapshot, ``step=0000001000.pt`` or ``.safetensors``, and ``frozen.pt`` with the weights
that were not trained when the run began. Every file is written completely or not at all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.core import torch_file
from lightning_plugins.core.files import replacing
from lightning_plugins.core.mapped_files import MappedFiles
from lightning_plugins.core.safetensors_file import read_header, write_tensors
from lightning_plugins.core.stand_ins import UnreadableError
from lightning_plugins.core.validation import a_list, real_number, shown, whole_number

FORMATS = ("torch", "safetensors")
VERSION = 1
_SUFFIXES = {"torch": ".pt", "safetensors": ".safetensors"}
_NAME = re.compile(r"step=(\d+)\.(pt|safetensors)")
_FROZEN = "frozen.pt"
_MOST_AVERAGES = 100  # of one snapshot


@dataclass
class Loaded:
    """What a snapshot holds.

    Args:
        averages: Name -> tensor, one dict per sigma_rel.
        rest: What is not averaged: the buffers at that step.
        tied: Name -> the name that its tensor is stored under.
    """

    averages: list[dict[str, Tensor]]
    rest: dict[str, Tensor]
    tied: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A snapshot file.

    Args:
        path: The file.
        step: Applied steps at which it was written.
        sigma_rels: The relative standard deviations of its averages.
    """

    path: Path
    step: int
    sigma_rels: tuple[float, ...]

    def read(self) -> Loaded:
        """Return its tensors, mapped rather than read."""
        return _read(self.path)[1]


def list_snapshots(dirpath: str | Path) -> list[Snapshot]:
    """Return the snapshots in a directory by step.

    Raises:
        ValueError: If a file with a snapshot's name is none.
    """
    found = []
    for path in Path(dirpath).glob("step=*"):
        match = _NAME.fullmatch(path.name)
        if match:
            header = _read(path)[0]
            found.append(Snapshot(path, header["step"], tuple(header["sigma_rels"])))
    return sorted(found, key=lambda snapshot: snapshot.step)


def write_snapshot(
    dirpath: Path,
    step: int,
    sigma_rels: Sequence[float],
    loaded: Loaded,
    *,
    dtype: torch.dtype = torch.float32,
    file_format: str = "torch",
) -> Path:
    """Write a snapshot in one piece; a file of that step is replaced.

    Args:
        dirpath: The directory, made if it is not there.
        step: Applied steps so far.
        sigma_rels: The relative standard deviations of the averages.
        loaded: Their tensors.
        dtype: Type in which the averages are stored.
        file_format: ``"torch"`` or ``"safetensors"``.
    """
    path = dirpath / f"step={step:010d}{_SUFFIXES[file_format]}"
    header = {"version": VERSION, "step": step, "sigma_rels": list(sigma_rels), "tied": loaded.tied}
    averages = [{name: tensor.to(dtype) for name, tensor in average.items()} for average in loaded.averages]
    dirpath.mkdir(parents=True, exist_ok=True)
    with replacing(path, overwrite=True) as file:
        if file_format == "torch":
            torch.save({**header, "averages": averages, "rest": loaded.rest}, file)
        else:
            flat = {f"{index}/{name}": t for index, average in enumerate(averages) for name, t in average.items()}
            flat.update({f"rest/{name}": tensor for name, tensor in loaded.rest.items()})
            write_tensors(file, flat, {"posthoc_ema": json.dumps(header)})
    return path


def write_frozen(dirpath: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the weights that are not trained."""
    dirpath.mkdir(parents=True, exist_ok=True)
    with replacing(dirpath / _FROZEN, overwrite=True) as file:
        torch.save(dict(tensors), file)


def read_frozen(dirpath: str | Path) -> dict[str, Tensor]:
    """Return the weights that were not trained, mapped rather than read."""
    path = Path(dirpath) / _FROZEN
    if not os.path.lexists(path):
        return {}
    try:
        tensors = torch_file.load(path, trust=False)
    except UnreadableError as error:
        raise ValueError(f"`dirpath` must hold snapshots of PostHocEMA, but {path} is damaged: {error}") from error
    if not _are_tensors(tensors):
        raise ValueError(f"`dirpath` must hold snapshots of PostHocEMA, but {path} holds no tensors by name.")
    found: dict[str, Tensor] = tensors
    return found


def set_aside(dirpath: Path, after: int) -> Path | None:
    """Move snapshots of later steps than ``after``, of a run that died or another one, into a directory beside them.

    Returns:
        That directory, ``None`` if there was nothing to move.
    """
    stale = [path for path in dirpath.glob("step=*") if (m := _NAME.fullmatch(path.name)) and int(m[1]) > after]
    if after == 0 and (dirpath / _FROZEN).is_file():
        stale.append(dirpath / _FROZEN)
    if not stale:
        return None
    number = 1
    while (target := dirpath / f"superseded-{number}").exists():
        number += 1
    target.mkdir()
    for path in stale:
        path.rename(target / path.name)
    return target


def _read(path: Path) -> tuple[dict[str, Any], Loaded]:
    try:
        header, loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
        if header["version"] == VERSION:
            _check(path, header, loaded)
    except OSError:
        raise
    except Exception as error:  # damaged bytes can raise anything
        text = torch_file.reason(error)
        why = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
        raise ValueError(f"`dirpath` must hold snapshots of PostHocEMA, but {path} is none: {why}") from error
    if header["version"] != VERSION:
        raise ValueError(
            f"A snapshot must be of version {VERSION}, but {path} is of version {shown(header['version'])}."
        )
    return header, loaded


def _check(path: Path, header: Mapping[str, Any], loaded: Loaded) -> None:
    """Raise unless a snapshot is what its name and its header say."""
    match = _NAME.fullmatch(path.name)
    if match is None or whole_number("step", header["step"], at_least=1) != int(match[1]):
        raise ValueError(f"its name and its content differ, which is of step {shown(header['step'])}")
    sigmas = [real_number("sigma_rels", sigma) for sigma in a_list("sigma_rels", header["sigma_rels"])]
    if not 0 < len(sigmas) <= _MOST_AVERAGES:
        raise ValueError(f"it has {len(sigmas)} values of `sigma_rels`, which must be 1 to {_MOST_AVERAGES}")
    if len(sigmas) != len(loaded.averages):
        raise ValueError(f"it has {len(loaded.averages)} averages for {len(sigmas)} values of `sigma_rels`")
    names = loaded.averages[0].keys()
    if not all(_are_tensors(average) and average.keys() == names for average in loaded.averages):
        raise ValueError("its averages are not of the same names")
    if not _are_tensors(loaded.rest) or not all(name in names for name in loaded.tied.values()):
        raise ValueError("it is not whole")


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _read_torch(path: Path) -> tuple[dict[str, Any], Loaded]:
    header = torch_file.load(path, trust=False)
    return header, Loaded(header["averages"], header["rest"], header["tied"])


def _read_safetensors(path: Path) -> tuple[dict[str, Any], Loaded]:
    found, files = read_header(path), MappedFiles()
    header = json.loads(found.metadata["posthoc_ema"])
    averages: list[dict[str, Tensor]] = [{} for _ in header["sigma_rels"]]
    rest: dict[str, Tensor] = {}
    for key, tensor in found.tensors.items():
        where, name = key.split("/", 1)
        (rest if where == "rest" else averages[int(where)])[name] = files.tensor(path, found.starts[key], tensor)
    return header, Loaded(averages, rest, header["tied"])
