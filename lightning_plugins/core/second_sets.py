"""Whether the folder with further sets of tensors in a distributed checkpoint belongs to the checkpoint around it.

A directory of ``torch.distributed.checkpoint`` holds one set of weights. Further ones, such as the trained weights
beside their average, and the gradients of an open window lie in a folder of their own inside of it,
``lightning_plugins_ema/``, which is such a directory again. A distributed checkpoint is not written in one step, and
one that replaces another does so file by file: so what belongs together says so. ``sets.json``, written last in the
folder, and ``meta.pt``, written last of all, hold the same listing:

    version   1
    save      a text that no other save has
    step      the optimizer step
    sets      what each set is, as ["raw"] or ["average", "ema"]; the first lies in the folder under "0"

``meta.pt`` says there, too, how to tell that the folder's files are of this save (``marks``: core/save_marks.py).

``sets.json`` says, too, which ``meta.pt`` lay there when it was written (``replaces``, a SHA-256). If that one is still
there, the save was cut off; if another is, a run without these sets has replaced the checkpoint since, and the folder
is left over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_plugins.core.checkpoint_file import CheckpointError, unreadable
from lightning_plugins.core.checkpoint_keys import SAVE, SECOND_SETS, SECOND_SETS_FOLDER
from lightning_plugins.core.files import open_regular, replace_file
from lightning_plugins.core.save_marks import check_marks
from lightning_plugins.core.stand_ins import UnreadableError
from lightning_plugins.core.torch_file import Archive
from lightning_plugins.core.validation import plain_text, shown, whole_number

VERSION = 1
_LISTING, _REST = "sets.json", "meta.pt"
# of a listing; a set is named by a few words
_LONGEST = 10_000_000

Label = tuple[str, ...]
"""What a set is: ``("raw",)``, ``("average", "ema")``."""

GRADIENTS: Label = ("gradients",)
"""What the gradients of an open window are listed as."""


@dataclass(frozen=True)
class SecondSets:
    """What lies in the folder.

    Args:
        save: Which save wrote it.
        step: The optimizer step.
        labels: What each set is, in order.
    """

    save: str
    step: int
    labels: tuple[Label, ...]

    def root(self, *label: str) -> str | None:
        """Return the key under which a set lies in the folder, ``None`` if it does not."""
        return str(self.labels.index(label)) if label in self.labels else None

    def plain(self) -> dict[str, Any]:
        """Return it as plain values."""
        sets = [list(label) for label in self.labels]
        return {"version": VERSION, "save": self.save, "step": self.step, "sets": sets}


def new_listing(save: str, step: int, labels: Sequence[Label]) -> SecondSets:
    """Return the listing of a save that begins."""
    return SecondSets(save, step, tuple(labels))


def listed(checkpoint: Mapping[str, Any]) -> SecondSets | None:
    """Return what a loaded checkpoint says that lies beside it, ``None`` if it says nothing.

    Raises:
        CheckpointError: If it is no listing, or one of a later version.
    """
    found = checkpoint.get(SECOND_SETS)
    return None if found is None else _checked(found, f"`{SECOND_SETS}`")


def belonging(path: Path, checkpoint: Mapping[str, Any]) -> SecondSets | None:
    """Return what lies in the folder of a directory, ``None`` if nothing does that belongs to it.

    Args:
        path: The directory.
        checkpoint: What its ``meta.pt`` holds.

    Raises:
        CheckpointError: If the directory was not written completely, so that its parts are of different moments.
    """
    said, found = listed(checkpoint), _read(path)
    left_over = said is None and (found is None or found[1] != rest_digest(path))
    if not left_over and (said is None or found is None or found[0] != said):
        steps = [f"step {sets.step}" if sets else "no step" for sets in (found[0] if found else None, said)]
        raise CheckpointError(
            f"{path} is incomplete: its folder {SECOND_SETS_FOLDER} is of {steps[0]} and its {_REST} of {steps[1]}, of "
            "different saves. The run was killed while it wrote the directory, or a part was copied alone. Take "
            "another checkpoint."
        )
    if any((path / name).is_file() for name in (".metadata", _REST)) or any(path.glob("*.distcp")):
        check_marks(path, checkpoint.get(SAVE))
    if said is not None:
        check_marks(path / SECOND_SETS_FOLDER, checkpoint[SECOND_SETS].get("marks"))
    return said


def check_whole(path: str | Path | None) -> None:
    """Raise if a distributed checkpoint was not written completely; only its small files are read, and nothing runs.

    Raises:
        CheckpointError: If so. What is no directory is not looked at.
    """
    path = Path(str(path))
    if not path.is_dir():
        return
    content: Any = {}
    if (path / _REST).is_file():
        try:
            with open_regular(path / _REST) as file:
                content = Archive(file).found.content
        except UnreadableError as error:
            raise CheckpointError(unreadable(path / _REST, error)) from error
    belonging(path, content if isinstance(content, dict) else {})


def rest_digest(path: Path) -> str | None:
    """Return what tells one ``meta.pt`` from another, ``None`` if there is none."""
    if not (path / _REST).is_file():
        return None
    with open_regular(path / _REST) as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def write_listing(path: Path, sets: SecondSets, replaces: str | None) -> None:
    """Say in the folder what lies there: its last file.

    Args:
        path: The checkpoint's directory.
        sets: The listing.
        replaces: The digest of the ``meta.pt`` that is about to be replaced.
    """
    content = json.dumps({**sets.plain(), "replaces": replaces}, indent=1)
    replace_file(path / SECOND_SETS_FOLDER / _LISTING, content.encode())


def _read(path: Path) -> tuple[SecondSets, str | None] | None:
    """Return the folder's listing and what it replaced, ``None`` without one: the folder was never complete."""
    place = path / SECOND_SETS_FOLDER / _LISTING
    if not place.is_file():
        return None
    try:
        with open_regular(place) as file:
            found = json.loads(file.read(_LONGEST))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(unreadable(place, error if isinstance(error, ValueError) else "it is no list")) from error
    replaced = found.get("replaces") if isinstance(found, dict) else None
    return _checked(found, str(place)), replaced if isinstance(replaced, str) else None


def _checked(found: Any, where: str) -> SecondSets:
    if not isinstance(found, dict) or not {"version", "save", "step", "sets"} <= found.keys():
        raise CheckpointError(f"{where} must list sets of weights, got {shown(found)}.")
    if type(found["version"]) is not int or found["version"] != VERSION:
        raise CheckpointError(
            f"{where} must be of version {VERSION}, got {shown(found['version'])}: the checkpoint was written by "
            "another version of lightning_plugins, which can read it."
        )
    sets = found["sets"]
    if not isinstance(sets, list) or not all(
        isinstance(label, list) and label and all(isinstance(word, str) for word in label) for label in sets
    ):
        raise CheckpointError(f"{where} must have a list of names as `sets`, got {shown(sets)}.")
    try:
        return SecondSets(
            plain_text("save", found["save"]), whole_number("step", found["step"]), tuple(map(tuple, sets))
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where} is damaged: {error}") from error
