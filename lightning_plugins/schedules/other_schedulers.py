"""What can be said of a scheduler that is not ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

_REWRITE_BASE_RATES = ("CyclicLR", "OneCycleLR")  # torch's; the user's own rate is lost in their groups


def drives_rates_of(scheduler: Any, optimizer: Optimizer) -> bool:
    """Return whether a scheduler sets the learning rates of ``optimizer``."""
    return getattr(scheduler, "optimizer", None) is optimizer and getattr(scheduler, "parameter", "lr") == "lr"


def rewrites_base_rates(scheduler: Any) -> bool:
    """Return whether a scheduler, or a part of one, has put its own rates in place of the optimizer's."""
    kinds = {type(part).__name__ for part in (scheduler, *getattr(scheduler, "_schedulers", ()))}
    return bool(kinds.intersection(_REWRITE_BASE_RATES))


def holds(optimizers: Sequence[Optimizer], optimizer: Optimizer) -> bool:
    """Return whether that very optimizer is among ``optimizers``."""
    return any(found is optimizer for found in optimizers)
