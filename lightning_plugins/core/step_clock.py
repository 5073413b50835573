"""Counts the steps of one optimizer: those that were attempted and those that changed the weights.

Lightning's ``global_step`` counts attempts: also the steps that a gradient scaler skipped, those without any gradient
(``training_step`` returned ``None``) and, in manual optimization, those of every optimizer together. What follows the
weights must count *applied* steps. A step is applied when the optimizer's post-step hook fired, some parameter had a
gradient, and the scaler found no infinity: other optimizers are simply not called then, but a fused one is, and skips
inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class StepClock:
    """Counts the attempted and the applied steps of one optimizer through its step hooks.

    Args:
        optimizer: The optimizer to listen to. :meth:`close` takes the hooks off again.

    Attributes:
        attempted: Steps that the optimizer was called for. A step that a scaler skipped calls no hook.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> clock = StepClock(optimizer)
        >>> optimizer.step()  # no gradient: the weights stay
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        >>> clock.attempted, clock.applied
        (2, 1)
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.attempted = 0
        self._called_with_gradient = 0
        self._skipped_inside: Tensor | None = None  # stays on the device until it is asked for
        self._running = True  # a step may be under way
        self._handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    @property
    def applied(self) -> int:
        """Steps that changed the weights; reads one number from the device if a fused optimizer ran under a scaler."""
        if self._skipped_inside is not None:
            self._called_with_gradient -= int(self._skipped_inside.item())
            self._skipped_inside = None
        return self._called_with_gradient

    def restore(self, attempted: int, applied: int) -> None:
        """Set both counters, as after a resume."""
        self.attempted = attempted
        self._called_with_gradient = applied
        self._skipped_inside = None

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._running = True

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._running:
            return  # an optimizer whose `step` calls its parent's fires every hook twice for one step
        self._running = False
        self.attempted += 1
        if has_gradient(optimizer):
            self._count_applied(optimizer)

    def _count_applied(self, optimizer: Optimizer) -> None:
        self._called_with_gradient += 1
        found_inf = getattr(optimizer, "found_inf", None)  # set by GradScaler for the call of a fused optimizer
        if found_inf is not None:
            skipped = (found_inf.detach() > 0).to(torch.int64)
            self._skipped_inside = skipped if self._skipped_inside is None else self._skipped_inside + skipped


def has_gradient(optimizer: Optimizer) -> bool:
    """Return whether any parameter of ``optimizer`` has a gradient; stops at the first."""
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])
