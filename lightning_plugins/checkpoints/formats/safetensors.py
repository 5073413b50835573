"""The ``.safetensors`` format: a length, a JSON header, the tensors' bytes. Needs no package.

Specification: https://huggingface.co/docs/safetensors. A header is text, so that reading one runs nothing; the bytes
are in the header's order, so that a file can be written tensor by tensor.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_plugins.checkpoints.formats.base import Checkpoint, CheckpointError, TensorSpec
from lightning_plugins.checkpoints.formats.safe_unpickler import StoredTensor, mapped
from lightning_plugins.core.validation import shortened, shown, whole_number

_CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
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
_LARGEST_HEADER = 100_000_000  # the reference implementation's own limit


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON header and where the tensors' bytes begin.

    Raises:
        CheckpointError: If it is no such file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= _LARGEST_HEADER else b""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(_damaged(path)) from error
    if len(text) < length or not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise CheckpointError(_damaged(path))
    return header, 8 + length


def _damaged(path: Path) -> str:
    return f"{path} cannot be read as a checkpoint: its safetensors header is damaged."


class SafetensorsFile(Checkpoint):
    """A ``.safetensors`` file; its metadata are the header, with ``global_step`` and ``epoch`` as numbers."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        entries, self._begin = read_header(path)
        self.header = parse_metadata(entries.pop("__metadata__", {}))
        self._mappings: dict[Path, mmap.mmap] = {}
        self._starts: dict[str, int] = {}
        self._flat: tuple[str, Tensor] = ("", torch.empty(0))
        size = path.stat().st_size
        for name, entry in sorted(entries.items(), key=lambda item: _offsets(item[1], path)):
            start, stop = _offsets(entry, path)
            if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in _CODES:
                what = shown(entry.get("dtype"))
                raise CheckpointError(f"`{shortened(name)}` in {path} has the dtype {what}, which is not known.")
            spec = TensorSpec(_CODES[entry["dtype"]], _shape(entry, path))
            if spec.nbytes != stop - start or self._begin + stop > size:
                raise CheckpointError(f"{path} cannot be read as a checkpoint: `{shortened(name)}` is cut off.")
            self.specs[name], self._starts[name] = spec, start

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Return a mapped range of the flattened tensor."""
        if self._flat[0] != name:
            spec = self.specs[name]
            stored = StoredTensor(name, spec.dtype, 0, (spec.numel,), (1,))
            position = self._begin + self._starts[name]
            self._flat = (name, mapped(self.path, position, stored, self._mappings))
        return self._flat[1][start:stop]


def _offsets(entry: Any, path: Path) -> tuple[int, int]:
    try:
        start, stop = entry["data_offsets"]
        return whole_number("data_offsets", start), whole_number("data_offsets", stop, at_least=start)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(_damaged(path)) from error


def _shape(entry: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    try:
        return tuple(whole_number("shape", size) for size in entry["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(_damaged(path)) from error


def parse_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return safetensors metadata, which are texts, with those that are JSON parsed."""
    return {key: _parsed(text) for key, text in metadata.items()}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return text


class SafetensorsWriter:
    """Writes a ``.safetensors`` file tensor by tensor.

    Args:
        file: Open for writing in binary, at its beginning.
        specs: All tensors, in the order in which they will be added.
        metadata: Texts; the text of ``late`` is replaced when the tensors are written.
        late: A metadata key whose text is known at the end only, and its length.

    Raises:
        CheckpointError: If the format has no code for a dtype.
    """

    def __init__(
        self, file: BinaryIO, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], late: tuple[str, int]
    ) -> None:
        codes = {dtype: code for code, dtype in _CODES.items()}
        header: dict[str, Any] = {"__metadata__": {**metadata, late[0]: "#" * late[1]}}
        position = 0
        for name, spec in specs.items():
            if spec.dtype not in codes:
                raise CheckpointError(
                    f"`{name}` is {spec.dtype}, which .safetensors cannot hold; write a .ckpt instead."
                )
            header[name] = {
                "dtype": codes[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [position, position + spec.nbytes],
            }
            position += spec.nbytes
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
