"""Which checkpoints of a directory to average: the last, the best, or a range of steps or epochs.

Files are told apart and ordered by the ``global_step`` inside them, never by date or name. Reading it runs nothing that
a file names.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_plugins.checkpoints.formats.base import CheckpointError, as_count, ema_note, unreadable
from lightning_plugins.checkpoints.formats.safe_unpickler import Archive, StoredTensor, UnreadableError
from lightning_plugins.checkpoints.formats.safetensors import parse_metadata, read_header
from lightning_plugins.checkpoints.formats.sharded import is_sharded
from lightning_plugins.checkpoints.streaming_mean import MANIFEST
from lightning_plugins.core.validation import LightningPluginsWarning, a_path, shown, whole_number

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself, read without loading it.

    Args:
        path: The file or directory.
        step: Its ``global_step``, ``None`` if it does not say.
        epoch: Its epoch, from 0.
        score: Its own value of the monitored metric, ``None`` if it does not say.
        scores: Name of a file -> score: what ModelCheckpoint had kept when this one was written.
        mode: ``"min"`` or ``"max"``: which scores are better.
        manifest: What it is the average of, ``None`` for an ordinary checkpoint.
        ema: What its ``state_dict`` holds, if it is of a run with an EMA.
    """

    path: Path
    step: int | None = None
    epoch: int | None = None
    score: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    mode: str = "min"
    manifest: Mapping[str, Any] | None = None
    ema: str | None = None


def read_record(path: str | Path) -> Record:
    """Return what a checkpoint says of itself; nothing that it names runs, and no weights are read.

    Raises:
        FileNotFoundError: If there is nothing.
        CheckpointError: If it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        meta = path / "meta.pt"
        return _torch_record(path, meta) if meta.is_file() else Record(path)
    if path.suffix == ".safetensors":
        metadata = parse_metadata(read_header(path)[0].get("__metadata__", {}))
        manifest = metadata.get(MANIFEST)
        return Record(path, as_count(metadata.get("global_step")), as_count(metadata.get("epoch")), manifest=manifest)
    return _torch_record(path, path)


def read_manifest(path: str | Path) -> Mapping[str, Any] | None:
    """Return the manifest of a file that :func:`average_checkpoints` wrote, ``None`` for any other checkpoint."""
    return read_record(path).manifest


def _torch_record(path: Path, file_path: Path) -> Record:
    with file_path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return Record(path)  # older than torch 1.6, or no checkpoint: opening it will tell
        file.seek(0)
        try:
            archive = Archive(file)
            content = archive.content if isinstance(archive.content, dict) else {}
            score, scores, mode = _scores(archive, content.get("callbacks"))
        except UnreadableError as error:
            raise CheckpointError(unreadable(file_path, error)) from error
    manifest = content.get(MANIFEST)
    return Record(
        path,
        as_count(content.get("global_step")),
        as_count(content.get("epoch")),
        score,
        scores,
        mode,
        manifest if isinstance(manifest, dict) else None,
        _ema(content),
    )


def _ema(content: dict[str, Any]) -> str | None:
    state = content.get("state_dict")
    rest = {key: value for key, value in content.items() if key != "state_dict"}
    return ema_note(rest, state) if isinstance(state, dict) else None


def _scores(archive: Archive, callbacks: Any) -> tuple[float | None, dict[str, float], str]:
    """Return the scores in ModelCheckpoint's own record: of this file, of the files it kept, and which are better."""
    for key, state in callbacks.items() if isinstance(callbacks, dict) else ():
        if not isinstance(state, dict) or not isinstance(state.get("best_k_models"), dict) or not state.get("monitor"):
            continue
        scores = {Path(str(name)).name: _number(archive, value) for name, value in state["best_k_models"].items()}
        known = {name: value for name, value in scores.items() if value is not None}
        return _number(archive, state.get("current_score")), known, _mode(str(key))
    return None, {}, "min"


