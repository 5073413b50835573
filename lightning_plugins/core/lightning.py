"""The only door to Lightning.

``lightning.pytorch`` and ``pytorch_lightning`` are two copies of one library with distinct classes. What is defined
here belongs to both, so that one callback object runs in either Trainer and one ``except`` catches either's error.
Objects that a user hands over are recognised by what they have, never by their class.
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
    "Callback",
    "CallbackOfBoth",
    "LRSchedulerConfig",
    "LightningModule",
    "MisconfigurationException",
    "RemainingEnd",
    "Trainer",
    "cancelling_callbacks",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "sum_over_ranks",
    "torch_optimizers",
]


class UnusedHook:
    """A hook that is ``None`` on callbacks that do not define it, and does nothing when it is called by ``super()``."""

    def __init__(self) -> None:
        self._defined_by: dict[type, bool] = {}

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, callback: object, kind: type) -> Callable[..., None] | None:
        defined = self._defined_by.get(kind)
        if defined is None:
            first = next(vars(base)[self._name] for base in kind.__mro__ if self._name in vars(base))
            defined = self._defined_by[kind] = first is not self
        return _do_nothing if defined else None


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Be a hook without a body."""


if TYPE_CHECKING:
    CallbackOfBoth = _unified.Callback
    Callback = _unified.Callback
else:

    class CallbackOfBoth(_unified.Callback, _classic.Callback):
        """A ``Callback`` of both namespaces."""

    class Callback(CallbackOfBoth):
        """Base of every callback here: a ``Callback`` of both namespaces.

        The hooks of a batch that a callback does not define read as ``None``, which both Trainers, and Fabric, skip;
        otherwise each costs a microsecond or more of every batch for nothing. A subclass that defines one may call
        ``super()`` as usual.
        """

        on_before_zero_grad = UnusedHook()
        on_train_batch_start = UnusedHook()
        on_before_backward = UnusedHook()
        on_after_backward = UnusedHook()
        on_before_optimizer_step = UnusedHook()
        on_train_batch_end = UnusedHook()
        on_validation_batch_start = UnusedHook()
        on_validation_batch_end = UnusedHook()
        on_test_batch_start = UnusedHook()
        on_test_batch_end = UnusedHook()
        on_predict_batch_start = UnusedHook()
        on_predict_batch_end = UnusedHook()


if TYPE_CHECKING:
    MisconfigurationException = _UnifiedError
else:

    class MisconfigurationException(_UnifiedError, _ClassicError):
        """A setting that clashes with the Trainer's; either namespace's ``except`` catches it."""


class RemainingEnd:
    """Calls a function in a fit that finds nothing left to train, where Lightning calls no hook.

    A run that was killed while it ended has its last checkpoint behind it. Resumed from there, Lightning's loop returns
    at once, without ``on_train_start`` and ``on_train_end``, and what callbacks do at the end would never be done.
    """

    def __init__(self) -> None:
        self.finish: Callable[[], None] = _do_nothing
        self._run: _EndingRun | None = None

    def watch(self, trainer: Trainer, finish: Callable[[], None]) -> None:
        """Call ``finish`` in this fit unless :meth:`remove` comes first, as it should in ``on_train_start``.

        Args:
            trainer: The Trainer, in ``on_fit_start``.
            finish: What there is to do; everything is still on its device.
        """
        self.remove()
        there = vars(trainer.fit_loop).get("run")
        self._run = there if isinstance(there, _EndingRun) else _EndingRun(trainer)
        self._run.ends.append(self)
        self.finish = finish

    def remove(self) -> None:
        """Give the loop its own method back, if nobody else watches it; harmless when that is done."""
        run, self._run, self.finish = self._run, None, _do_nothing
        if run is not None:
            run.ends.remove(self)
            run.leave()


class _EndingRun:
    """Stands in for the ``run`` of a Trainer's fit loop."""

    def __init__(self, trainer: Trainer) -> None:
        loop: Any = trainer.fit_loop
        self.ends: list[RemainingEnd] = []
        self._trainer, self._own, self._before = trainer, loop.run, vars(loop).get("run")
        loop.run = self

    def __call__(self) -> None:
        self._own()
        if self._trainer.global_step and self._trainer.limit_train_batches != 0:  # else there never was a run
            for end in list(self.ends):
                finish = end.finish
                end.remove()
                finish()

    def leave(self) -> None:
        loop = vars(self._trainer.fit_loop)
        if not self.ends and loop.get("run") is self:
            del loop["run"]
            loop.update({} if self._before is None else {"run": self._before})


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
