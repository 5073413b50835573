"""What an average does with tensors of one kind: blend weights into shadows, and exchange the two.

A *kind* is the type and device of the weights and of their shadows. Weights and shadows of one type are exchanged in
place; a half-precision weight cannot hold its float32 shadow, so its raw value is kept aside (a *stash*) and the shadow
stays where it is, never rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightning_plugins.ema.tensor_batches import Layout, copy

Operation = Callable[[], None]


class Group:
    """The tensors of one kind.

    Args:
        indices: Positions of the tensors in the average's list.
        weights: The tensors.
        shadows: Their shadows.
        exchanges: Whether weights and shadows have one type, so that a swap exchanges them in place.
        same_device: Whether they lie on one device.
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
        self._swap_layout = Layout()
        on_gpu = shadows[0].is_cuda or not same_device
        self._blend_layout = Layout(32 * 2**20 if on_gpu else None)  # hides the launch of a kernel

    def blend(self, weight: float) -> None:
        """Move every shadow towards its weight by the share ``weight``."""
        if self.exchanges and self._same_device:
            torch._foreach_lerp_(self.shadows, self.weights, weight)
        elif self._same_device:
            for batch in self._blend_layout.batches(self.weights, self.shadows):
                copy(batch.scratch, batch.left)
                _lerp(batch.right, batch.scratch, weight)
        else:  # the shadows lie elsewhere: bring them here piece by piece, and back, in the order of the stream
            for batch in self._blend_layout.batches(self.weights, self.shadows):
                copy(batch.scratch, batch.right)
                _lerp(batch.scratch, [w.to(s.dtype) for w, s in zip(batch.left, batch.scratch, strict=True)], weight)
                copy(batch.right, batch.scratch)

    def swap_in(self) -> list[Operation]:
        """Return the operations that put the average into the weights, each harmless when done twice in a row."""
        if self.exchanges:
            return self._exchange(reverse=False)
        return [self._keep, partial(copy, self.weights, self.shadows)]

    def swap_out(self) -> list[Operation]:
        """Return the operations that put the raw values back, likewise."""
        if self.exchanges:  # backwards, so that weights that share memory come out right
            return self._exchange(reverse=True)
        return [self._restore, self._forget]

    def average(self, position: int, *, swapped: bool) -> Tensor:
        """Return the averaged value of the tensor at ``position``, a reference."""
        return self.weights[position] if swapped and self.exchanges else self.shadows[position]

    def raw(self, position: int, *, swapped: bool) -> Tensor:
        """Return the trained value, a reference."""
        if not swapped:
            return self.weights[position]
        return self.shadows[position] if self.exchanges else self.stash[position]

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

    def _keep(self) -> None:
        self.stash = [weight.detach().clone() for weight in self.weights]

    def _restore(self) -> None:
        copy(self.weights[::-1], self.stash[::-1])

    def _forget(self) -> None:
        self.stash = []


def _lerp(target: list[Tensor], source: list[Tensor], weight: float) -> None:
    if len(target) == 1:
        target[0].lerp_(source[0], weight)
    else:
        torch._foreach_lerp_(target, source, weight)


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
