"""Reads the directories of ``torch.distributed.checkpoint`` in one process, without a process group.

Such a directory has one index, ``.metadata``, and a few ``.distcp`` files in which small archives of ``torch.save``
lie end to end, one for each rank's part of each tensor. Lightning adds ``meta.pt`` with the rest of the checkpoint.
"""

from __future__ import annotations

import io
import mmap
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lightning_plugins.checkpoints.formats.base import (
    STATE_DICT_KEYS,
    Checkpoint,
    CheckpointError,
    TensorSpec,
    unreadable,
)
from lightning_plugins.checkpoints.formats.safe_unpickler import Archive, StoredTensor, UnreadableError, mapped
from lightning_plugins.checkpoints.formats.torch_reader import load_pickled

_INDEX_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib", "WindowsPath"),
}


class _IndexUnpickler(pickle._Unpickler):
    """Loads an index, and refuses the classes that no index has: it is a plain pickle, which could run anything.

    The unpickler in Python, because the one in C makes room for whatever number a pickle names.
    """

    def find_class(self, module: str, name: str) -> Any:
        allowed = (module, name) in _INDEX_CLASSES
        if allowed or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of torch needs")


def read_index(path: Path) -> Metadata:
    """Return the index of a sharded directory.

    Raises:
        CheckpointError: If it is damaged or names a foreign class.
    """
    try:
        index = _IndexUnpickler(io.BytesIO((path / ".metadata").read_bytes())).load()
    except OSError:
        raise
    except Exception as error:  # damaged bytes can raise anything; only the classes above were called
        raise CheckpointError(unreadable(path / ".metadata", error)) from error
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise CheckpointError(f"{path} is not a checkpoint that torch.distributed.checkpoint wrote to files.")
    return index


def is_sharded(path: Path) -> bool:
    """Return whether ``path`` is a directory of ``torch.distributed.checkpoint``."""
    return (path / ".metadata").is_file()


