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
from lightning_plugins.core.validation import a_list, shown, whole_number
from lightning_plugins.ema.checkpoint_format import tensors_by_name
from lightning_plugins.ema.power_exponent import check_sigma_rel

FORMATS = ("torch", "safetensors")
VERSION = 1
MOST_AVERAGES = 100
"""Most averages that a snapshot may hold."""
_SUFFIXES = {"torch": ".pt", "safetensors": ".safetensors"}
_NAME = re.compile(r"step=(\d{1,19})\.(pt|safetensors)")
_FROZEN = "frozen.pt"
_RUN = re.compile(r"[0-9a-f]{0,64}")


@dataclass
class SnapshotContents:
    """What a snapshot holds.

    Args:
        averages: Name -> tensor, one dict per sigma_rel.
        rest: What is not averaged: the buffers at that step.
        tied: Name -> the name that its tensor is stored under.
        run: What tells the run's snapshots from those of others; empty for files of version 0.1.
        began: Name -> step at which a parameter that was replaced in mid-run began.
        first_names: Name -> what a parameter that was moved in mid-run was called at first.
    """

    averages: list[dict[str, Tensor]]
    rest: dict[str, Tensor]
    tied: dict[str, str] = field(default_factory=dict)
    run: str = ""
    began: dict[str, int] = field(default_factory=dict)
    first_names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SnapshotFile:
    """A snapshot file.

    Args:
        path: The file.
        step: Applied steps at which it was written.
        sigma_rels: The relative standard deviations of its averages.
        run: What tells its run from others.
    """

    path: Path
    step: int
    sigma_rels: tuple[float, ...]
    run: str

    def read(self) -> SnapshotContents:
        """Return its tensors, mapped rather than read."""
        return _read(self.path)[1]


def steps_in(dirpath: str | Path) -> list[int]:
    """Return the steps of the snapshots in a directory, by the names of the files, in order."""
    return sorted({int(match[1]) for path in Path(dirpath).glob("step=*") if (match := _NAME.fullmatch(path.name))})


def list_snapshots(dirpath: str | Path, up_to: int | None = None) -> list[SnapshotFile]:
    """Return the snapshots in a directory by step.

    Args:
        dirpath: The directory.
        up_to: Only those of this step and before; later ones are not read.

    Raises:
        ValueError: If a file with a snapshot's name is none.
    """
    found = []
    for path in Path(dirpath).glob("step=*"):
        match = _NAME.fullmatch(path.name)
        if match and (up_to is None or int(match[1]) <= up_to):
            header, contents = _read(path)
            found.append(SnapshotFile(path, header["step"], tuple(header["sigma_rels"]), contents.run))
    return sorted(found, key=lambda snapshot: snapshot.step)


def write_snapshot(
    dirpath: Path,
    step: int,
    sigma_rels: Sequence[float],
    contents: SnapshotContents,
    *,
    dtype: torch.dtype = torch.float32,
    file_format: str = "torch",
) -> Path:
    """Write a snapshot in one piece; a file of that step is replaced.

    Args:
        dirpath: The directory, made if it is not there.
        step: Applied steps so far.
        sigma_rels: The relative standard deviations of the averages.
        contents: Their tensors.
        dtype: Type in which the averages are stored, complex ones always as complex64.
        file_format: ``"torch"`` or ``"safetensors"``.
    """
    path = dirpath / f"step={step:010d}{_SUFFIXES[file_format]}"
    header = {"version": VERSION, "step": step, "sigma_rels": list(sigma_rels), "tied": contents.tied}
    header.update({name: value for name in ("run", "began", "first_names") if (value := getattr(contents, name))})
    averages = [
        {name: tensor.to(torch.complex64 if tensor.is_complex() else dtype) for name, tensor in average.items()}
        for average in contents.averages
    ]
    dirpath.mkdir(parents=True, exist_ok=True)
    with replacing(path, overwrite=True) as file:
        if file_format == "torch":
            torch.save({**header, "averages": averages, "rest": contents.rest}, file)
        else:
            flat = {f"{index}/{name}": t for index, average in enumerate(averages) for name, t in average.items()}
            flat.update({f"rest/{name}": tensor for name, tensor in contents.rest.items()})
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
    if not tensors_by_name(tensors):
        raise ValueError(f"`dirpath` must hold snapshots of PostHocEMA, but {path} holds no tensors by name.")
    found: dict[str, Tensor] = tensors
    return found


