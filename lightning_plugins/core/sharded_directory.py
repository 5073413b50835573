"""Reads the directories of ``torch.distributed.checkpoint`` in one process, without a process group.

Such a directory has one index, ``.metadata``, and a few ``.distcp`` files in which small archives of ``torch.save``
lie end to end, one for each rank's part of each tensor. Lightning adds ``meta.pt`` with the rest of the checkpoint.
"""

from __future__ import annotations

import io
import itertools
import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from lightning_plugins.core.checkpoint_file import CheckpointError, TensorSpec, unreadable
from lightning_plugins.core.checkpoint_keys import SECOND_SETS_FOLDER
from lightning_plugins.core.files import open_regular
from lightning_plugins.core.mapped_files import MappedFiles
from lightning_plugins.core.safe_unpickler import unpickle
from lightning_plugins.core.stand_ins import Name, StandIn, StoredTensor, UnreadableError
from lightning_plugins.core.torch_file import Archive, load_bytes
from lightning_plugins.core.validation import shortened

_METADATA = "torch.distributed.checkpoint.metadata"
_INDEX_NAMES = {
    *(
        Name(_METADATA, name)
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
    ),
    Name("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(Name(module, "PosixPath") for module in ("pathlib", "pathlib._local")),
    *(Name(module, "WindowsPath") for module in ("pathlib", "pathlib._local")),
}
_MOST_CORNERS = 2_000_000  # that are looked at to see whether the parts of a tensor make up the whole


def is_sharded_checkpoint(path: Path) -> bool:
    """Return whether ``path`` is a directory of ``torch.distributed.checkpoint``, and not the folder inside of one.

    One that was cut off may have Lightning's ``meta.pt`` or files of its ranks without an index.
    """
    written = any((path / name).is_file() for name in (".metadata", "meta.pt")) or any(path.glob("*.distcp"))
    return written and path.name != SECOND_SETS_FOLDER


def read_index(path: Path) -> dict[str, Any]:
    """Return the fields of the index of a sharded directory, without making an object of any class that it names.

    Raises:
        CheckpointError: If it is damaged or names a foreign class.
    """
    try:
        with open_regular(path / ".metadata") as file:
            found = unpickle(file.read())
    except UnreadableError as error:
        raise CheckpointError(unreadable(path / ".metadata", error)) from error
    foreign = [".".join(name) for name in found.foreign if name not in _INDEX_NAMES]
    if foreign:
        why = f"it names {shortened(foreign[0])}, which no index of torch needs"
        raise CheckpointError(unreadable(path / ".metadata", why))
    fields = _fields(found.content, "Metadata")
    if fields is None or type(fields.get("storage_data")) is not dict:
        raise CheckpointError(f"{path} is not a checkpoint that torch.distributed.checkpoint wrote to files.")
    return fields


def _fields(value: Any, kind: str) -> dict[str, Any] | None:
    """Return the fields of what stands for a dataclass called ``kind``, ``None`` for anything else."""
    if type(value) is StandIn and value.name is not None and value.name.name == kind and type(value.state) is dict:
        return value.state
    return None


@dataclass(frozen=True)
class _Part:
    """A box of a tensor and the archive that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


class ShardedTensors:
    """The tensors of one state dict in a sharded directory; they are not read yet.

    Args:
        path: The directory.
        roots: Keys of the dictionary that was saved: what lies under one of them is looked at, the rest is not.

    Attributes:
        specs: Tensor name -> what it is, in the index's order.
        extras: Entries that are no tensors.

    Raises:
        CheckpointError: If its index is damaged, names a foreign class, or says what cannot be.
    """

    def __init__(self, path: Path, roots: Container[str]) -> None:
        self.path = path
        self.specs: dict[str, TensorSpec] = {}
        self.extras: dict[str, Any] = {}
        self._roots = roots
        self._parts: dict[str, list[_Part]] = {}
        self._mapped = MappedFiles()
        self._open: tuple[str | None, dict[int, Tensor]] = (None, {})
        self._whole: tuple[str | None, Tensor] = (None, torch.empty(0))
        index = read_index(path)
        try:
            self._take(index)
        except (CheckpointError, OSError):
            raise
        except UnreadableError as error:
            raise CheckpointError(unreadable(path, error)) from error
        except Exception as error:  # what was unpickled may lack anything
            raise CheckpointError(f"{path} cannot be read as a checkpoint: its index is damaged.") from error

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor, mapped if it lies in one part, else put together."""
        spec = self.specs[name]
        return self.flat(name, 0, spec.numel).view(spec.shape)

    def _take(self, index: dict[str, Any]) -> None:
        """Note what the index says, if it can be true."""
        places = dict(_places(index["storage_data"]))
        _check_files(self.path, list(places.values()))
        for key, entry in index["state_dict_metadata"].items():
            place = _place(key, index.get("planner_data"), self._roots)
            if place is None:
                continue
            fields = _fields(entry, "TensorStorageMetadata")
            if fields is not None:
                name = ".".join(place)
                if name in self.specs:
                    raise UnreadableError(f"its index has `{shortened(name)}` twice")
                spec = TensorSpec(_dtype(fields["properties"]), _numbers(fields["size"]))
                parts = [_part(key, chunk, places, spec) for chunk in fields["chunks"]]
                # tensor parallelism and FSDP2 together share rows out by turns
                parts.sort(key=lambda part: part.offsets)
                if not covers(spec.shape, [(part.offsets, part.sizes) for part in parts]):
                    raise UnreadableError(f"the parts of `{shortened(name)}` do not make up the whole")
                self.specs[name], self._parts[name] = spec, parts
            else:
                inner = self.extras
                # a dictionary in the state dict comes apart in an index
                for word in place[:-1]:
                    inner = inner.setdefault(word, {})
                inner[place[-1]] = self._load_extra(places[key, ()])

    def parts(self, name: str) -> list[tuple[int, int]]:
        """Return the flat ranges that its ranks wrote, in order; one range if its parts are not runs of rows."""
        ranges = sorted(_flat_range(part, self.specs[name].shape) for part in self._parts[name])
        ends = [0, *(stop for _, stop in ranges)]
        in_rows = all(start == end for (start, _), end in zip(ranges, ends, strict=False))
        return [found for found in ranges if found[0] < found[1]] if in_rows else [(0, self.specs[name].numel)]

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
        if self._open[0] != name:
            self._open = (name, {})
        opened = self._open[1]
        if number not in opened:
            part = self._parts[name][number]
            path = self.path / part.file
            try:
                with open_regular(path) as file:
                    archive = Archive(cast("IO[bytes]", _Slice(file, part.begin, part.length)))
                    archive.check_byte_order()
                    stored = _expected(archive.found.content, name, self.specs[name].dtype, part.sizes)
                    position = 0 if 0 in stored.shape else part.begin + archive.position(stored)
                opened[number] = self._mapped.tensor(path, position, stored).reshape(-1)
            except UnreadableError as error:
                raise CheckpointError(unreadable(path, error)) from error
        return opened[number]

    def _load_extra(self, place: _Place) -> Any:
        path = self.path / place.file
        with open_regular(path) as file:
            file.seek(place.begin)
            content = file.read(place.length)
        try:
            return load_bytes(content)
        except UnreadableError as error:
            raise CheckpointError(unreadable(path, error)) from error


def _expected(content: Any, name: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> StoredTensor:
    if type(content) is not StoredTensor or (content.dtype, content.shape) != (dtype, sizes):
        raise UnreadableError(f"the part of `{shortened(name)}` is not the tensor that the index names")
    return content


class _Place(NamedTuple):
    """Where the index says that an archive lies."""

    file: str
    begin: int
    length: int


def _places(storage_data: dict[Any, Any]) -> Iterator[tuple[tuple[str, tuple[int, ...]], _Place]]:
    """Yield the name and offsets of everything that is stored, and where."""
    for index, info in storage_data.items():
        key, place = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
        if key is None or place is None:
            raise UnreadableError("its index is damaged")
        if place.get("transform_descriptors"):
            raise UnreadableError("its files are transformed by an extension; load and save it with torch first")
        begin, length = _numbers((place["offset"], place["length"]))
        yield (
            (_text(key["fqn"]), _numbers(key.get("offset") or ())),
            _Place(_text(place["relative_path"]), begin, length),
        )


def _text(value: Any) -> str:
    if type(value) is not str:
        raise UnreadableError("its index is damaged")
    return value


def _numbers(values: Any) -> tuple[int, ...]:
    found = tuple(values)
    if not all(type(value) is int and 0 <= value < 2**63 for value in found):
        raise UnreadableError("its index holds impossible numbers")
    return found


def _dtype(properties: Any) -> torch.dtype:
    """Return the dtype in what stands for ``TensorProperties``, whose state is a tuple that begins with it."""
    dtype = properties.state[0]
    found = getattr(torch, dtype.name, None) if type(dtype) is Name and dtype.module == "torch" else None
    if not isinstance(found, torch.dtype):
        raise UnreadableError("its index has a tensor without a dtype")
    return found


def _place(key: Any, planner_data: Any, roots: Container[str]) -> tuple[str, ...] | None:
    """Return where an index's key lies below one of ``roots``, ``None`` if it belongs to something else."""
    place = planner_data.get(key) if type(planner_data) is dict else None
    if type(place) is not tuple or len(place) < 2 or not all(type(word) in (str, int) for word in place):
        place = _text(key).split(".", 1)
    return tuple(map(str, place[1:])) if place[0] in roots and len(place) > 1 else None


def _part(key: str, chunk: Any, places: Mapping[tuple[str, tuple[int, ...]], _Place], spec: TensorSpec) -> _Part:
    fields = _fields(chunk, "ChunkStorageMetadata")
    if fields is None:
        raise UnreadableError("its index is damaged")
    offsets, sizes = _numbers(fields["offsets"]), _numbers(fields["sizes"])
    place = places.get((key, offsets))
    if place is None:
        raise UnreadableError(f"its index has no place for `{shortened(key)}`")
    if math.prod(sizes) * spec.dtype.itemsize > place.length:
        raise UnreadableError(f"a part of `{shortened(key)}` is longer than what is stored of it")
    return _Part(offsets, sizes, *place)


def covers(shape: tuple[int, ...], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Return whether boxes lie inside a tensor, overlap nowhere and leave nothing out.

    Two sums of boxes are the same function if and only if their corners are the same, each counted with its sign (the
    mixed derivative of a box is +1 or -1 at its corners): so every box is looked at once, not every pair.

    Args:
        shape: The tensor's sizes.
        boxes: Offsets and sizes.

    Example:
        >>> covers((4, 2), [((0, 0), (3, 2)), ((3, 0), (1, 2))])
        True
        >>> covers((4, 2), [((0, 0), (3, 2)), ((2, 0), (1, 2))])
        False
    """
    if not all(_is_inside(shape, *box) for box in boxes):
        return False
    if 0 in shape:
        return True
    cut = [d for d, whole in enumerate(shape) if any(sizes[d] != whole for _, sizes in boxes)]
    if len(boxes) << min(len(cut), 64) > _MOST_CORNERS:
        raise UnreadableError("it is cut into more parts than can be checked")
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, group in ((1, boxes), (-1, [((0,) * len(shape), shape)])):
        for offsets, sizes in group:
            for ends in itertools.product((0, 1), repeat=len(cut)):
                corner = tuple(offsets[d] + end * sizes[d] for d, end in zip(cut, ends, strict=True))
                corners[corner] += sign * (-1) ** sum(ends)
    return not any(corners.values())


def _is_inside(shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    return len(offsets) == len(sizes) == len(shape) and all(
        0 <= at <= at + size <= whole for at, size, whole in zip(offsets, sizes, shape, strict=True)
    )


def _check_files(path: Path, places: Sequence[_Place]) -> None:
    """Raise if a file that the index names lies elsewhere, is missing or too short, or if two places overlap."""
    ends: dict[str, int] = {}
    for place in sorted(places):
        if place.begin < ends.get(place.file, 0):
            raise UnreadableError(f"two of its places in {shortened(place.file)} overlap")
        ends[place.file] = place.begin + place.length
    for name, end in ends.items():
        file = path / name
        if name != Path(name).name or "\0" in name or file.resolve().parent != path.resolve():
            raise UnreadableError(f"its index points outside, to {shortened(name)}")
        if not file.is_file():
            raise CheckpointError(f"{path} is incomplete: {name} does not exist.")
        if file.stat().st_size < end:
            raise UnreadableError(f"{shortened(name)} is cut off")


def _flat_range(part: _Part, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the flat range of a part of whole rows; a range that fits nothing for any other box."""
    if not shape:
        return (0, 1)
    row = math.prod(shape[1:])
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

    def read(self, size: int | None = None) -> bytes:
        left = max(0, self._length - self._at)
        size = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._begin + self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data
