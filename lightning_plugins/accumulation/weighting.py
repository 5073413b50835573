r"""The gradient of the mean over a whole window, out of gradients of the means over its batches.

Batch :math:`i` on rank :math:`r` has :math:`n_{ri}` items and the loss :math:`\ell_{ri}`, the mean over them. With
:math:`R` ranks and :math:`K` batches a window, Lightning leaves :math:`\frac{1}{RK}\sum_{ri}\nabla\ell_{ri}` in the
gradients, also where the last window has fewer batches. The mean over all :math:`N=\sum n_{ri}` items has the gradient
:math:`\frac1N\sum_{ri}n_{ri}\nabla\ell_{ri}`. :math:`N` is not known before the window ends, so both ends are scaled:
every backward by :math:`n_{ri}/n_0`, with a constant :math:`n_0` that all ranks share, and the window's gradient by
:math:`RKn_0/N`. In equal, full windows both are exactly 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_plugins.core.counting import Count, wide
from lightning_plugins.core.sharding import local


class Window:
    """The counts of one window on one rank.

    Attributes:
        reference: The count that weighs 1, the same on all ranks. Any will do; the usual count keeps weights near 1.
        total: Items so far on this rank, 0 before the first batch.
        batches: What Lightning divides the losses by, in the window's first batch; ``None`` before it.
    """

    def __init__(self) -> None:
        self.reference: float | None = None
        self.total: Count = 0
        self.batches: int | None = None

    def add(self, count: Count, batches: int) -> Count:
        """Count a batch and return its weight: 1, a number, or a tensor if the count is one.

        Args:
            count: Its items.
            batches: What Lightning has divided its loss by: another number than before, if it was set in between.
        """
        if self.reference is None:
            raise RuntimeError("Window.reference must be set before the first batch is counted.")
        self.total = self.total + count
        if self.batches is None:
            self.batches = batches
        share = batches / self.batches
        if isinstance(count, Tensor):
            return wide(count, count.device) / self.reference * share
        return 1 if count == self.reference * share == self.reference else count / self.reference * share

    def factor(self, total: Count, *, divisor: int) -> Count:
        """Return what to multiply the window's gradient by: 1, a number, or a tensor if ``total`` is one.

        Args:
            total: Items of the window on all ranks; with none the gradient is left alone.
            divisor: What the strategy has divided the gradients by.
        """
        expected = (self.batches or 1) * divisor * (self.reference or 1)
        if isinstance(total, Tensor):
            # whole numbers would divide in single precision
            total = wide(total, total.device)
            return torch.where(total > 0, expected / total, torch.ones_like(total))
        return expected / total if total not in (0, expected) else 1


def weigh_backward(loss: Tensor, weight: Count) -> None:
    """Make the coming backward of ``loss`` count ``weight`` times; the value of the loss stays."""
    if isinstance(weight, Tensor):
        weight = weight.to(loss.dtype)
    # else the backward fails by itself, and says why
    if loss.requires_grad:
        loss.register_hook(lambda gradient: gradient * weight)  # type: ignore[no-untyped-call]  # torch's own


@torch.no_grad()
def scale_gradients(parameters: Iterable[torch.nn.Parameter], factor: Count) -> None:
    """Multiply the gradients of ``parameters`` in place: a few kernels in all, no wait for the device."""
    scale((parameter.grad for parameter in parameters if parameter.grad is not None), factor)


@torch.no_grad()
def scale(tensors: Iterable[Tensor], factor: Count) -> None:
    """Multiply ``tensors`` in place, likewise."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        gradient = local(tensor)
        if gradient.layout is torch.strided:
            groups[gradient.device, gradient.dtype].append(gradient)
        else:
            gradient.mul_(factor)
    for (device, dtype), gradients in groups.items():
        if isinstance(factor, Tensor):
            torch._foreach_mul_(gradients, factor.to(device=device, dtype=dtype))
        else:
            torch._foreach_mul_(gradients, factor)


def first_gradient(parameters: Iterable[torch.nn.Parameter]) -> tuple[int, int] | None:
    """Return the first gradient's identity and how often it was written to, ``None`` if there is no gradient.

    Zeroing it in any way changes this. A new gradient at the same place is written to less often.
    """
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            return id(gradient), gradient._version
    return None