def set_aside(dirpath: Path, after: int, run: str | None = None) -> Path | None:
    """Move snapshots of later steps than ``after`` into a directory beside them.

    Args:
        dirpath: The directory.
        after: The last step that stays.
        run: Move only snapshots of this run; ``None`` for all.

    Returns:
        That directory, ``None`` if there was nothing to move.
    """
    later = [path for path in dirpath.glob("step=*") if (m := _NAME.fullmatch(path.name)) and int(m[1]) > after]
    stale = [path for path in later if run is None or _run_of(path) == run]
    if after == 0 and run is None and (dirpath / _FROZEN).is_file():
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


def check_history(found: Mapping[str, Any]) -> tuple[str, dict[str, int], dict[str, str]]:
    """Return a run's name and what happened to its parameters, as a header or a state says.

    Raises:
        TypeError: If a step is not a whole number.
        ValueError: If something else is not what it should be.
    """
    run, began, first = found.get("run", ""), found.get("began", {}), found.get("first_names", {})
    if not isinstance(run, str) or not _RUN.fullmatch(run):
        raise ValueError(f"`run` must be a text of hexadecimal digits, got {shown(run)}")
    if not isinstance(began, dict) or not all(isinstance(name, str) for name in began):
        raise ValueError(f"`began` must be steps by name, got {shown(began)}")
    if not isinstance(first, dict) or not all(isinstance(text, str) for pair in first.items() for text in pair):
        raise ValueError(f"`first_names` must be names by name, got {shown(first)}")
    return run, {name: whole_number("began", step, at_least=1) for name, step in began.items()}, dict(first)


def _run_of(path: Path) -> str | None:
    try:
        return _read(path)[1].run
    except (OSError, ValueError):
        # not one that this run has written
        return None


def _read(path: Path) -> tuple[dict[str, Any], SnapshotContents]:
    try:
        header, contents = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
        if header["version"] == VERSION:
            _check(path, header, contents)
    except OSError:
        raise
    # damaged bytes can raise anything
    except Exception as error:
        text = torch_file.reason(error)
        why = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
        raise ValueError(f"`dirpath` must hold snapshots of PostHocEMA, but {path} is none: {why}") from error
    if header["version"] != VERSION:
        raise ValueError(
            f"A snapshot must be of version {VERSION}, but {path} is of version {shown(header['version'])}."
        )
    return header, contents


def _check(path: Path, header: Mapping[str, Any], contents: SnapshotContents) -> None:
    """Raise unless a snapshot is what its name and its header say."""
    match = _NAME.fullmatch(path.name)
    if match is None or whole_number("step", header["step"], at_least=1) != int(match[1]):
        raise ValueError(f"its name and its content differ, which is of step {shown(header['step'])}")
    sigmas = [check_sigma_rel("sigma_rels", sigma) for sigma in _sigma_rels(header)]
    if len(sigmas) != len(contents.averages):
        raise ValueError(f"it has {len(contents.averages)} averages for {len(sigmas)} values of `sigma_rels`")
    names = contents.averages[0].keys()
    if not all(tensors_by_name(average) and average.keys() == names for average in contents.averages):
        raise ValueError("its averages are not of the same names")
    tied = contents.tied
    if not isinstance(tied, dict) or not all(isinstance(key, str) and name in names for key, name in tied.items()):
        raise ValueError("it is not whole")
    if not tensors_by_name(contents.rest):
        raise ValueError("it is not whole")


def _sigma_rels(header: Mapping[str, Any]) -> list[Any]:
    sigmas = a_list("sigma_rels", header["sigma_rels"])
    if not 0 < len(sigmas) <= MOST_AVERAGES:
        raise ValueError(f"it has {len(sigmas)} values of `sigma_rels`, which must be 1 to {MOST_AVERAGES}")
    return sigmas


def _read_torch(path: Path) -> tuple[dict[str, Any], SnapshotContents]:
    header = torch_file.load(path, trust=False)
    if not isinstance(header, dict):
        raise ValueError("it holds no snapshot")  # noqa: TRY004  # the file's fault, not an argument's
    return header, _contents(header, a_list("averages", header["averages"]), header["rest"])


def _read_safetensors(path: Path) -> tuple[dict[str, Any], SnapshotContents]:
    found, files = read_header(path), MappedFiles()
    header = json.loads(found.metadata["posthoc_ema"])
    averages: list[dict[str, Tensor]] = [{} for _ in _sigma_rels(header)]
    rest: dict[str, Tensor] = {}
    for key, tensor in found.tensors.items():
        where, name = key.split("/", 1)
        (rest if where == "rest" else averages[int(where)])[name] = files.tensor(path, found.starts[key], tensor)
    return header, _contents(header, averages, rest)


def _contents(
    header: Mapping[str, Any], averages: list[dict[str, Tensor]], rest: dict[str, Tensor]
) -> SnapshotContents:
    return SnapshotContents(averages, rest, header["tied"], *check_history(header))
