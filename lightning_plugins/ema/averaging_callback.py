"""What every callback that follows the weights does: count applied steps, and act once a step is complete."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from lightning_plugins.core.callback import Callback, Stage
from lightning_plugins.core.distributed_sets import DistributedSets, open_sets, refuse_cut_off
from lightning_plugins.core.durations import RunLengthUnknownError
from lightning_plugins.core.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
    torch_optimizers,
)
from lightning_plugins.core.loaders import samples_per_step
from lightning_plugins.core.patching import Patches
from lightning_plugins.core.run_length import horizon_of_run
from lightning_plugins.core.step_clock import RunClock
from lightning_plugins.core.strategies import check_strategy, learn_shards
from lightning_plugins.core.validation import LightningPluginsWarning
from lightning_plugins.core.zero import ZeroClock, clock_of
from lightning_plugins.ema.decay import DecayRule, UpdateCounter
from lightning_plugins.ema.pace import Pace
from lightning_plugins.ema.shadow import Shadow, showing
from lightning_plugins.ema.watched_files import watch_files
from lightning_plugins.ema.zero_saves import rebind


class AveragingCallback(Callback):
    """Base of the callbacks that average weights as they are trained.

    It ticks on the applied steps of the first optimizer, and acts at the end of the batch, when every parameter is
    current; with one optimizer also when a file is written inside the batch.

    Args:
        rules: The decay of each average.
        counter: When the averages begin and when they are updated.
        **identity: Names and values that tell two instances apart.
    """

    stage = Stage.WEIGHTS
    technique: ClassVar[str]
    """Its name in the table of supported strategies."""

    def __init__(self, rules: list[DecayRule], counter: UpdateCounter, **identity: Any) -> None:
        super().__init__(**identity)
        self._key_of_0_1 = f"{type(self).__qualname__}{identity!r}"
        self._pace = Pace(rules, counter)
        self._shadows: list[Shadow] = []
        self._counter = counter
        # from a fit's setup until its training has ended
        self._fitting = False
        # while the clock runs
        self._trainer: Trainer | None = None
        self._clock: RunClock | ZeroClock | None = None
        self._in_batch = False
        self._new_epoch = False
        # as it was when the run's length was last asked for
        self._accumulation = 0
        self._evaluating = False
        self._file_patches = Patches()
        # the checkpoint that the strategy has read in this fit
        self._loaded_from: Any = None

    # -- for subclasses

    @abstractmethod
    def _begin(self, pl_module: LightningModule) -> None:
        """Make the shadows: from a file, or of the weights as they are."""

    @abstractmethod
    def _forget(self) -> None:
        """Start anew."""

    @abstractmethod
    def _restore(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> bool:
        """Take everything over from a checkpoint; return whether it has an average of this one."""

    @abstractmethod
    def _place_restored(self, pl_module: LightningModule) -> None:
        """Make the shadows of what a file gave, if that has not been done."""

    def _updated(self, trainer: Trainer, n: int) -> None:
        """Act after the update of step ``n``."""

    def _end_evaluation(self) -> None:
        """Put back what the module held before an evaluation."""

    def _end_training(self, trainer: Trainer) -> None:
        """Act after the last update; what the module holds then is noted."""

    def _before_loading(self) -> None:
        """Prepare the module for weights that are loaded in mid-fit."""

    def _before_writing(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Change a checkpoint, last thing before it is written."""

    # -- hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; a second fit of the same module goes on, of another one begins anew."""
        super().setup(trainer, pl_module, stage)
        refuse_cut_off(self.patches, trainer.strategy)
        if stage == "fit":
            check_strategy(trainer, self.technique, pl_module)
            if self._shadows and not self._serves(pl_module):
                self._forget()
            for shadow in self._shadows:
                shadow.ended = False
            self._fitting = True

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the averages out of the file that a fit resumes from."""
        # weights that are loaded in mid-fit have come through the strategy
        if not self._fitting or self._clock is not None:
            return
        self._forget()
        try:
            if self._restore(trainer, pl_module, checkpoint):
                state = checkpoint.get("callbacks", {})
                if self._key_of_0_1 in state and self.state_key not in state:
                    self.load_state_dict(state[self._key_of_0_1])
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(str(error)) from error

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place what a file gave, now that the module is on its device; watch the run's files and its end."""
        learn_shards(trainer, pl_module)
        self._place_restored(pl_module)
        self.when_nothing_is_left(trainer, lambda: self.on_train_end(trainer, pl_module))
        self._watch_files(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count: the checkpoint, if any, is restored by now."""
        self.training_starts()
        self._place_restored(pl_module)
        self._release_clock()
        rebind(self._shadows, trainer)
        optimizers = torch_optimizers(trainer)
        if not optimizers:
            return
        counter = self._counter
        if trainer.global_step == 0:
            counter.earlier = counter.applied
        elif counter.applied == 0:
            counter.applied = trainer.global_step // (1 if pl_module.automatic_optimization else len(optimizers))
            rank_zero_info(
                f"{self.state_key} joins at step {trainer.global_step}: no average was restored, so it begins with the "
                "weights as they are."
            )
        self._trainer = trainer
        try:
            self._clock = clock_of(trainer, counter.applied, self._catch_up)
        except TypeError as error:
            raise MisconfigurationException(
                f"`{type(self).__name__}` must see the steps of the optimizer, but {type(optimizers[0]).__name__} has "
                "neither step hooks nor a `step` that can be wrapped."
            ) from error
        self._plan(trainer, pl_module)
        self._begin_if_due(pl_module, counter.applied)
        self._new_epoch = True
        self._report()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for weights that were unfrozen before the next batch."""
        self._new_epoch = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make up for a batch or an evaluation without an end; follow an optimizer or weights that were exchanged."""
        if self._evaluating:
            self._end_evaluation()
        if self._clock is None:
            return
        if self._in_batch:
            self._in_batch = False
            self._catch_up()
        self._clock.start_batch()
        if self._new_epoch or trainer.accumulate_grad_batches != self._accumulation:
            self._plan(trainer, pl_module, batch_idx)
        if self._new_epoch:
            self._new_epoch = False
            for shadow in self._shadows:
                shadow.follow()
            self._report()
        self._in_batch = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average if the weights were."""
        self._in_batch = False
        if self._clock is not None:
            self._clock.end_batch()
            self._catch_up()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End with the last step, and note what the module holds."""
        self._catch_up_all()
        self._fitting = False
        self._end_training(trainer)
        for shadow in self._shadows:
            shadow.remember()
            shadow.ended = True

    def leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let later files be those of a run without this average."""
        self._file_patches.undo()

    def release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizer, and follow the module to where it was moved."""
        if self._clock is not None:
            # a file may still be written, and no step should be missing from it; the error that ends a run is the one
            # to be reported
            with contextlib.suppress(Exception):
                self._catch_up()
        self._release_clock()
        if self._fitting:
            self._fitting = False
            with contextlib.suppress(Exception):
                for shadow in self._shadows:
                    shadow.remember()
                    shadow.ended = True

    # -- counting

    def _catch_up(self) -> None:
        """Bring the average up to the weights, if a step was applied since and no optimizer is still to step."""
        clock, trainer = self._clock, self._trainer
        if clock is None or trainer is None or (self._in_batch and len(trainer.optimizers) > 1):
            return
        module = trainer.lightning_module
        if showing(module) is not None:
            # then there is nothing new, and nothing raw to be seen
            return
        counter, applied = self._counter, clock.applied
        if counter.origin is None:
            self._begin_if_due(module, applied)
        due = counter.due(applied)
        if due is None:
            return
        # first: a step must not be blended in twice, whatever fails
        counter.last = due[0]
        pace = self._pace
        rules = pace.for_samples_per_step(self._samples_per_step(trainer)) if pace.counts_samples else pace.rules
        for rule, shadow in zip(rules, self._shadows, strict=True):
            # the unchecked form: the numbers are right, and a decay of the user's own is looked at here
            decay = rule._over(*due)
            shadow.update(decay if 0 <= decay <= 1 else rule.checked(decay, due[0]))
        if clock.news or self._shadows[0].changes is not None:
            self._report()
        self._updated(trainer, due[0])

    def _catch_up_all(self) -> None:
        """Bring every average of the run up to the weights, before one of them is shown or all are saved."""
        for callback in self._trainer.callbacks if self._trainer else []:  # type: ignore[attr-defined]
            if isinstance(callback, AveragingCallback):
                callback._catch_up()

    def _begin_if_due(self, pl_module: LightningModule, applied: int) -> None:
        if self._counter.begins(applied):
            self._begin(pl_module)
            self._pace.follow_origin()

    def _plan(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int | None = None) -> None:
        """Count what depends on the length of the run in steps, as that is known now."""
        self._accumulation = trainer.accumulate_grad_batches
        if not self._pace.is_open:
            return
        horizon, source = horizon_of_run(trainer, batch_idx, automatic=pl_module.automatic_optimization)
        try:
            said, warned = self._pace.resolve_for(horizon)
        except RunLengthUnknownError as error:
            raise MisconfigurationException(f"{error} Here, {source}; or set the Trainer's `max_steps`.") from error
        if said:
            rank_zero_info(f"{self.state_key}: {said} Steps of the run: {horizon.total_steps} ({source}).")
        if warned:
            rank_zero_warn(f"{self.state_key}: {warned}", category=LightningPluginsWarning)

    @staticmethod
    def _samples_per_step(trainer: Trainer) -> int:
        samples = samples_per_step(trainer)
        if samples is None:
            raise MisconfigurationException(
                "`HalfLife(samples=...)` must find the batch size of the training loader, which has none: "
                "give the half-life as HalfLife(steps=...)."
            )
        return samples

    def _release_clock(self) -> None:
        """Take the hooks off the optimizer; the count stays."""
        if self._clock is not None:
            self._counter.applied = self._clock.applied
            self._clock.close()
        self._trainer, self._clock = None, None
        self._in_batch = False

    def _report(self) -> None:
        """Log what the clock and the shadows noticed."""
        while self._clock is not None and self._clock.news:
            rank_zero_info(f"{self.state_key}: {self._clock.news.pop(0)}")
        for shadow in self._shadows:
            changes, shadow.changes = shadow.changes, None
            for line in changes.news if changes else ():
                rank_zero_info(f"{self.state_key}: {line}")
            for line in changes.losses if changes else ():
                rank_zero_warn(f"{self.state_key}: {line}", category=LightningPluginsWarning)

    # -- files

    def get_state(self) -> dict[str, Any]:
        """Return the counters; nothing before the first step, or when other weights were loaded after the fit."""
        if self._clock is not None:
            self._counter.applied = self._clock.applied
        if self._shadows and not self._serves(self._shadows[0].module):
            return {}
        return dict(self._counter.state())

    def set_state(self, state: dict[str, Any]) -> None:
        """Take the counters over."""
        self._counter.load(state)

    def _watch_files(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See every checkpoint that the run writes or reads, and weights that are loaded in mid-fit."""

        @contextlib.contextmanager
        def loading(checkpoint: dict[str, Any]) -> Iterator[None]:
            running = self._clock is not None
            if running:
                self._before_loading()
            yield
            if running:
                self._restore_in_mid_fit(trainer, pl_module, checkpoint)

        self._loaded_from = None
        watch_files(
            self._file_patches,
            trainer.strategy,
            before_writing=lambda checkpoint: self._before_writing(trainer, checkpoint),
            before_reading=lambda path: self._before_reading(trainer, path),
            loading=loading,
        )

    def _before_reading(self, trainer: Trainer, path: Any) -> None:
        self._loaded_from = path
        if self._clock is not None and trainer.strategy.restore_checkpoint_after_setup:
            # such a strategy writes into the module when it reads
            self._before_loading()

    def _sets_beside(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> DistributedSets | None:
        """Return the sets of weights that a distributed checkpoint has in its folder, ``None`` for any other."""
        return open_sets(checkpoint, self._loaded_from if self._file_patches else trainer.ckpt_path, pl_module)

    def _restore_in_mid_fit(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint whose weights were loaded while the fit is running, as a resumed fit does."""
        clock = self._clock
        if clock is None:
            return
        found = self._restore(trainer, pl_module, checkpoint)
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if found:
            if state is not None:
                self.load_state_dict(state)
            self._place_restored(pl_module)
            self._pace.follow_origin()
        else:
            applied = clock.applied
            self._forget()
            self._begin_if_due(pl_module, applied)
            rank_zero_info(f"{self.state_key}: weights without an average were loaded; the average begins anew.")
        self._report()
        clock.restore(self._counter.applied)

    # -- what the module holds

    def _serves(self, pl_module: Any) -> bool:
        """Return whether ``pl_module`` is the averaged module and still holds what it did when its fit ended."""
        if not self._shadows or self._shadows[0].module is not pl_module:
            return False
        return self._fitting or self._shadows[0].untouched()
