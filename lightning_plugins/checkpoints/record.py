"""What a checkpoint says of itself, read without loading it: no weights are read, and nothing that it names runs."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_plugins.checkpoints.formats.base import as_count, ema_note
from lightning_plugins.checkpoints.formats.safetensors import checked_header, parse_metadata
from lightning_plugins.checkpoints.run_identity import Lineage, lineage_of
from lightning_plugins.core import checkpoint_keys
from lightning_plugins.core.checkpoint_file import CheckpointError, unreadable
from lightning_plugins.core.files import open_regular
from lightning_plugins.core.second_sets import check_whole
from lightning_plugins.core.stand_ins import StoredTensor, UnreadableError
from lightning_plugins.core.torch_file import Archive, is_archive, read_legacy
from lightning_plugins.core.zero_directory import is_deepspeed_directory, step_of

# a score; larger whole numbers are none that a float holds
_LARGEST = 1e300


@dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself.

    Args:
        path: The file or directory.
        step: Its ``global_step``, ``None`` if it does not say.
        epoch: Its epoch, from 0.
        score: Its own value of the monitored metric, ``None`` if it does not say.
        scores: File -> score: what ModelCheckpoint had kept when this one was written. Files are named from its
            directory on, as in ``"epoch=1-val/loss=0.50.ckpt"``.
        mode: ``"min"`` or ``"max"``: which scores are better.
        manifest: What it is the average of, ``None`` for an ordinary checkpoint.
        ema: What its ``state_dict`` holds, if it is of a run with an EMA.
        lineage: The fits that led to it, empty if it does not say.
        written: Files that ModelCheckpoint had written, named as in ``scores``.
        keeper: The state key of the ModelCheckpoint that wrote it, ``""`` if none says so.
        folder: The directory of that ModelCheckpoint, as it was then.
    """

    path: Path
    step: int | None = None
    epoch: int | None = None
    score: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    mode: str = "min"
    manifest: Mapping[str, Any] | None = None
    ema: str | None = None
    lineage: Lineage = Lineage()  # noqa: RUF009  # it cannot be changed
    written: frozenset[str] = frozenset()
    keeper: str = ""
    folder: str = ""


def read_record(path: str | Path) -> Record:
    """Return what a checkpoint says of itself; nothing that it names runs, and no weights are read.

    Raises:
        FileNotFoundError: If there is nothing.
        CheckpointError: If it is damaged, or a directory that was not written completely.
    """
    path = Path(path)
    if path.is_dir():
        if is_deepspeed_directory(path):
            return Record(path, _step_of_deepspeed(path))
        check_whole(path)
        meta = path / "meta.pt"
        return _torch_record(path, meta) if meta.is_file() else Record(path)
    if path.suffix == ".safetensors":
        metadata = parse_metadata(checked_header(path).metadata)
        manifest = metadata.get(checkpoint_keys.MEAN)
        return Record(path, as_count(metadata.get("global_step")), as_count(metadata.get("epoch")), manifest=manifest)
    return _torch_record(path, path)


def read_records(paths: Iterable[Path]) -> tuple[list[Record], dict[Path, str]]:
    """Return what checkpoints say of themselves, and of those that cannot be read why not, one line each."""
    records, faults = [], {}
    for path in paths:
        try:
            records.append(read_record(path))
        except CheckpointError as error:  # noqa: PERF203  # the others are read all the same
            faults[path] = str(error)
        except OSError as error:
            faults[path] = f"{path} cannot be read: {error.strerror}." if error.strerror else str(error)
    return records, faults


def read_manifest(path: str | Path) -> Mapping[str, Any] | None:
    """Return the manifest of a file that :func:`average_checkpoints` wrote, ``None`` for any other checkpoint."""
    return read_record(path).manifest


