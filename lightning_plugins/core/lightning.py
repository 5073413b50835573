"""The only door to Lightning.

``lightning.pytorch`` and ``pytorch_lightning`` are two copies of one library with distinct classes. What is defined
here belongs to both, so that one callback object runs in either Trainer and one ``except`` catches either's error.
Objects that a user hands over are recognized by what they have, never by their class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as _unified
import pytorch_lightning as _classic
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException as _UnifiedError
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import LRSchedulerConfig
from lightning_fabric.utilities.exceptions import MisconfigurationException as _ClassicError
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

__all__ = [
    "CallbackOfBoth",
    "LRSchedulerConfig",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "cancelling_callbacks",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "sum_over_ranks",
    "torch_optimizers",
]


if TYPE_CHECKING:
    CallbackOfBoth = _unified.Callback
else:

    class CallbackOfBoth(_unified.Callback, _classic.Callback):
        """A ``Callback`` of both namespaces."""


if TYPE_CHECKING:
    MisconfigurationException = _UnifiedError
else:

    class MisconfigurationException(_UnifiedError, _ClassicError):
        """A setting that clashes with the Trainer's; either namespace's ``except`` catches it."""


def torch_optimizers(trainer: Trainer) -> list[Optimizer]:
    """Return the run's optimizers without Lightning's wrappers, in the order of ``configure_optimizers``."""
    return [getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.optimizers]


def cancelling_callbacks(trainer: Trainer) -> list[Any]:
    """Return the callbacks that can cancel a batch: while a ``batch_cancelled`` is true, the batch counts nowhere."""
    return [callback for callback in trainer.callbacks if hasattr(callback, "batch_cancelled")]  # type: ignore[attr-defined]


def sum_over_ranks(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """Return a function that adds a tensor up over all ranks, or ``None`` when there is only one.

    Every rank must call it at the same moment; the result lies on the rank's device and the argument is not changed.
    It is one collective, without the barrier that ``strategy.reduce`` adds, so no device is waited for.
    """
    if trainer.world_size == 1:
        return None
    strategy = trainer.strategy

    def add_up(tensor: Tensor) -> Tensor:
        total = tensor.detach().to(strategy.root_device, copy=True)
        if not torch.distributed.is_initialized():  # a strategy with collectives of its own
            reduced: Tensor = strategy.reduce(total, reduce_op="sum")
            return reduced
        torch.distributed.all_reduce(total)
        return total

    return add_up
