"""What an average does with tensors of one kind: blend weights into shadows, and exchange the two.

A *kind* is the type and device of the weights and of their shadows. Weights and shadows of one type are exchanged in
place; a half-precision weight cannot hold its float32 shadow, so its raw value is kept aside (a *stash*) and the shadow
stays where it is, never rounded. Both go through a bounded scratch: large tensors are cut into pieces, small ones share
a batch, so that neither a 60 MB embedding nor a thousand biases costs more than memory traffic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

_MIB = 2**20

Operation = Callable[[], None]


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Neither gradients nor inference tensors: what is allocated here must be writable in training, too."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(frozen=True)
class Batch:
    """Views of equal shape: of the left list, of the right list, and of the scratch between them."""

    left: list[Tensor]
    right: list[Tensor]
    scratch: list[Tensor]


class Layout:
    """The batches of two lists of tensors, computed once and again only when a tensor has moved.

    Args:
        mib_on_gpu: Size of the scratch in MiB if the left tensors lie on a GPU, which needs more to hide the launch of
            a kernel; elsewhere it is 1 MiB, which stays in a CPU's cache.
    """

    def __init__(self, mib_on_gpu: int) -> None:
        self._mib_on_gpu = mib_on_gpu
        self._moved_key: tuple[int, ...] = ()
        self._batches: list[Batch] = []

    def __reduce__(self) -> tuple[object, ...]:
        """Leave the batches behind: they are views of these tensors, and a copy makes its own."""
        return Layout, (self._mib_on_gpu,)

    def batches(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Batch]:
        """Return the batches of both lists; the scratch lies beside ``left`` and has the type of ``right``."""
        key = tuple(tensor.data_ptr() for tensor in (*left, *right))
        if key != self._moved_key:
            self._batches = self._cut(left, right)
            self._moved_key = key
        return self._batches

    def _cut(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Batch]:
        device, dtype = left[0].device, right[0].dtype
        limit = (self._mib_on_gpu if device.type == "cuda" else 1) * _MIB // dtype.itemsize
        scratch = torch.empty(min(limit, sum(t.numel() for t in right)), dtype=dtype, device=device)
        batches: list[Batch] = []
        space = 0
        for a, b in zip(left, right, strict=True):
            if not b.numel():
                # a shard may be empty
                continue
            flat = _flat_pair(a, b)
            if flat is None:
                # overlapping or differently ordered memory: rare, one tensor at a time
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


class Group:
    """The tensors of one kind.

    Args:
        indices: Positions of the tensors in the average's list.
        weights: The tensors.
        shadows: Their shadows.
        exchanges: Whether weights and shadows have one type, so that a swap can exchange them in place.
        same_device: Whether they lie on one device.

    Attributes:
        stash: The raw values while the average is in the weights and not exchanged with them.
    """

    def __init__(
        self, indices: list[int], weights: list[Tensor], shadows: list[Tensor], *, exchanges: bool, same_device: bool
    ) -> None:
        self.indices = indices
        self.weights = weights
        self.shadows = shadows
        self.exchanges = exchanges
        self.stash: list[Tensor] = []
        self._same_device = same_device
        self._device = weights[0].device
        self._swap_layout, self._blend_layout = Layout(mib_on_gpu=4), Layout(mib_on_gpu=32)

    def blend(self, weight: float) -> None:
        """Move every shadow towards its weight by the share ``weight``."""
        if self.exchanges and self._same_device:
            torch._foreach_lerp_(self.shadows, self.weights, weight)
        elif self._same_device:
            for batch in self._blend_layout.batches(self.weights, self.shadows):
                copy(batch.scratch, batch.left)
                _lerp(batch.right, batch.scratch, weight)
        else:
            # the shadows lie elsewhere: bring them here piece by piece, and back, in the order of the stream
            for batch in self._blend_layout.batches(self.weights, self.shadows):
                copy(batch.scratch, batch.right)
                _lerp(batch.scratch, [w.to(s.dtype) for w, s in zip(batch.left, batch.scratch, strict=True)], weight)
                copy(batch.right, batch.scratch)

    def begin_lost_anew(self) -> list[int]:
        """Let shadows that are infinite or NaN begin at their weights, where those are finite; waits for the device.

        Returns:
            The positions of these tensors in the average's list.
        """
        bad = [i for i, finite in enumerate(_finite(self.shadows)) if not finite]
        whole = _finite([self.weights[i] for i in bad])
        lost = [i for i, finite in zip(bad, whole, strict=True) if finite]
        for i in lost:
            self.shadows[i].copy_(self.weights[i])
        return [self.indices[i] for i in lost]

    def swap_in(self, *, keep_shadows: bool = False) -> list[Operation]:
        """Return the operations that put the average into the weights, each harmless when done twice in a row.

        Args:
            keep_shadows: Leave the shadows as they are, and keep the raw values on the host instead of there.
        """
        if self.exchanges and not keep_shadows:
            return self._exchange(reverse=False)
        return [partial(self._keep, on_host=keep_shadows), partial(copy, self.weights, self.shadows)]

    def swap_out(self) -> list[Operation]:
        """Return the operations that put the raw values back, likewise."""
        if self.stash:
            return [self._restore, self._forget]
        # backwards, so that weights that share memory come out right
        return self._exchange(reverse=True)

    def wait(self) -> None:
        """Wait for shadows that are streamed off a GPU: the host is about to read them."""
        if self._device.type == "cuda" and not self._same_device:
            torch.cuda.current_stream(self._device).synchronize()

    def average(self, position: int, *, swapped: bool) -> Tensor:
        """Return the averaged value of the tensor at ``position``, a reference."""
        return self.weights[position] if swapped and not self.stash else self.shadows[position]

    def raw(self, position: int, *, swapped: bool) -> Tensor:
        """Return the trained value, a reference."""
        if not swapped:
            return self.weights[position]
        return (self.stash or self.shadows)[position]

    def _exchange(self, *, reverse: bool) -> list[Operation]:
        batches = self._swap_layout.batches(self.weights, self.shadows)
        operations: list[Operation] = []
        for batch in reversed(batches) if reverse else batches:
            operations += [
                partial(copy, batch.scratch, batch.left),
                partial(copy, batch.left, batch.right),
                partial(copy, batch.right, batch.scratch),
            ]
        return operations

    def _keep(self, *, on_host: bool) -> None:
        device = torch.device("cpu") if on_host else self._device
        self.stash = [weight.detach().to(device, copy=True) for weight in self.weights]

    def _restore(self) -> None:
        copy(self.weights[::-1], self.stash[::-1])

    def _forget(self) -> None:
        self.stash = []


def grouped(
    weights: list[Tensor], shadows: list[Tensor], stashes: list[Tensor | None], *, swapped: bool
) -> list[Group]:
    """Return the groups of tensors of one kind.

    Args:
        weights: The weights.
        shadows: Their shadows.
        stashes: Their raw values where these are kept aside.
        swapped: Whether the average is in the weights.
    """
    kinds: dict[Any, list[int]] = {}
    for index, (weight, shadow, stash) in enumerate(zip(weights, shadows, stashes, strict=True)):
        kind = (weight.dtype, weight.device, shadow.dtype, shadow.device, stash is None)
        kinds.setdefault(kind, []).append(index)
    groups = []
    for (dtype, device, wide, place, _), indices in kinds.items():
        group = Group(
            indices,
            [weights[index] for index in indices],
            [shadows[index] for index in indices],
            exchanges=dtype == wide,
            same_device=device == place,
        )
        group.stash = [stash for index in indices if (stash := stashes[index]) is not None]
        if swapped and not group.exchanges and not group.stash:
            # cast while the average was exchanged with the weights, or new since
            group.stash = [shadow.clone() for shadow in group.shadows]
            copy(group.shadows, group.weights)
        groups.append(group)
    return groups


class Motion:
    """A swap on its way. Interrupted anywhere, by Ctrl-C for instance, :meth:`run` carries on where it stopped.

    Args:
        operations: What has to be done, in order; doing one twice in a row must be harmless, because an interrupt may
            fall between an operation and its being counted.
    """

    def __init__(self, operations: list[Operation]) -> None:
        self._operations = operations
        self._done = 0

    def run(self) -> None:
        """Do what is left to be done."""
        while self._done < len(self._operations):
            self._operations[self._done]()
            self._done += 1


def copy(target: list[Tensor], source: list[Tensor]) -> None:
    """Copy each tensor of ``source`` into ``target``, casting and changing devices as needed, without waiting."""
    if len(target) == 1:
        target[0].copy_(source[0], non_blocking=True)
    else:
        torch._foreach_copy_(target, source, non_blocking=True)


def _lerp(target: list[Tensor], source: list[Tensor], weight: float) -> None:
    if len(target) == 1:
        target[0].lerp_(source[0], weight)
    else:
        torch._foreach_lerp_(target, source, weight)


def _finite(tensors: list[Tensor]) -> list[bool]:
    """Return which tensors of one kind hold finite numbers alone; one read from the device for all."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return [True] * len(tensors)
    largest = iter(torch.stack([torch.linalg.vector_norm(t, math.inf) for t in filled]).isfinite().tolist())
    return [not tensor.numel() or next(largest) for tensor in tensors]


def _flat_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return one-dimensional views of two tensors that order their elements alike in memory without gaps."""
    if a.is_contiguous() and b.is_contiguous():
        return a.view(-1), b.view(-1)
    span = 1 + sum((size - 1) * stride for size, stride in zip(a.shape, a.stride(), strict=True))
    if a.stride() != b.stride() or span != a.numel() or a.numel() != b.numel():
        return None
    return a.as_strided((span,), (1,)), b.as_strided((span,), (1,))