def _number(archive: Archive, value: Any) -> float | None:
    if isinstance(value, StoredTensor):
        return archive.scalar(value)
    return float(value) if isinstance(value, (int, float)) else None


def _mode(key: str) -> str:
    """Return the mode in a state key, ``ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min', ...}``."""
    found = re.search(r"'mode': ('\w+')", key)
    mode = ast.literal_eval(found[1]) if found else "min"
    return mode if mode in ("min", "max") else "min"


@dataclass(frozen=True)
class Selection:
    """Chosen checkpoints.

    Args:
        records: In the order of their steps.
        notes: What the user should know of the choice, one line each.
        scores: Path -> score, for those whose score is known.
    """

    records: list[Record]
    notes: list[str] = field(default_factory=list)
    scores: Mapping[Path, float] = field(default_factory=dict)


def select_checkpoints(
    dirpath: str | Path,
    *,
    last: int | None = None,
    best: int | None = None,
    min_step: int | None = None,
    max_step: int | None = None,
    min_epoch: int | None = None,
    max_epoch: int | None = None,
) -> list[Path]:
    """Return the checkpoints of a directory, in the order of their steps.

    One file for each step: of several with one step the one with the highest ``-v`` number counts, which
    ModelCheckpoint wrote last, and ``last.ckpt`` only when no other has its step. Averages that this package wrote and
    files that hold no step are left out.

    Args:
        dirpath: The directory; sub-directories are only looked into if they are sharded checkpoints themselves.
        last: Only the ones with the highest steps, this many.
        best: Only the ones with the best score, this many: by ModelCheckpoint's record in the newest file, else by the
            metric that each file holds. Files saved weights-only hold none.
        min_step: Only from this step on.
        max_step: Only up to this step.
        min_epoch: Only from this epoch on (counted from 0, as in the files).
        max_epoch: Only up to this epoch.

    Returns:
        Paths, the lowest step first. Fewer than asked for only with a warning.

    Raises:
        NotADirectoryError: If ``dirpath`` is none.
        TypeError: If a number is not whole.
        ValueError: If ``last`` and ``best`` are both given, or no file has a score. A :class:`CheckpointError` if a
            file is damaged.

    Example:
        >>> import torch
        >>> folder = getfixture("tmp_path")
        >>> for step in (20, 100, 3):
        ...     torch.save({"state_dict": {}, "global_step": step}, folder / f"{step}.ckpt")
        >>> [path.name for path in select_checkpoints(folder, last=2)]
        ['20.ckpt', '100.ckpt']
    """
    dirpath = Path(a_path("dirpath", dirpath))
    if not dirpath.is_dir():
        raise NotADirectoryError(f"{dirpath} is not a directory.")
    limits = Limits(min_step, max_step, min_epoch, max_epoch)
    selection = choose(found_in(dirpath), last=last, best=best, limits=limits)
    for note in selection.notes:
        warnings.warn(note, LightningPluginsWarning, stacklevel=2)
    return [record.path for record in selection.records]


@dataclass(frozen=True)
class Limits:
    """Inclusive limits of steps and epochs; ``None`` is no limit."""

    min_step: int | None = None
    max_step: int | None = None
    min_epoch: int | None = None
    max_epoch: int | None = None

    def __post_init__(self) -> None:
        for name, value in dict(vars(self)).items():
            if value is not None:
                self.__dict__[name] = whole_number(name, value)  # past the frozen dataclass's __setattr__
        for low, high in (("min_step", "max_step"), ("min_epoch", "max_epoch")):
            bottom, top = getattr(self, low), getattr(self, high)
            if bottom is not None and top is not None and bottom > top:
                raise ValueError(f"`{low}` must be at most `{high}`, got {bottom} and {top}.")

    def admit(self, record: Record) -> bool:
        """Return whether a checkpoint lies inside."""
        return _between(record.step, self.min_step, self.max_step) and _between(
            record.epoch, self.min_epoch, self.max_epoch
        )


