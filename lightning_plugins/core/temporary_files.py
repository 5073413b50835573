"""Hidden files that are being written, and what killed processes have left of such.

A writer holds a lock on its file, which the system takes away when the process ends, however it ends. A file without a
lock is therefore left over. Where locks do not reach (some network file systems tell other machines nothing of them),
the time of the last write decides.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import secrets
import stat
import time
import zlib
from pathlib import Path
from typing import Any

fcntl: Any
try:
    fcntl = importlib.import_module("fcntl")
except ImportError:  # pragma: no cover  # not on Windows; nothing is removed there
    fcntl = None

# bytes of a name that a temporary name repeats; most systems take 255 in all
_LONGEST_NAME = 200
_NAME = re.compile(r"\..+\.(?P<machine>[0-9a-f]{8})[0-9a-f]{16}\.tmp", re.DOTALL)
# seconds since the last write after which a file without a lock is left over: a writer locks its file at once
_OURS, _OF_ANOTHER_MACHINE = 10.0, 3600.0


def temporary_name(path: Path) -> Path:
    """Return a hidden name beside ``path`` that cannot be known before; it tells the machine that writes."""
    name = os.fsdecode(os.fsencode(path.name)[:_LONGEST_NAME])
    return path.with_name(f".{name}.{_machine()}{secrets.token_hex(8)}.tmp")


def hold(handle: int) -> None:
    """Lock a file that is being written, until it is closed or this process ends."""
    if fcntl is not None:
        # a file system may know no locks
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_abandoned(directory: Path) -> list[Path]:
    """Remove what killed processes have left in a directory; a file that is being written stays.

    Returns:
        The files that were removed.
    """
    if fcntl is None:  # pragma: no cover
        return []
    removed = []
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        found = [(entry, match) for entry in entries if (match := _NAME.fullmatch(entry.name))]
        for entry, match in found:
            grace = _OURS if match["machine"] == _machine() else _OF_ANOTHER_MACHINE
            with contextlib.suppress(OSError):
                if _remove_unless_held(Path(entry.path), grace):
                    removed.append(Path(entry.path))
    return removed


def _remove_unless_held(path: Path, grace: float) -> bool:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        found = os.fstat(handle)
        left = stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime >= grace
        if left:
            # raises where the writer lives
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # it may have been renamed meanwhile, and another one been put there
            left = os.path.samestat(found, path.lstat())
        if left:
            path.unlink()
        return left
    finally:
        os.close(handle)


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"
