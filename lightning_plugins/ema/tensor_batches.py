"""Two equally shaped lists of tensors, cut and packed into batches that a bounded scratch can hold.

Large tensors are cut into pieces, small ones share a batch, so that neither a 60 MB embedding nor a thousand biases
costs more than memory traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MIB = 2**20


@dataclass(frozen=True)
class Batch:
    """Views of equal shape: of the left list, of the right list, and of the scratch between them."""

    left: list[Tensor]
    right: list[Tensor]
    scratch: list[Tensor]


class Layout:
    """The batches of two lists of tensors, computed once and again only when a tensor has moved.

    Args:
        scratch_bytes: Size of the scratch; ``None`` chooses by the device of the left tensors. 1 MiB stays in a CPU's
            cache; a GPU needs more to hide the launch of a kernel, 4 MiB for copies of one type.
    """

    def __init__(self, scratch_bytes: int | None = None) -> None:
        self._scratch_bytes = scratch_bytes
        self._moved_key: tuple[int, ...] = ()
        self._batches: list[Batch] = []

    def batches(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Batch]:
        """Return the batches of both lists; the scratch lies beside ``left`` and has the type of ``right``."""
        key = tuple(tensor.data_ptr() for tensor in (*left, *right))
        if key != self._moved_key:
            self._batches = self._cut(left, right)
            self._moved_key = key
        return self._batches

    def _cut(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Batch]:
        device, dtype = left[0].device, right[0].dtype
        limit = (self._scratch_bytes or (4 if device.type == "cuda" else 1) * _MIB) // dtype.itemsize
        scratch = torch.empty(min(limit, sum(t.numel() for t in right)), dtype=dtype, device=device)
        batches: list[Batch] = []
        space = 0
        for a, b in zip(left, right, strict=True):
            if not b.numel():
                continue  # a shard may be empty
            flat = _flat_pair(a, b)
            if flat is None:  # overlapping or differently ordered memory: rare, one tensor at a time
                batches.append(Batch([a], [b], [torch.empty_like(b, device=device)]))
                space = 0
                continue
            for piece_a, piece_b in zip(torch.split(flat[0], limit), torch.split(flat[1], limit), strict=True):
                size = piece_a.numel()
                if size > space:
                    batches.append(Batch([], [], []))
                    space = scratch.numel()
                start = scratch.numel() - space
                batches[-1].left.append(piece_a)
                batches[-1].right.append(piece_b)
                batches[-1].scratch.append(scratch[start : start + size])
                space -= size
        return batches


def copy(target: list[Tensor], source: list[Tensor]) -> None:
    """Copy each tensor of ``source`` into ``target``, casting and changing devices as needed, without waiting."""
    if len(target) == 1:
        target[0].copy_(source[0], non_blocking=True)
    else:
        torch._foreach_copy_(target, source, non_blocking=True)


def _flat_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return one-dimensional views of two tensors that order their elements alike in memory without gaps."""
    if a.is_contiguous() and b.is_contiguous():
        return a.view(-1), b.view(-1)
    span = 1 + sum((size - 1) * stride for size, stride in zip(a.shape, a.stride(), strict=True))
    if a.stride() != b.stride() or span != a.numel() or a.numel() != b.numel():
        return None
    return a.as_strided((span,), (1,)), b.as_strided((span,), (1,))
