"""Which checkpoints a run has written itself: an allow-list by name and digest.

Only these are averaged, and only these may run what their pickle names. A directory can hold files of other runs, files
that were copied there, and files of a future that a run lost when it was resumed from before. Knows files and numbers.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lightning_plugins.checkpoints.formats import open_checkpoint
from lightning_plugins.checkpoints.formats.base import Checkpoint
from lightning_plugins.checkpoints.record import Record, read_record
from lightning_plugins.core.checkpoint_file import CheckpointError
from lightning_plugins.core.files import open_regular
from lightning_plugins.core.validation import a_path, plain_text, shown

_MOST_FILES = 10_000
_BLOCK = 1 << 20


@dataclass
class WrittenFile:
    """One file that the run wrote.

    Args:
        digest: See :func:`digest`; ``None`` as long as the file does not exist, as while it is written in the
            background.
        keeper: The state key of the ModelCheckpoint that keeps it, ``""`` for files of our own and others.
    """

    digest: str | None
    keeper: str = ""


class RunFiles:
    """The files that a run is known to have written."""

    def __init__(self) -> None:
        self._files: dict[Path, WrittenFile] = {}

    def add(self, *paths: Path, keeper: str = "") -> None:
        """Note that the run has just written ``paths``."""
        self._files.update({path: WrittenFile(_digest_or_none(path), keeper) for path in paths})

    def clear(self) -> None:
        """Forget all of them: a run begins."""
        self._files.clear()

    def keeper(self, path: Path) -> str | None:
        """Return who keeps a file, ``None`` if the run did not write it."""
        found = self._files.get(path)
        return None if found is None else found.keeper

    def __contains__(self, path: Path) -> bool:
        """Return whether ``path`` is a file that the run wrote, unchanged since."""
        found = self._files.get(path)
        if found is None:
            return False
        now = _digest_or_none(path)
        if found.digest is None:
            found.digest = now
        return now is not None and now == found.digest

    def moved(self, before: Path, after: Path) -> None:
        """Look for files that are gone from below ``before`` at the same place below ``after``, as in a moved run."""
        for path in list(self._files):
            if before in path.parents and not path.exists():
                self._files.setdefault(after / path.relative_to(before), self._files[path])

    def __iter__(self) -> Iterator[Path]:
        return iter(list(self._files))

    def open(self, path: Path) -> Checkpoint:
        """Open one of these files: as plain data first, and with trust only if that does not do.

        Raises:
            CheckpointError: If it cannot be read, or is none of these files.
        """
        try:
            return open_checkpoint(path, trust=False)
        except CheckpointError:
            if path not in self:
                raise
            return open_checkpoint(path, trust=True)

    def plain(self) -> dict[str, Any]:
        """Return those that exist as plain values, for a checkpoint: path -> digest and keeper."""
        for path, found in list(self._files.items()):
            if found.digest is None:
                # by now it may have been written in the background
                found.digest = _digest_or_none(path)
            elif not path.exists():
                del self._files[path]
        latest = list(self._files.items())[-_MOST_FILES:]
        return {str(path): [found.digest, found.keeper] for path, found in latest if found.digest}

    def load(self, plain: Any) -> None:
        """Take over what :meth:`plain` returned.

        Raises:
            TypeError: If it is nothing of the kind.
            ValueError: If a path or digest is not possible.
        """
        if not isinstance(plain, Mapping) or len(plain) > _MOST_FILES:
            raise TypeError(f"`files` must be a mapping from paths to digests, got {shown(plain)}.")
        self._files = {Path(a_path("files", path)): _checked(entry) for path, entry in plain.items()}


def _checked(entry: Any) -> WrittenFile:
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        raise TypeError(f"`files` must hold a digest and a state key for each path, got {shown(entry)}.")
    found, keeper = (plain_text("files", text) for text in entry)
    if len(found) != 64 or not set(found) <= set("0123456789abcdef"):
        raise ValueError(f"`files` must hold digests of 64 hexadecimal digits, got {shown(found)}.")
    return WrittenFile(found, keeper)


def readable_records(paths: list[Path]) -> tuple[list[Record], list[Path]]:
    """Return what checkpoints say of themselves, averages left out, and the paths that cannot be read."""
    records, damaged = [], []
    for path in paths:
        try:
            record = read_record(path)
        except (CheckpointError, OSError):
            damaged.append(path)
            continue
        if record.manifest is None:
            records.append(record)
    return records, damaged


def keeper_in(path: Path) -> str:
    """Return the state key of the ModelCheckpoint that wrote a file, as the file says; ``""`` if it does not."""
    found, _ = readable_records([path])
    return found[0].keeper if found else ""


def remove(path: Path) -> None:
    """Delete a checkpoint, file or sharded directory."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """Return a digest of what decides what a checkpoint's loading does: its pickles and its table of contents.

    Numbers lie beside the pickle in the archive, and cannot run anything; the table of contents holds their sizes and
    checksums. So the digest of a large file takes no longer than that of a small one. It covers the raw bytes, not what
    one reader of archives makes of them, so that two files of one digest are the same to every reader. A file that is
    no archive is read as a whole.

    Raises:
        OSError: If it cannot be read.
    """
    found = hashlib.sha256()
    if not path.is_dir():
        _add_file(found, path)
        return found.hexdigest()
    for name in (".metadata", "meta.pt"):
        found.update(name.encode())
        if (path / name).exists():
            _add_file(found, path / name)
    return found.hexdigest()


def _add_file(found: Any, path: Path) -> None:
    size = path.stat().st_size
    found.update(f"{size}:".encode())
    with open_regular(path) as file:
        for start, stop in _deciding_ranges(file, size):
            file.seek(start)
            left = stop - start
            while left > 0 and (block := file.read(min(left, _BLOCK))):
                found.update(block)
                left -= len(block)


def _deciding_ranges(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Return where in an archive the pickles and the table of contents lie; the whole of any other file.

    A range may end behind the end of the file.
    """
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return [(0, size)]
    pickles = [entry for entry in archive.infolist() if entry.filename.endswith(".pkl")]
    # before the content stands a header with a name and an extra field of at most 65535 bytes each
    header = 30 + 2 * 65535
    ranges = [(entry.header_offset, entry.header_offset + header + entry.compress_size) for entry in pickles]
    return [*ranges, (archive.start_dir, size)]


def _digest_or_none(path: Path) -> str | None:
    try:
        return digest(path)
    except OSError:
        return None