def _step_of_deepspeed(path: Path) -> int | None:
    try:
        return step_of(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _torch_record(path: Path, file_path: Path) -> Record:
    with open_regular(file_path) as file:
        zipped = False
        try:
            zipped = is_archive(file)
            archive = Archive(file) if zipped else None
            found = read_legacy(file).content if archive is None else archive.found.content
            content = found if isinstance(found, dict) else {}
            kept = _kept_files(archive, path, content.get("callbacks"))
        except UnreadableError as error:
            if not zipped and path.suffix != ".ckpt":
                # other programs' files may have such a suffix, too
                return Record(path)
            raise CheckpointError(unreadable(file_path, error)) from error
    manifest = content.get(checkpoint_keys.MEAN)
    return Record(
        path,
        as_count(content.get("global_step")),
        as_count(content.get("epoch")),
        kept.score,
        kept.scores,
        kept.mode,
        manifest if isinstance(manifest, dict) else None,
        _ema(content),
        lineage_of(content),
        kept.written,
        kept.keeper,
        kept.folder,
    )


def _ema(content: dict[str, Any]) -> str | None:
    state = content.get("state_dict")
    rest = {key: value for key, value in content.items() if key != "state_dict"}
    return ema_note(rest, state) if isinstance(state, dict) else None


@dataclass
class _KeptFiles:
    """What the ModelCheckpoints of a run say in a checkpoint."""

    score: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    mode: str = "min"
    written: frozenset[str] = frozenset()
    keeper: str = ""
    folder: str = ""


def _kept_files(archive: Archive | None, path: Path, callbacks: Any) -> _KeptFiles:
    """Return ModelCheckpoint's record; of several that rank files the one that names this file, else the first."""
    found = _KeptFiles()
    written: set[str] = set()
    keeper = folder = ""
    named_here = False
    for key, state in callbacks.items() if isinstance(callbacks, dict) else ():
        if not isinstance(state, dict) or not isinstance(state.get("best_k_models"), dict):
            continue
        root = state.get("dirpath")
        scores = {_from(root, name): _number(archive, value) for name, value in state["best_k_models"].items()}
        named = {*scores, *(_from(root, state.get(name)) for name in ("best_model_path", "last_model_path"))} - {""}
        written |= named
        if not keeper and looked_up(path, dict.fromkeys(named, True)):
            keeper, folder = str(key), str(root or "")
        names_this = looked_up(path, scores) is not None
        if state.get("monitor") and (not found.scores or (names_this and not named_here)):
            known = {name: value for name, value in scores.items() if value is not None}
            found = _KeptFiles(_number(archive, state.get("current_score")), known, _mode(str(key)))
            named_here = names_this
    found.written, found.keeper, found.folder = frozenset(written), keeper, folder
    return found


def _from(root: Any, path: Any) -> str:
    """Return a path as it lies below ModelCheckpoint's directory, else its last part."""
    if not isinstance(path, str) or not path:
        return ""
    inside = os.path.relpath(path, root) if isinstance(root, str) and root else ".."
    return Path(path).name if inside.startswith("..") else Path(inside).as_posix()


def looked_up(path: Path, scores: Mapping[str, Any]) -> Any:
    """Return the value of the longest name in ``scores`` that ``path`` ends with; ``None`` if there is none.

    Example:
        >>> looked_up(Path("/moved/a/x.ckpt"), {"x.ckpt": 1, "a/x.ckpt": 2, "b/x.ckpt": 3})
        2
    """
    parts = path.parts
    tails = ("/".join(parts[-length:]) for length in range(len(parts), 0, -1))
    return next((scores[tail] for tail in tails if tail in scores), None)


def _number(archive: Archive | None, value: Any) -> float | None:
    if isinstance(value, StoredTensor):
        return None if archive is None else archive.scalar(value)
    return float(value) if isinstance(value, (int, float)) and -_LARGEST < value < _LARGEST else None


def _mode(key: str) -> str:
    """Return the mode in a state key, ``ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min', ...}``."""
    found = re.search(r"'mode': ('\w+')", key)
    mode = ast.literal_eval(found[1]) if found else "min"
    return mode if mode in ("min", "max") else "min"
