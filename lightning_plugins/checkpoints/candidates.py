"""The files that a run averages: what ModelCheckpoint kept, or files of our own, one per epoch.

Knows files and numbers only. A directory can hold files of other runs, and a run that was killed and resumed can find
files of the future that it lost; both are told apart from the run's own and left alone.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning_plugins.checkpoints.formats.base import CheckpointError
from lightning_plugins.checkpoints.selection import Record, found_in, one_per_step, read_manifest, read_record
from lightning_plugins.core.validation import LightningPluginsWarning

Signature = list[int]
"""What changes when a file is written anew: time of change in nanoseconds, size."""


def signature(path: Path) -> Signature:
    """Return the signature of a file, or of a sharded directory's index."""
    inner = path / ".metadata"
    stat = (inner if inner.is_file() else path).stat()
    return [stat.st_mtime_ns, stat.st_size]


def foreign_files(folder: Path, after_step: int) -> dict[str, Signature]:
    """Return the checkpoints in ``folder`` that are of a later step than the run has reached.

    Args:
        folder: The directory; it need not exist.
        after_step: Where the run stands: 0 for a fresh one, to which no file can belong.
    """
    if not folder.is_dir():
        return {}
    return {
        path.name: signature(path)
        for path in found_in(folder)
        if after_step == 0 or (record := _record(path)) is None or _step(record) > after_step
    }


def own_records(folder: Path, foreign: Mapping[str, Signature]) -> list[Record]:
    """Return the run's checkpoints in ``folder``, one per step, in the order of steps; averages are none.

    A file that cannot be read is left out with a warning: a kill can cut one off, and the others are still good.
    """
    if not folder.is_dir():
        return []
    paths = [path for path in found_in(folder) if foreign.get(path.name) != signature(path)]
    records = {path: _record(path) for path in paths}
    damaged = [path.name for path, record in records.items() if record is None]
    if damaged:
        warnings.warn(f"Left out, as they cannot be read: {', '.join(damaged)}.", LightningPluginsWarning, stacklevel=2)
    return one_per_step(record for record in records.values() if record is not None and record.manifest is None)


def _record(path: Path) -> Record | None:
    try:
        return read_record(path)
    except CheckpointError:
        return None


def is_average_or_none(path: Path) -> bool:
    """Return whether a path holds an average, which may be replaced, or nothing at all."""
    try:
        return not path.exists() or (path.is_file() and read_manifest(path) is not None)
    except CheckpointError:
        return False


def last_records(records: Iterable[Record], count: int) -> list[Record]:
    """Return the records with the highest steps, in their order."""
    return sorted(records, key=_step)[-count:]


def best_records(records: Iterable[Record], scores: Mapping[int, float], count: int, mode: str) -> list[Record]:
    """Return the records with the best scores, in the order of steps; of equal ones the later.

    Args:
        records: Checkpoints.
        scores: Step -> score; a step without one is none of the best.
        count: How many.
        mode: ``"min"`` or ``"max"``.
    """
    sign = 1 if mode == "min" else -1
    scored = [record for record in records if _step(record) in scores]
    ranked = sorted(scored, key=lambda record: (sign * scores[_step(record)], -_step(record)))
    return sorted(ranked[:count], key=_step)


def _step(record: Record) -> int:
    return -1 if record.step is None else record.step


def remove(path: Path) -> None:
    """Delete a checkpoint, file or sharded directory."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def loss_name(metrics: Iterable[str]) -> str | None:
    """Return which metric tells the better weights when nobody named one: a validation loss.

    Example:
        >>> loss_name(["train_loss", "val_acc", "val_loss"])
        'val_loss'
        >>> loss_name(["val_acc"]) is None
        True
    """
    names = [name for name in metrics if "loss" in name.lower()]
    return min(names, key=lambda name: (name != "val_loss", not name.startswith("val"), "train" in name), default=None)