def _between(value: int | None, low: int | None, high: int | None) -> bool:
    if value is None:
        return low is None and high is None
    return (low is None or value >= low) and (high is None or value <= high)


def found_in(dirpath: Path) -> list[Path]:
    """Return what may be a checkpoint in a directory, by name."""
    return sorted(
        path
        for path in dirpath.iterdir()
        if not path.name.startswith(".") and (is_sharded(path) if path.is_dir() else path.suffix in SUFFIXES)
    )


def choose(
    paths: Iterable[str | Path], *, last: int | None = None, best: int | None = None, limits: Limits | None = None
) -> Selection:
    """Choose among checkpoints as :func:`select_checkpoints` does, which documents the arguments."""
    if last is not None and best is not None:
        raise ValueError(f"`last` and `best` cannot be given together, got last={shown(last)} and best={shown(best)}.")
    last = None if last is None else whole_number("last", last, at_least=1, unit="checkpoints")
    best = None if best is None else whole_number("best", best, at_least=1, unit="checkpoints")
    records, notes = _usable([read_record(path) for path in paths])
    records = [record for record in records if limits is None or limits.admit(record)]
    scores, mode = known_scores(records)
    if best is not None:
        records = _best(records, scores, mode, best)
    elif last is not None:
        records = records[-last:]
    asked = last or best
    if asked is not None and len(records) < asked:
        what = "with a score " if best else ""
        notes.append(f"{asked} checkpoints were asked for, {len(records)} {what}found.")
    return Selection(records, notes, scores)


def _usable(records: Iterable[Record]) -> tuple[list[Record], list[str]]:
    ordinary = [record for record in records if record.manifest is None]
    without = [record.path.name for record in ordinary if record.step is None]
    notes = [f"Left out, as they hold no step: {', '.join(without)}."] if without else []
    return one_per_step(ordinary), notes


def one_per_step(records: Iterable[Record]) -> list[Record]:
    """Return one checkpoint for each step, in the order of steps; those without a step are left out."""
    chosen: dict[int, Record] = {}
    for record in records:
        if record.step is not None:
            other = chosen.get(record.step)
            if other is None or _precedence(record.path) > _precedence(other.path):
                chosen[record.step] = record
    return [chosen[step] for step in sorted(chosen)]


def _precedence(path: Path) -> tuple[bool, int, str]:
    """Return what decides between files of one step: not ``last``, then ModelCheckpoint's version, then the name."""
    is_last = path.is_symlink() or re.fullmatch(r"last(-v\d+)?", path.stem) is not None
    version = re.search(r"-v(\d+)$", path.stem)
    return not is_last, int(version[1]) if version else 0, path.name


def known_scores(records: Iterable[Record]) -> tuple[dict[Path, float], str]:
    """Return the scores of checkpoints and which are better.

    ModelCheckpoint's record in the newest file counts first: it names every file that was among the best by then. A
    file that it does not name is scored by the metric it holds itself. Names are compared without their directory, so
    that a copied run keeps its scores.
    """
    newest_first = list(reversed(list(records)))
    record = next((found for found in newest_first if found.scores), None)
    scores = {}
    for found in newest_first:
        name = found.path.name
        score = record.scores.get(name) if record else None
        score = found.scores.get(name, found.score) if score is None else score
        if score is not None and not math.isnan(score):
            scores[found.path] = score
    return scores, record.mode if record else next((found.mode for found in newest_first if found.score), "min")


def _best(records: list[Record], scores: Mapping[Path, float], mode: str, count: int) -> list[Record]:
    scored = [record for record in records if record.path in scores]
    if not scored:
        raise CheckpointError(
            "`best` needs scores, and these checkpoints hold none: ModelCheckpoint writes them with `monitor` set and "
            "save_weights_only=False. Use `last`, or name the files."
        )
    sign = 1 if mode == "min" else -1
    ranked = sorted(scored, key=lambda record: (sign * scores[record.path], -(record.step or 0)))
    return sorted(ranked[:count], key=lambda record: record.step or 0)
