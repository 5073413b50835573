"""Whether a callback writes in a run, and whether it could: a place that cannot be written is refused at setup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_plugins.core.files import probe, probe_directory
from lightning_plugins.core.lightning import MisconfigurationException


def leaves_files(trainer: Any) -> bool:
    """Return whether callbacks write files in a run: not with ``fast_dev_run``, as Lightning's own do.

    A trial of a few batches leaves nothing behind and moves nothing aside; what is printed is printed. Checkpoints that
    the user's own code saves are complete.
    """
    return not trainer.fast_dev_run


def check_writable(argument: str, path: str | Path, *, directory: bool = False) -> None:
    """Raise unless ``path`` can be written; nothing is left behind, and missing directories are not made.

    Every callback that writes calls this at setup, on the rank that writes, for each of its arguments that names a
    place. A disk that is full at that moment is no reason to refuse: there can be room when the file is written.

    Args:
        argument: The name of the argument, for the message.
        path: The file, or the directory, that the user named.
        directory: Whether ``path`` is a directory in which files will be made.

    Raises:
        MisconfigurationException: If it cannot be written.
    """
    try:
        (probe_directory if directory else probe)(Path(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        kind = "directory that can be written to" if directory else "file that can be written"
        raise MisconfigurationException(f"`{argument}` must be a {kind}, got '{path}': {reason}.") from error
