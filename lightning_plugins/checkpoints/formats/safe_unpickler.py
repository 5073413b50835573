"""Looks into a file that ``torch.save`` wrote without running anything that it names.

A checkpoint is a zip archive with a pickle inside, and a pickle may call any function on the machine. Here every class
and function that it names is replaced by an empty stand-in, so that a step number can be read from a file whose
hyper-parameters nobody trusts yet. Tensors are not loaded: they become the place where their bytes lie.
"""

from __future__ import annotations

import io
import mmap
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_LEGACY_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}


class UnreadableError(Exception):
    """The bytes are no archive of ``torch.save``; the message says what is wrong with them."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its archive; nothing is read.

    Args:
        key: The archive's name of the storage.
        dtype: The element type.
        offset: Of the first element in the storage, in elements.
        shape: Sizes.
        stride: Strides, in elements.
    """

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Inert(dict[Any, Any]):
    """Stands for an object of a class that was not imported; takes whatever a pickle does to it and keeps nothing."""

    source = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Return itself, where a method or a class was called."""
        return self

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""

    def append(self, item: Any) -> None:
        """Ignore an element of what was a list."""

    def extend(self, items: Any) -> None:
        """Ignore elements of what was a list."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may have been a key of a dictionary


class _InertUnpickler(pickle._Unpickler):  # in Python: the one in C makes room for whatever number a pickle names
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name, (Inert,), {"source": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return pid  # ("storage", type, key, location, number of elements)


def _rebuild_v2(*arguments: Any) -> StoredTensor:
    storage, offset, shape, stride = arguments[:4]
    kind = storage[1].source.rpartition(".")[2]
    return _place(storage, _LEGACY_STORAGES.get(kind, torch.uint8), offset, shape, stride)


def _rebuild_v3(*arguments: Any) -> StoredTensor:
    storage, offset, shape, stride, _, _, dtype = arguments[:7]
    return _place(storage, dtype, offset, shape, stride)


def _place(storage: Any, dtype: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    numbers = (offset, *shape, *stride)
    if not isinstance(dtype, torch.dtype) or not all(type(number) is int for number in numbers):
        raise UnreadableError("it holds a tensor of impossible sizes")
    return StoredTensor(str(storage[2]), dtype, offset, tuple(shape), tuple(stride))


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): lambda *arguments: arguments[0],
}


class Archive:
    """An archive of ``torch.save``, opened for looking only.

    Args:
        file: The open file, or the part of one that holds the archive; positions count from its beginning.

    Attributes:
        content: What was saved, with a :class:`StoredTensor` for each tensor and an :class:`Inert` for each object
            that is not a plain value.

    Raises:
        UnreadableError: If it is none, or cut off.
    """

    def __init__(self, file: IO[bytes]) -> None:
        try:
            self._zip = zipfile.ZipFile(file)
            self._prefix = self._zip.infolist()[0].filename.partition("/")[0]
            self.content: Any = _InertUnpickler(io.BytesIO(self._stored("data.pkl"))).load()
        except Exception as error:  # a damaged pickle can raise anything; nothing of it has run
            raise UnreadableError(str(error) or type(error).__name__) from error

    def position(self, tensor: StoredTensor) -> int:
        """Return where the first byte of the tensor's storage lies in the file."""
        try:
            entry = self._zip.getinfo(f"{self._prefix}/data/{tensor.key}")
            with self._zip.open(entry):  # compares the entry's own header with the directory
                pass
        except Exception as error:  # damaged directories can raise anything
            raise UnreadableError(str(error) or type(error).__name__) from error
        assert self._zip.fp is not None  # noqa: S101  # for the type checker: it is open
        self._zip.fp.seek(entry.header_offset + 26)
        lengths = self._zip.fp.read(4)
        return entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")

    def scalar(self, tensor: StoredTensor) -> float:
        """Return the one number in ``tensor``."""
        try:
            start, width = tensor.offset * tensor.dtype.itemsize, tensor.dtype.itemsize
            number = bytearray(self._stored(f"data/{tensor.key}")[start : start + width])
            return float(torch.frombuffer(number, dtype=tensor.dtype))
        except Exception as error:  # as above
            raise UnreadableError(str(error) or type(error).__name__) from error

    def _stored(self, name: str) -> bytes:
        entry = self._zip.getinfo(f"{self._prefix}/{name}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UnreadableError(f"{name} is compressed, which torch never does")  # a few bytes can hide gigabytes
        return self._zip.read(entry)


def mapped(path: Path, position: int, tensor: StoredTensor, mappings: dict[Path, mmap.mmap]) -> Tensor:
    """Return ``tensor`` as a view of the file at ``path``, whose pages are read when its elements are.

    Args:
        path: The file.
        position: Of the tensor's storage in the file, in bytes.
        tensor: What lies there.
        mappings: The files mapped so far; ``path`` is added. Copy-on-write, because torch wants writable memory.

    Raises:
        UnreadableError: If the file ends before the tensor does.
    """
    if len(tensor.shape) != len(tensor.stride) or min((position, tensor.offset, *tensor.shape, *tensor.stride)) < 0:
        raise UnreadableError(f"{path.name} holds a tensor of impossible sizes")
    if 0 in tensor.shape:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    if path not in mappings:
        with path.open("rb") as file:
            mappings[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride, strict=True))
    start, width = position + tensor.offset * tensor.dtype.itemsize, tensor.dtype.itemsize
    if start + reach * width > len(mappings[path]):
        raise UnreadableError(f"{path.name} ends before its tensors do")
    flat = torch.frombuffer(mappings[path], dtype=torch.uint8, offset=start, count=reach * width)
    if start % width:
        flat = flat.clone()  # another type's view needs an aligned address
    return flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride)
