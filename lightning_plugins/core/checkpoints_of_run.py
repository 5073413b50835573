"""What other callbacks of a run keep on disk, and where. They are recognized by what they have, in both namespaces."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

_ATTRIBUTES = ("best_k_models", "save_top_k", "dirpath", "monitor", "mode")


def model_checkpoints(trainer: Any, *, monitoring: bool = False) -> list[Any]:
    """Return the callbacks that keep checkpoints as Lightning's ModelCheckpoint does.

    Args:
        trainer: The Trainer.
        monitoring: Only those that rank their files by a metric.
    """
    found = [callback for callback in trainer.callbacks if all(hasattr(callback, name) for name in _ATTRIBUTES)]
    return [callback for callback in found if callback.monitor or not monitoring]


def capacity(checkpoint: Any) -> float:
    """Return how many files a ModelCheckpoint keeps."""
    return math.inf if checkpoint.save_top_k == -1 else checkpoint.save_top_k


def followed(trainer: Any, count: int, *, monitoring: bool) -> Any:
    """Return the ModelCheckpoint to follow: the first that keeps ``count`` files, else the first, else ``None``."""
    found = model_checkpoints(trainer, monitoring=monitoring)
    return next((checkpoint for checkpoint in found if capacity(checkpoint) >= count), found[0] if found else None)


def keeper_of(trainer: Any, path: str | Path) -> Any:
    """Return the ModelCheckpoint that is writing ``path`` or has it in its record, ``None`` if there is none."""
    for checkpoint in model_checkpoints(trainer):
        latest = (getattr(checkpoint, name, "") for name in ("best_model_path", "last_model_path"))
        if str(path) in (*checkpoint.best_k_models, *latest):
            return checkpoint
    return None


def kept_scores(checkpoint: Any) -> dict[Path, float]:
    """Return the files that a ModelCheckpoint keeps for their score, and their scores."""
    return {Path(path): float(score) for path, score in checkpoint.best_k_models.items()}


def last_file(checkpoint: Any) -> Path:
    """Return the file that a ModelCheckpoint keeps besides, as the last."""
    return Path(getattr(checkpoint, "last_model_path", ""))


def checkpoint_folder(trainer: Any, checkpoint: Any) -> str:
    """Return the directory of a ModelCheckpoint, or the one that it would have. Every rank must ask."""
    if checkpoint is not None and checkpoint.dirpath:
        return str(checkpoint.dirpath)
    return str(Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")


def wait_for_files(trainer: Any) -> None:
    """Wait for checkpoints that Lightning's AsyncCheckpointIO writes in the background.

    Its teardown waits, and a later save begins anew; Lightning calls it a moment later and reports what went wrong.
    That of another IO may let go of what later saves need.
    """
    io = trainer.strategy.checkpoint_io
    if any(kind.__name__ == "AsyncCheckpointIO" for kind in type(io).__mro__):
        with contextlib.suppress(Exception):
            io.teardown()
