"""Loads what ``torch.save`` wrote; unless the file is trusted, nothing that it names is run.

The one answer for every reader of the package. A file is first read by :mod:`~lightning_plugins.core.safe_unpickler`,
which says what it holds and whether it claims more than is stored; then torch loads it, with ``weights_only=True``.
"""

from __future__ import annotations

import io
import mmap
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch

from lightning_plugins.core.files import kind_of_file, open_regular
from lightning_plugins.core.safe_unpickler import Unpickled, unpickle
from lightning_plugins.core.stand_ins import StandIn, StoredTensor, UnreadableError
from lightning_plugins.core.validation import first_line, shortened

_ENTRIES = 1_000_000  # files in an archive
_SHARED = 64  # names that may share one tensor's bytes, on average
_SMALL = 1 << 24  # bytes that a file may promise in any case: expanded buffers take no place
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class NeedsTrustError(UnreadableError):
    """A file that holds more than tensors and plain values.

    Args:
        names: The classes and functions that it names.
    """

    def __init__(self, names: list[str]) -> None:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        super().__init__(f"it names {', '.join(shortened(name) for name in names[:10])}{more}")


def load(path: Path, *, trust: bool) -> Any:
    """Return what ``torch.save`` wrote to ``path``, its tensors mapped into memory where the format allows it.

    Args:
        path: The file.
        trust: Load whatever the file names all the same, which runs code that it chooses.

    Raises:
        OSError: If the file cannot be opened or is a device or a pipe.
        UnreadableError: If it is damaged or claims more than it holds; a :class:`NeedsTrustError` if it holds more
            than tensors and plain values. The message is the reason alone, on one line.
    """
    with open_regular(path) as file:
        zipped = is_archive(file)
        if not trust:
            _check_names(Archive(file).found if zipped else read_legacy(file))
    # files of torch before 1.6 are no archives and cannot be mapped
    return _load(path, weights_only=not trust, mmap=zipped)


def load_bytes(content: bytes) -> Any:
    """Return what ``torch.save`` wrote, as :func:`load` does, from memory and never trusted."""
    _check_names(Archive(io.BytesIO(content)).found)
    return _load(io.BytesIO(content), weights_only=True)


def _load(source: Any, **options: Any) -> Any:
    try:
        with warnings.catch_warnings():
            # torch's remarks on how the file was written
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", **options)
    except Exception as error:  # damaged bytes can raise anything, and so does code that is trusted
        raise UnreadableError(reason(error)) from error


def reason(error: object) -> str:
    """Return the first line of what an error says; torch's advice, which is to load the file unsafely, is left out."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    if found or "weights_only" not in str(error):
        return first_line(found[1] if found else error)
    return f"torch cannot load it ({type(error).__name__})"


def is_archive(file: IO[bytes]) -> bool:
    """Return whether a file is an archive.

    Raises:
        UnreadableError: If it is evidently of another kind than files of ``torch.save``.
    """
    start = file.read(512)
    file.seek(0)
    if start.startswith(b"PK\x03\x04"):
        return True
    other = kind_of_file(start)
    if other is not None:
        raise UnreadableError(f"it is {other}")
    return False


class Archive:
    """An archive of ``torch.save``, opened for looking only.

    Only archives that torch itself could have written are read: other readers of zip files, torch's own among them,
    then see the same bytes under the same names.

    Args:
        file: The open file, or the part of one that holds the archive; positions count from its beginning.

    Attributes:
        found: What its pickle holds.

    Raises:
        UnreadableError: If it is none, is cut off, or claims more than it holds.
    """

    def __init__(self, file: IO[bytes]) -> None:
        try:
            size = _check_directory(file)
            self._zip = zipfile.ZipFile(file)
            self._entries = self._checked_entries(size)
            self.found: Unpickled = unpickle(self._zip.read(self._entry("data.pkl")))
            order = self._entries.get(f"{self._folder}/byteorder")
            self._byte_order = sys.byteorder.encode() if order is None else self._zip.read(order)
        except UnreadableError:
            raise
        except Exception as error:  # damaged bytes can raise anything; nothing of them has run
            raise UnreadableError(reason(error)) from error
        for storage in self.found.storages.values():
            if self._entry(f"data/{storage.key}").file_size < storage.nbytes:
                raise UnreadableError("it is cut off: a tensor is longer than what is stored of it")
        _check_promises(self.found.content, size)

    def _checked_entries(self, size: int) -> dict[str, zipfile.ZipInfo]:
        infos = self._zip.infolist()
        names = {info.orig_filename: info for info in infos}
        self._folder = infos[0].orig_filename.partition("/")[0]
        if f"{self._folder}/constants.pkl" in names:
            raise UnreadableError("it is a TorchScript archive, not a checkpoint")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
                name = info.orig_filename[-40:]
                raise UnreadableError(f"{name} is compressed or encrypted, which torch never does")
        if len(names) < len(infos) or not all(name.isascii() and name.isprintable() for name in names):
            raise UnreadableError("it holds one name twice, or odd names")
        if sum(info.file_size for info in infos) > size:
            raise UnreadableError("its parts overlap")
        return names

    def _entry(self, name: str) -> zipfile.ZipInfo:
        found = self._entries.get(f"{self._folder}/{name}")
        if found is None:
            raise UnreadableError(f"it is not whole: {name[:40]} is missing")
        return found

    def position(self, tensor: StoredTensor) -> int:
        """Return where the first byte of the tensor's storage lies in the file."""
        try:
            entry = self._entry(f"data/{tensor.key}")
            # compares the entry's own header with the directory
            self._zip.open(entry).close()
            file = self._zip.fp
            assert file is not None  # noqa: S101  # for the type checker: it is open
            file.seek(entry.header_offset + 26)
            lengths = struct.unpack("<HH", file.read(4))
        except UnreadableError:
            raise
        except Exception as error:  # as above
            raise UnreadableError(reason(error)) from error
        return int(entry.header_offset + 30 + sum(lengths))

    def scalar(self, tensor: StoredTensor) -> float:
        """Return the one number in ``tensor``."""
        try:
            start, width = tensor.offset * tensor.dtype.itemsize, tensor.dtype.itemsize
            content = self._zip.read(self._entry(f"data/{tensor.key}"))[start : start + width]
            return float(torch.frombuffer(bytearray(content), dtype=tensor.dtype))
        except UnreadableError:
            raise
        except Exception as error:  # as above
            raise UnreadableError(reason(error)) from error

    def check_byte_order(self) -> None:
        """Raise unless the tensors' bytes are in this machine's order."""
        if self._byte_order != sys.byteorder.encode():
            raise UnreadableError("it was written on a machine with another order of bytes")


