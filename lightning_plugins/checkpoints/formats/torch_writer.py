"""Writes a checkpoint tensor by tensor, and either completely or not at all."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_plugins.core.safetensors_file import bytes_of


@dataclass(frozen=True)
class Slot:
    """Stands in a checkpoint for a tensor whose bytes are already in the archive.

    Args:
        key: The archive's name of the storage.
        dtype: The element type.
        shape: Sizes; the elements are contiguous.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class TorchArchive:
    """Writes what ``torch.save`` would write, but the tensors one by one and before the structure that holds them.

    The zip entries carry their checksums and are aligned as torch aligns them, so that ``torch.load(mmap=True)`` gets
    aligned tensors. Equal content makes equal bytes: the entries have no time stamp.

    Args:
        file: Open for writing in binary, at its beginning.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._count = 0

    def __enter__(self) -> TorchArchive:
        return self

    def __exit__(self, *exception: object) -> None:
        self._zip.fp = None  # whole by now, or never: a directory at the end would make half an archive look whole

    def add(self, content: memoryview) -> str:
        """Write a storage's bytes and return its key."""
        key = str(self._count)
        self._count += 1
        self._record(f"data/{key}", content)
        return key

    def finish(self, checkpoint: Any) -> None:
        """Write the structure, a :class:`Slot` in it for each tensor added so far, and close the archive.

        Args:
            checkpoint: Anything that can be pickled; ordinary tensors in it are written as well.
        """
        text = io.BytesIO()
        _SlotPickler(text, self).dump(checkpoint)
        self._record("data.pkl", memoryview(text.getvalue()))
        self._record("byteorder", memoryview(sys.byteorder.encode()))
        self._record("version", memoryview(b"3\n"))
        self._zip.close()

    def _record(self, name: str, content: memoryview) -> None:
        entry = zipfile.ZipInfo(f"archive/{name}")
        # A local header is 30 bytes, the name, this padding (4 bytes of head) and 20 bytes for sizes beyond 4 GB.
        padding = -(self._file.tell() + 30 + len(entry.filename) + 4 + 20) % 64
        entry.extra = struct.pack("<2sH", b"FB", padding) + b"\0" * padding
        with self._zip.open(entry, "w", force_zip64=True) as record:
            record.write(content)


class _SlotPickler(pickle.Pickler):
    """Pickles a checkpoint as ``torch.save`` does, with slots and tensors as references to storages."""

    def __init__(self, file: BinaryIO, archive: TorchArchive) -> None:
        super().__init__(file, protocol=2)
        self._archive = archive
        self._keys: dict[int, tuple[Slot, Tensor]] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Slot):
            return _reduced(obj)
        if type(obj) is Tensor and obj.layout == torch.strided:
            if id(obj) not in self._keys:
                tensor = obj.detach().cpu().contiguous()
                slot = Slot(self._archive.add(bytes_of(tensor)), tensor.dtype, tuple(tensor.shape))
                self._keys[id(obj)] = slot, obj  # kept, so that the id stays its own
            return _reduced(self._keys[id(obj)][0])
        return NotImplemented

    def persistent_id(self, obj: Any) -> Any:
        return obj.reference if isinstance(obj, _Storage) else None


class _Storage:
    """A storage that is in the archive already."""

    def __init__(self, reference: tuple[str, Any, str, str, int]) -> None:
        self.reference = reference


def _reduced(slot: Slot) -> tuple[Any, ...]:
    """Return what torch itself makes of a tensor, with the slot's storage and sizes in place of an empty one's."""
    function, arguments = torch.empty(0, dtype=slot.dtype).__reduce_ex__(2)  # type: ignore[no-untyped-call]
    shape = torch.Size(slot.shape)
    kind, numel = torch.UntypedStorage, shape.numel() * slot.dtype.itemsize
    if isinstance(arguments[0], torch.storage.TypedStorage):
        name = arguments[0]._pickle_storage_type()  # type: ignore[no-untyped-call]
        kind, numel = getattr(torch, name), shape.numel()
    stride = torch.empty(shape, device="meta").stride()
    storage = _Storage(("storage", kind, slot.key, "cpu", numel))
    return function, (storage, 0, tuple(shape), stride, *arguments[4:])
