"""Which save each file of a distributed checkpoint is of.

A directory of ``torch.distributed.checkpoint`` is written file by file, and one that replaces another is a mixture of
two saves until its last file is there; a copy that was broken off stays one. Names, sizes and the places of tensors are
the same in both, and times are lost in copies. So a save leaves marks:

- before anything is written, the index (``.metadata``) of what is replaced is removed;
- every rank writes, beside its shares, a text that no other save has;
- ``meta.pt``, written last, says which text, where in each file it stands, and what the index's digest is:

    version  1
    save     the text
    step     the optimizer step
    index    SHA-256 of ``.metadata``
    places   for each rank ``[file, offset, length]`` of what holds the text

A directory that was written without this package has none, and nothing is asked of it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_plugins.core.checkpoint_file import CheckpointError
from lightning_plugins.core.checkpoint_keys import SAVE
from lightning_plugins.core.files import open_regular
from lightning_plugins.core.validation import shown

VERSION = 1
_INDEX, _REST = ".metadata", "meta.pt"
# a mark takes about 1,300 bytes
_LONGEST = 100_000


# -- writing


def new_save() -> str:
    """Return a text that no other save has; all ranks must take the first one's."""
    return secrets.token_hex(16)


def write_marked(
    write: Callable[..., Any], state: Mapping[str, Any], path: Path, *, save: str, step: int, rank: int
) -> dict[str, Any]:
    """Write a state dict and this rank's mark; every rank must call it.

    Args:
        write: ``torch.distributed.checkpoint.save``.
        state: What is saved.
        path: The directory.
        save: Which save it is, the same on all ranks.
        step: The optimizer step.
        rank: This process's.

    Returns:
        On rank zero, what ``meta.pt`` has to say.
    """
    if rank == 0:
        # no rank writes before the first one has its plan
        (path / _INDEX).unlink(missing_ok=True)
    written = write({**state, SAVE: {str(rank): save}}, checkpoint_id=path)
    if rank:
        return {}
    places = [
        [place.relative_path, place.offset, place.length]
        for key, place in written.storage_data.items()
        if key.fqn.startswith(f"{SAVE}.")
    ]
    return {"version": VERSION, "save": save, "step": step, "index": _digest(path), "places": places}


# -- reading


def check_marks(path: Path, said: Any) -> None:
    """Raise unless every file of a directory is of one save; a few small places are read, and nothing runs.

    Args:
        path: The directory.
        said: What its ``meta.pt`` says of the save, ``None`` if nothing.

    Raises:
        CheckpointError: If a file is of another save, or is not there.
    """
    if not (path / _INDEX).is_file():
        raise _incomplete(path, f"it has no {_INDEX}, which is written when all others are there")
    if said is None:
        with open_regular(path / _INDEX) as file:
            if SAVE.encode() in file.read():
                raise _incomplete(path, f"its {_INDEX} is of a save of which there is no {_REST}")
        return
    save, step = _checked(path, said)
    if _digest(path) != said["index"]:
        raise _incomplete(path, f"its {_INDEX} and {_REST}, of step {step}, are of different saves")
    for name, begin, length in _places(path, said["places"]):
        if not (path / name).is_file():
            raise _incomplete(path, f"its {name} does not exist")
        with open_regular(path / name) as file:
            file.seek(begin)
            if save.encode() not in file.read(length):
                raise _incomplete(path, f"its {name} and {_REST}, of step {step}, are of different saves")


def _incomplete(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is incomplete: {why}. The run was killed while it wrote the directory, or a part was copied alone. "
        "Take another checkpoint."
    )


def _digest(path: Path) -> str:
    with open_regular(path / _INDEX) as file:
        return hashlib.sha256(file.read()).hexdigest()


def _checked(path: Path, said: Any) -> tuple[str, int]:
    """Return the save's text and step, if they can be such."""
    known = {"version", "save", "step", "index", "places"}
    if not isinstance(said, dict) or not known <= said.keys():
        raise CheckpointError(f"`{SAVE}` in {path / _REST} must say which save it is of, got {shown(said)}.")
    if type(said["version"]) is not int or said["version"] != VERSION:
        raise CheckpointError(
            f"`{SAVE}` in {path / _REST} must be of version {VERSION}, got {shown(said['version'])}: the checkpoint "
            "was written by another version of lightning_plugins, which can read it."
        )
    save, step = said["save"], said["step"]
    if type(save) is not str or len(save) != len(new_save()) or type(step) is not int:
        raise CheckpointError(f"`{SAVE}` in {path / _REST} must name its save and step, got {shown([save, step])}.")
    return save, step


def _places(path: Path, found: Any) -> Iterator[tuple[str, int, int]]:
    """Yield where the marks are, if they can be there: each rank has files of its own."""
    seen: set[str] = set()
    for place in found if isinstance(found, list) else [found]:
        name, begin, length = place if isinstance(place, list) and len(place) == 3 else ("", -1, -1)
        plain = isinstance(name, str) and name == Path(name).name and "\0" not in name
        if not plain or not all(type(number) is int and 0 <= number < 2**63 for number in (begin, length)):
            raise CheckpointError(f"`{SAVE}` in {path / _REST} must name places in its files, got {shown(place)}.")
        if length > _LONGEST or name in seen:
            rule = "short places, one in a file"
            raise CheckpointError(f"`{SAVE}` in {path / _REST} must name {rule}, got {shown(place)}.")
        seen.add(name)
        yield name, begin, length