def _check_directory(file: IO[bytes]) -> int:
    """Raise unless a zip file ends as torch's do: one directory, right before the end, no comment; return its size."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - 42, 0))
    tail = file.read(42)
    if tail[-22:-18] != b"PK\x05\x06":
        raise UnreadableError("it is cut off")
    disks, here, entries, length, offset, comment = struct.unpack("<4xL2H2LH", tail[-22:])
    end = size - 22
    if tail.startswith(b"PK\x06\x07"):
        (end,) = struct.unpack("<8xQ4x", tail[:20])
        file.seek(min(end, size))
        record = file.read(56)
        if end != size - 98 or not record.startswith(b"PK\x06\x06"):
            raise UnreadableError("its directory is damaged")
        disks, here, entries, length, offset = struct.unpack("<16xQ4Q", record)
    if disks or here != entries or comment or offset + length != end or not 0 < entries <= _ENTRIES:
        raise UnreadableError("its directory is damaged")
    return size


def read_legacy(file: IO[bytes]) -> Unpickled:
    """Return what a file holds that torch before 1.6 wrote: five pickles, then the storages.

    Raises:
        UnreadableError: If it is none, is cut off, or claims more than it holds.
    """
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        # a mapping reads what there is; a file would make room for any length that a pickle names
        content = cast("IO[bytes]", mapped)
        if unpickle(content).content != _LEGACY_MAGIC:
            raise UnreadableError("it is no file of torch.save")
        for _ in range(2):
            unpickle(content)
        found = unpickle(content)
        keys = unpickle(content).content
        if type(keys) is not list or not all(type(key) is str and key in found.storages for key in keys):
            raise UnreadableError("its list of storages is damaged")
        left = len(mapped) - content.tell()
        if sum(storage.nbytes for storage in found.storages.values()) > left or len(set(keys)) < len(found.storages):
            raise UnreadableError("it is cut off: a tensor is longer than what is stored of it")
        _check_promises(found.content, len(mapped))
    return found


def _check_names(found: Unpickled) -> None:
    """Raise if a pickle names what plain checkpoints do without and the user has not allowed in torch either."""
    allowed = set()
    for entry in torch.serialization.get_safe_globals():
        made, name = entry if isinstance(entry, tuple) else (entry, None)
        allowed.add(name or f"{made.__module__}.{made.__qualname__}")
    names = sorted({".".join(name) for name in found.foreign} - allowed)
    if names:
        raise NeedsTrustError(names)


def _check_promises(content: Any, stored: int) -> None:
    """Raise if the tensors have far more elements than a file of so many bytes can hold: some share their bytes."""
    promised = sum(tensor.nbytes for tensor in _tensors(content))
    if promised > _SHARED * stored + _SMALL:
        raise UnreadableError(f"its tensors take {promised} bytes, and the file has {stored}: they overlap")


def _tensors(content: Any) -> Iterator[StoredTensor]:
    """Yield the tensors in nested containers, each as often as it is referred to; a container is entered once."""
    left, seen = [content], set()
    while left:
        value = left.pop()
        if type(value) is StoredTensor:
            yield value
        elif isinstance(value, (dict, list, tuple, set, frozenset)) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)
            if type(value) is StandIn:
                left.extend((value.arguments, value.state))