@dataclass(frozen=True)
class _Part:
    """A box of a tensor and the archive that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


class ShardedDirectory(Checkpoint):
    """A sharded checkpoint of Lightning's FSDP or ModelParallel strategy.

    Args:
        path: The directory.
        trust: Load whatever ``meta.pt`` names, which runs code that the file chooses.
    """

    def __init__(self, path: Path, *, trust: bool = False) -> None:
        super().__init__(path)
        index = read_index(path)
        self._parts: dict[str, list[_Part]] = {}
        self._mappings: dict[Path, mmap.mmap] = {}
        self._open: dict[tuple[str, int], Tensor] = {}
        self._whole: tuple[str, Tensor] = ("", torch.empty(0))
        try:
            self._take(index)
        except (CheckpointError, OSError):
            raise
        except Exception as error:  # what was unpickled may lack anything
            raise CheckpointError(f"{path} cannot be read as a checkpoint: its index is damaged.") from error
        if not self.specs:
            raise CheckpointError(
                f"{path} holds no weights: nothing under {' or '.join(STATE_DICT_KEYS)} in its index."
            )
        if (path / "meta.pt").is_file():
            header = load_pickled(path / "meta.pt", trust=trust)
            if not isinstance(header, Mapping):
                raise CheckpointError(f"{path / 'meta.pt'} holds a {type(header).__name__}, not a checkpoint's rest.")
            self.header = dict(header)

    def _take(self, index: Metadata) -> None:
        """Note what the index says, if it can be true."""
        places = {(place.fqn, tuple(place.offset or ())): info for place, info in index.storage_data.items()}
        _check_files(self.path, places.values())
        for key, entry in index.state_dict_metadata.items():
            place = _place(key, index.planner_data)
            if place is None:
                continue
            if isinstance(entry, TensorStorageMetadata):
                name = ".".join(place)
                self.specs[name] = TensorSpec(entry.properties.dtype, tuple(entry.size))
                self._parts[name] = [_part(key, chunk, places, self.path) for chunk in entry.chunks]
                if sum(torch.Size(part.sizes).numel() for part in self._parts[name]) != self.specs[name].numel:
                    raise CheckpointError(f"{self.path} cannot be read as a checkpoint: `{name}` is not whole.")
            else:
                inner = self.extras
                for word in place[:-1]:  # a dictionary in the state dict comes apart in an index
                    inner = inner.setdefault(word, {})
                inner[place[-1]] = self._load_extra(key, places)

    def parts(self, name: str) -> list[tuple[int, int]]:
        """Return the flat ranges that its ranks wrote, in order; one range if its parts are not runs of rows."""
        numel = self.specs[name].numel
        ranges = sorted(_flat_range(part, self.specs[name].shape) for part in self._parts[name])
        ends = [0, *(stop for _, stop in ranges)]
        in_rows = all(start == end for (start, _), end in zip(ranges, ends, strict=False)) and ends[-1] == numel
        return [found for found in ranges if found[0] < found[1]] if in_rows else [(0, numel)]

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Return a range of the flattened tensor: mapped if it lies in one part of whole rows, else put together."""
        if len(self.parts(name)) == 1 and len(self._parts[name]) > 1:
            return self._assembled(name)[start:stop]
        pieces = [
            part[max(start, begin) - begin : stop - begin]
            for begin, end, part in self._row_parts(name)
            if begin < stop and start < end
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else self._assembled(name)[:0]

    def _row_parts(self, name: str) -> Iterator[tuple[int, int, Tensor]]:
        shape = self.specs[name].shape
        for number, part in enumerate(self._parts[name]):
            begin, end = _flat_range(part, shape)
            yield begin, end, self._tensor(name, number)

    def _assembled(self, name: str) -> Tensor:
        if self._whole[0] != name:
            spec = self.specs[name]
            whole = torch.empty(spec.shape, dtype=spec.dtype)
            for number, part in enumerate(self._parts[name]):
                box = tuple(slice(at, at + size) for at, size in zip(part.offsets, part.sizes, strict=True))
                whole[box] = self._tensor(name, number).view(part.sizes)
            self._whole = (name, whole.view(-1))
        return self._whole[1]

    def _tensor(self, name: str, number: int) -> Tensor:
        """Return one part, flattened; opened parts of the current tensor are kept."""
        if (name, number) not in self._open:
            if any(key[0] != name for key in self._open):
                self._open.clear()
            part = self._parts[name][number]
            path = self.path / part.file
            try:
                with path.open("rb") as file:
                    archive = Archive(cast("IO[bytes]", _Slice(file, part.begin, part.length)))
                    stored = _expected(archive.content, name, part.sizes)
                    position = 0 if 0 in stored.shape else part.begin + archive.position(stored)
                self._open[name, number] = mapped(path, position, stored, self._mappings).reshape(-1)
            except UnreadableError as error:
                raise CheckpointError(unreadable(path, error)) from error
        return self._open[name, number]

    def _load_extra(self, key: str, places: dict[tuple[str, tuple[int, ...]], Any]) -> Any:
        info = places[key, ()]
        with (self.path / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            content = io.BytesIO(file.read(info.length))
        try:
            return torch.load(content, weights_only=True)
        except Exception as error:  # damaged bytes can raise anything
            raise CheckpointError(unreadable(self.path / info.relative_path, error)) from error


def _expected(content: Any, name: str, sizes: tuple[int, ...]) -> StoredTensor:
    if not isinstance(content, StoredTensor) or content.shape != sizes:
        raise UnreadableError(f"the part of `{name}` is not the tensor that the index names")
    return content


def _place(key: str, planner_data: Any) -> tuple[str, ...] | None:
    """Return where an index's key lies in the state dict, ``None`` if it belongs to something else."""
    place = planner_data.get(key) if isinstance(planner_data, dict) else None
    if not isinstance(place, tuple) or len(place) < 2:
        place = key.split(".", 1)
    return tuple(map(str, place[1:])) if place[0] in STATE_DICT_KEYS and len(place) > 1 else None


def _part(key: str, chunk: Any, places: dict[tuple[str, tuple[int, ...]], Any], path: Path) -> _Part:
    info = places.get((key, tuple(chunk.offsets)))
    if info is None:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: its index has no place for `{key}`.")
    return _Part(tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length)


def _check_files(path: Path, places: Iterable[Any]) -> None:
    """Raise if a file that the index names lies elsewhere, is missing, or is too short."""
    ends: dict[str, int] = {}
    for info in places:
        if info.offset < 0 or info.length < 0:
            raise CheckpointError(f"{path} cannot be read as a checkpoint: its index is damaged.")
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        file = path / name
        if file.resolve().parent != path.resolve():
            raise CheckpointError(f"{path} cannot be read as a checkpoint: its index points outside, to {name}.")
        if not file.is_file():
            raise CheckpointError(f"{path} is incomplete: {name} does not exist.")
        if file.stat().st_size < end:
            raise CheckpointError(f"{path} cannot be read as a checkpoint: {name} is cut off.")


def _flat_range(part: _Part, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the flat range of a part of whole rows; a range that fits nothing for any other box."""
    if not shape:
        return (0, 1)
    row = torch.Size(shape[1:]).numel()
    if part.sizes[1:] != shape[1:]:
        return (-1, -1)
    return part.offsets[0] * row, (part.offsets[0] + part.sizes[0]) * row


class _Slice(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: BinaryIO, begin: int, length: int) -> None:
        super().__init__()
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        size = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._begin + self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data
