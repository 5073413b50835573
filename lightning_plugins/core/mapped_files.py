"""Maps tensors from files: their bytes are read when their elements are."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

from lightning_plugins.core.files import open_regular
from lightning_plugins.core.stand_ins import StoredTensor, UnreadableError


class MappedFiles:
    """The files whose tensors a checkpoint offers, each mapped once.

    Copy-on-write, because torch wants memory that it could write to; the files stay as they are.
    """

    def __init__(self) -> None:
        self._mapped: dict[Path, mmap.mmap] = {}

    def tensor(self, path: Path, position: int, tensor: StoredTensor) -> Tensor:
        """Return ``tensor`` as a view of the file at ``path``.

        Args:
            path: The file.
            position: Of the tensor's storage in the file, in bytes.
            tensor: What lies there.

        Raises:
            UnreadableError: If the file ends before the tensor does, or the sizes are none.
        """
        if len(tensor.shape) != len(tensor.stride) or min((position, tensor.offset, *tensor.shape, *tensor.stride)) < 0:
            raise UnreadableError("it holds a tensor of impossible sizes")
        if 0 in tensor.shape:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        if path not in self._mapped:
            with open_regular(path) as file:
                self._mapped[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped = self._mapped[path]
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride, strict=True))
        start, width = position + tensor.offset * tensor.dtype.itemsize, tensor.dtype.itemsize
        if start + reach * width > len(mapped):
            raise UnreadableError("it is cut off: it ends before its tensors do")
        flat = torch.frombuffer(mapped, dtype=torch.uint8, offset=start, count=reach * width)
        if start % width:
            # another type's view needs an aligned address
            flat = flat.clone()
        return flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride)
