"""The ``.safetensors`` format: a length, a JSON header, the tensors' bytes. Needs no package.

Specification: https://huggingface.co/docs/safetensors. A header is text, so that reading one runs nothing; the bytes
are in the header's order, so that a file can be written tensor by tensor. What the reference implementation refuses is
refused here: tensors that overlap or leave holes, names that come twice, anything behind the tensors.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from lightning_plugins.core.files import kind_of_file, open_regular
from lightning_plugins.core.stand_ins import StoredTensor, UnreadableError
from lightning_plugins.core.validation import shortened, shown

_CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
if hasattr(torch, "float8_e8m0fnu"):
    # torch from 2.7
    _CODES["F8_E8M0"] = torch.float8_e8m0fnu
_LARGEST_HEADER = 50_000_000
"""Half of what the reference implementation takes: enough for 400,000 tensors."""
_DIMENSIONS = 64
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class SafetensorsHeader:
    """What the header of a file says, checked.

    Args:
        metadata: Texts by name.
        tensors: Name -> where its elements lie, in the order of the bytes; the file is their one storage.
        starts: Name -> where its bytes begin in the file.
    """

    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]
    starts: dict[str, int]


def read_header(path: Path) -> SafetensorsHeader:
    """Return the header; a file that the reference implementation refuses is refused.

    Raises:
        UnreadableError: If it is no such file: damaged, cut off, or with tensors that overlap, leave holes, or end
            before the file does.
        OSError: If it cannot be opened.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(512)
        file.seek(8)
        length = int.from_bytes(start[:8], "little")
        text = file.read(length) if length <= _LARGEST_HEADER else b""
    if not text or len(text) != length:
        # where there is a header, it is shorter than its length
        kind = None if text else kind_of_file(start)
        raise UnreadableError(f"it is {kind or 'cut off, or no .safetensors file'}")
    try:
        return _checked(_parsed_header(text), 8 + length, size)
    except UnreadableError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise UnreadableError("its safetensors header is damaged") from error


def _parsed_header(text: bytes) -> dict[str, Any]:
    """Return the JSON object; what the reference's parser refuses and Python's takes is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise UnreadableError("its header has a name twice")
        return found

    def number(digits: str) -> int:
        if not digits.isdigit() or len(digits) > 19:
            raise UnreadableError("its header holds an impossible number")
        return int(digits)

    def refused(literal: str) -> Any:
        raise UnreadableError(f"its header holds {shortened(literal)}, where whole numbers and texts belong")

    if not text.startswith(b"{"):
        raise UnreadableError("its header does not begin with a brace")
    found: dict[str, Any] = json.loads(
        text.decode(), object_pairs_hook=unique, parse_int=number, parse_float=refused, parse_constant=refused
    )
    return found


def _checked(header: dict[str, Any], begin: int, size: int) -> SafetensorsHeader:
    metadata = header.pop("__metadata__", None)
    # the reference reads null as none
    metadata = {} if metadata is None else metadata
    if type(metadata) is not dict or not all(type(text) is str for text in metadata.values()):
        raise UnreadableError("its metadata are not texts")
    for text in (*header, *metadata, *metadata.values()):
        # an escaped half of a character is no text
        text.encode()
    entries = {name: _entry(name, entry) for name, entry in header.items()}
    end = 0
    tensors, starts = {}, {}
    for name, (tensor, start, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if start != end:
            raise UnreadableError(f"`{shortened(name)}` overlaps another tensor, or a hole lies before it")
        tensors[name], starts[name], end = tensor, begin + start, stop
    if begin + end != size:
        raise UnreadableError("it is cut off" if begin + end > size else "something lies behind its tensors")
    return SafetensorsHeader(metadata, tensors, starts)


def _entry(name: str, entry: Any) -> tuple[StoredTensor, int, int]:
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UnreadableError(f"`{shortened(name)}` must have a dtype, a shape and data_offsets")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    numbers = [*shape, *offsets] if type(shape) is list and type(offsets) is list else [None]
    if not all(type(value) is int and value <= _LARGEST for value in numbers) or len(offsets) != 2:
        raise UnreadableError(f"`{shortened(name)}` is of impossible sizes")
    if len(shape) > _DIMENSIONS or any(product > _LARGEST for product in accumulate(shape, operator.mul)):
        raise UnreadableError(f"`{shortened(name)}` is of impossible sizes")
    if type(dtype) is not str or dtype not in _CODES:
        raise UnreadableError(f"`{shortened(name)}` has the dtype {shown(dtype)}, which is not known")
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    tensor = StoredTensor(name, _CODES[dtype], 0, tuple(shape), tuple(strides))
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise UnreadableError(f"`{shortened(name)}` is of another size than its bytes")
    return tensor, offsets[0], offsets[1]


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class HasKind(Protocol):
    """What is known of a tensor before its bytes are there: a tensor itself, or a description."""

    @property
    def dtype(self) -> torch.dtype:
        """The element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""


class SafetensorsWriter:
    """Writes a ``.safetensors`` file tensor by tensor.

    Args:
        file: Open for writing in binary, at its beginning.
        kinds: All tensors, or what they are, in the order in which they will be added.
        metadata: Texts; the text of ``late`` is replaced when the tensors are written.
        late: A metadata key whose text is known at the end only, and its length.

    Raises:
        ValueError: If the format has no code for a dtype, or cannot hold a name.
    """

    def __init__(
        self,
        file: BinaryIO,
        kinds: Mapping[str, HasKind],
        metadata: Mapping[str, str],
        late: tuple[str, int] = ("", 0),
    ) -> None:
        codes = {dtype: code for code, dtype in _CODES.items()}
        header: dict[str, Any] = {"__metadata__": {**metadata, **({late[0]: "#" * late[1]} if late[1] else {})}}
        position = 0
        for name, kind in kinds.items():
            if kind.dtype not in codes:
                raise ValueError(f"`{name}` is {kind.dtype}, which .safetensors cannot hold; write a .ckpt instead.")
            if name == "__metadata__" or not _encodes(name):
                raise ValueError(f"{shown(name)} is no name that .safetensors can hold; write a .ckpt instead.")
            begin, position = position, position + math.prod(kind.shape) * kind.dtype.itemsize
            header[name] = {"dtype": codes[kind.dtype], "shape": list(kind.shape), "data_offsets": [begin, position]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin on a multiple of eight, as the format asks
        self._file = file
        self._late = (8 + text.index(b"#" * late[1]), late[1])
        file.write(len(text).to_bytes(8, "little") + text)

    def add(self, content: memoryview) -> None:
        """Write the bytes of the next tensor."""
        self._file.write(content)

    def finish(self, late: str) -> None:
        """Put the late text in its place."""
        position, length = self._late
        assert len(late) == length  # noqa: S101  # a digest has one length
        self._file.seek(position)
        self._file.write(late.encode())


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole ``.safetensors`` file; names that share a tensor get a copy each, since the format has no ties.

    Raises:
        ValueError: As :class:`SafetensorsWriter`.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
            raise ValueError(
                f"`{shortened(name)}` is no dense tensor, which .safetensors cannot hold; write a .pt instead."
            )
    writer = SafetensorsWriter(file, tensors, metadata)
    for tensor in tensors.values():
        writer.add(bytes_of(tensor.detach().cpu().contiguous()))


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
