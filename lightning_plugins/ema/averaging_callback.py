"""What every callback that follows the weights does: count applied steps, and act once a step is complete."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from typing import Any

from lightning_plugins.core.lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    RemainingEnd,
    Trainer,
    rank_zero_info,
    torch_optimizers,
)
from lightning_plugins.core.step_clock import StepClock
from lightning_plugins.ema.shadow import showing
from lightning_plugins.ema.timing import Pace

# Strategies that keep the parameters where an average in place cannot follow them.
_REFUSED = ("DeepSpeedStrategy", "FSDPStrategy", "XLAStrategy", "XLAFSDPStrategy")


class WeightFollower(Callback):
    """Base of the callbacks that average weights as they are trained.

    It ticks on the applied steps of the first optimizer, and acts at the end of the batch, when every parameter is
    current; with one optimizer also when a file is written inside the batch.

    Args:
        start_step: Applied steps after which the average begins.
        every: Applied steps between two updates.
    """

    def __init__(self, start_step: int, every: int) -> None:
        super().__init__()
        self._pace = Pace(start_step, every)
        self._clock: StepClock | None = None
        self._trainer: Trainer | None = None  # while the clock runs
        self._end = RemainingEnd()
        self._in_batch = False
        self._new_epoch = False

    @abstractmethod
    def _begin(self, pl_module: LightningModule) -> None:
        """Begin to average: the weights are those that the average starts as."""

    @abstractmethod
    def _update(self, trainer: Trainer, n: int, steps: int) -> None:
        """Blend the weights of applied step ``n`` in, ``steps`` after the last time."""

    @abstractmethod
    def _adopt(self) -> None:
        """Take in the weights that became trainable."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that a run that was killed while it ended does end."""
        self._end.watch(trainer, lambda: self.on_train_end(trainer, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count: the checkpoint, if any, is restored by now."""
        self._release_clock()
        optimizers = torch_optimizers(trainer)
        if not optimizers:
            return
        if self._pace.applied == 0 and trainer.global_step > 0:
            self._pace.applied = trainer.global_step // (1 if pl_module.automatic_optimization else len(optimizers))
            rank_zero_info(
                f"{self.state_key} joins at step {trainer.global_step}: no average was restored, so it begins with the "
                "weights as they are."
            )
        self._trainer, self._clock = trainer, StepClock(optimizers[0])
        self._clock.restore(attempted=self._pace.applied, applied=self._pace.applied)
        if self._pace.begins(self._pace.applied):
            self._begin(pl_module)
        self._new_epoch = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for weights that were unfrozen before the next batch."""
        self._new_epoch = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make up for a batch whose end was never announced."""
        self._in_batch = False
        self._catch_up()
        if self._new_epoch:
            self._new_epoch = False
            self._adopt()
        self._in_batch = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average if the weights were."""
        self._in_batch = False
        self._catch_up()

    def _catch_up(self) -> None:
        """Bring the average up to the weights, if a step was applied since and no optimizer is still to step."""
        clock, trainer = self._clock, self._trainer
        if clock is None or trainer is None or (self._in_batch and len(trainer.optimizers) > 1):
            return
        if showing(trainer.lightning_module) is not None:  # then there is nothing new, and nothing raw to be seen
            return
        applied = clock.applied
        if self._pace.begins(applied):
            self._begin(trainer.lightning_module)
        due = self._pace.due(applied)
        if due is not None:
            self._pace.updated(due[0])  # first: a step must not be blended in twice, whatever fails
            self._update(trainer, *due)

    def _last_catch_up(self) -> None:
        """Catch up after an exception: a file may still be written, and no step should be missing from it."""
        with contextlib.suppress(Exception):  # the one that ends the run is the one to be heard
            self._catch_up()

    def _all_catch_up(self) -> None:
        """Bring every average of the run up to the weights, before one of them is shown or all are saved."""
        for callback in self._trainer.callbacks if self._trainer else []:  # type: ignore[attr-defined]
            if isinstance(callback, WeightFollower):
                callback._catch_up()

    def _release_clock(self) -> None:
        """Take the hook off the optimizer; the count stays."""
        if self._clock is not None:
            self._pace.applied = self._clock.applied
            self._clock.close()
        self._trainer, self._clock = None, None
        self._end.remove()
        self._in_batch = False

    def state_dict(self) -> dict[str, Any]:
        """Return the counters; nothing as long as nothing was counted."""
        if self._clock is not None:
            self._pace.applied = self._clock.applied
        return self._pace.state_dict() if self._pace.applied or self._pace.origin is not None else {}

    def _refuse_strategy(self, trainer: Trainer) -> None:
        """Refuse the strategies that this cannot work under."""
        strategy = trainer.strategy
        kinds = {kind.__name__ for kind in type(strategy).__mro__}
        if kinds & set(_REFUSED):
            raise MisconfigurationException(
                f"`{type(self).__name__}` must be used with a single device, DDP or FSDP2, got "
                f"{type(strategy).__name__}, which flattens or moves the weights. "
                "ModelParallelStrategy(save_distributed_checkpoint=False) shards them in a way that it can follow."
            )
        if getattr(strategy, "_save_distributed_checkpoint", False):
            raise MisconfigurationException(
                f"`{type(self).__name__}` must write single-file checkpoints, got {type(strategy).__name__} with "
                "`save_distributed_checkpoint=True`: a distributed checkpoint has no place for a second set of "
                "weights. Pass save_distributed_checkpoint=False."
            )
