"""A file that only grows, by whole records, and survives a full disk.

Knows neither CSV nor TensorBoard, and no Trainer.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO


class AppendOnlyFile:
    """A local file to which whole records are appended.

    Args:
        path: Where; the file is made if it is not there. Its directory must exist.
        new: Whether a file that is there is an error.

    Attributes:
        size: Its length in bytes.

    Raises:
        OSError: If it cannot be opened, or is a device, a pipe or a link to a file that does not exist.
    """

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self.path = path
        self._handle: BinaryIO = os.fdopen(_made(path) if new else _opened(path), "r+b", buffering=0)
        self.size = os.fstat(self._handle.fileno()).st_size

    def append(self, records: Sequence[bytes]) -> None:
        """Write records; of those for which there is no room, none in part.

        Raises:
            OSError: If not all could be written (a full disk). The file then ends with the last whole record that
                could: ``size`` says how many bytes that is. After Ctrl-C too.
        """
        view = memoryview(b"".join(records))
        before, written = self.size, 0
        try:
            while written < len(view):
                written += self._handle.write(view[written:])
            self.size = before + written
        except BaseException:
            self.size = before + max((end for end in accumulate(map(len, records)) if end <= written), default=0)
            os.ftruncate(self._handle.fileno(), self.size)
            raise

    @property
    def is_in_place(self) -> bool:
        """Whether the path still leads to this file, and not to another one that was put there."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._handle.fileno()))
        except OSError:
            return False

    @property
    def is_deleted(self) -> bool:
        """Whether no path leads to this file any more, so that what is written to it is lost."""
        return os.fstat(self._handle.fileno()).st_nlink == 0

    def read(self) -> bytes:
        """Return everything in the file, wherever it has been moved meanwhile."""
        self._handle.seek(0)
        return self._handle.read()

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


_FLAGS = os.O_RDWR | os.O_APPEND | os.O_NONBLOCK


def _made(path: Path) -> int:
    """Make a file for reading and appending. O_EXCL follows no link to nothing."""
    return os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666)


def _opened(path: Path) -> int:
    """Open a regular file for reading and appending; make it if there is none."""
    try:
        handle = os.open(path, _FLAGS)
    except FileNotFoundError:
        return _made(path)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path} is a device or a pipe, not a file")
    return handle
