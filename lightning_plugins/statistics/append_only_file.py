"""Files that only grow, by whole records, and survive a full disk; and moving files aside without losing any.

Knows neither CSV nor TensorBoard, and no Trainer.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from lightning_plugins.core.files import replacing


class GrowingFile:
    """A local file to which whole records are appended.

    Args:
        path: Where; the file is made if it is not there. Its directory must exist.

    Attributes:
        size: Its length in bytes.

    Raises:
        OSError: If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: BinaryIO = path.open("a+b", buffering=0)
        self.size = os.fstat(self._handle.fileno()).st_size

    def append(self, data: bytes) -> None:
        """Write all of ``data``, or nothing.

        Raises:
            OSError: If it could not be written (a full disk); the file then ends where it ended before.
        """
        view = memoryview(data)
        try:
            while view:
                view = view[self._handle.write(view) :]
            self.size += len(data)
        except BaseException:  # Ctrl-C too: `size` says whether the data are there
            os.ftruncate(self._handle.fileno(), self.size)
            raise

    @property
    def is_in_place(self) -> bool:
        """Whether the path still leads to this file, and not to one that somebody put there instead."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._handle.fileno()))
        except OSError:
            return False

    def read(self) -> bytes:
        """Return everything in the file, wherever it has been moved meanwhile."""
        self._handle.seek(0)
        return self._handle.read()

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


def free_name(path: Path, word: str = "") -> Path:
    """Return the first name beside ``path`` that is not taken.

    Example:
        >>> free_name(Path("/nowhere/log.csv")).name, free_name(Path("/nowhere/log.csv"), "replaced").name
        ('log.1.csv', 'log.replaced.1.csv')
    """
    middle = f".{word}" if word else ""
    number = 1
    while (candidate := path.with_name(f"{path.stem}{middle}.{number}{path.suffix}")).exists():
        number += 1
    return candidate


def move_aside(path: Path) -> Path | None:
    """Give an existing file the first free name beside it, and return that; ``None`` if there is no file."""
    if not path.exists():
        return None
    aside = free_name(path)
    path.rename(aside)
    return aside


def replace_file(path: Path, *parts: bytes) -> None:
    """Write a file in one atomic step: at any moment either the old or the new one is there.

    Raises:
        OSError: If it could not be written; the old file is then untouched.
    """
    with replacing(path, overwrite=True) as handle:
        handle.writelines(parts)
