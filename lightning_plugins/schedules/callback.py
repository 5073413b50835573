"""The callback that drives the learning rate of a Trainer's optimizers along a schedule."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_plugins.core.lightning import (
    Callback,
    LightningModule,
    LRSchedulerConfig,
    MisconfigurationException,
    RemainingEnd,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
    run_length,
    torch_optimizers,
)
from lightning_plugins.core.run_length import RunLength
from lightning_plugins.core.validation import (
    LightningPluginsWarning,
    one_of,
    real_number,
    shown,
    true_or_false,
    whole_number,
)
from lightning_plugins.schedules.durations import RunLengthUnknownError, ScheduleTooLongError
from lightning_plugins.schedules.plateau import Plateau, PlateauState
from lightning_plugins.schedules.ramps import Constant
from lightning_plugins.schedules.schedule import Schedule
from lightning_plugins.schedules.scheduler import ScheduleLR, check_base_lr, check_schedule, is_own_state

_VERSION = 1
_NEVER = sys.maxsize  # frequency at which Lightning steps our scheduler, which follows the optimizer by itself
_REWRITE_BASE_RATES = ("CyclicLR", "OneCycleLR")  # torch's; the user's own rate is lost in their groups


class LearningRateScheduler(Callback):
    """Sets the learning rate of every optimizer step: max(base * schedule(t) * plateau, min_lr).

    The length of the run is found when training starts, whatever sets it (``max_steps``, ``max_epochs``, accumulation
    by the Trainer or by a callback), and is logged with its source. If the accumulation changes in a way that nobody
    announced, the schedule is stretched to the new length.

    *When.* The rate of step t is in the optimizer when step t runs, from the first on. It changes once per optimizer
    step, not per batch. *Checkpoint.* The position is saved with the Trainer's other learning-rate schedulers, the
    plateau's state under this callback's key; the curve itself comes from the arguments, so a run that is resumed with
    a longer horizon follows the new curve at once. Added to a run that is resumed from a checkpoint without it, it
    starts at the steps already taken. *Distributed.* Every rank computes the same rates; a monitored metric is rank
    zero's. *Cost.* About what a torch scheduler costs.

    Args:
        schedule: Factor by step; lengths may be shares of the run.
        base_lr: Absolute base rate for all parameter groups, or one for each. ``None``: each group's own rate, on
            resume the checkpoint's.
        min_lr: Absolute rate below which no group falls, at least 0; it lifts the warm-up too.
        optimizer: Index of the optimizer to schedule; ``None``: all. Lightning steps several optimizers only in
            manual optimisation, where the rate follows each optimizer's own steps; there the length of the run cannot
            be known, so give lengths in steps.
        plateau: Multiplies the schedule by a factor that shrinks when a metric stalls.
        existing: What to do with an optimizer that ``configure_optimizers`` already schedules: ``"refuse"``, or
            ``"replace"`` its scheduler.
        clock: What a position counts. ``"attempted"``: steps as ``trainer.global_step`` counts them, and as the run's
            length is planned. ``"applied"``: those that changed the weights, so the schedule waits while the gradient
            scaler skips and may not reach its end.
        record: Whether to keep every step's rate in :attr:`lrs`.

    Attributes:
        lrs: With ``record=True`` the rate of every step that this process took: a float, or a tuple when the optimizer
            has several groups.
        resolved: The schedule with its lengths in steps, once training has started.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If one is out of range.
        MisconfigurationException: When the fit starts, if the schedule clashes with the module or the Trainer.

    Example:
        >>> from lightning_plugins import LearningRateScheduler, WarmupCosine
        >>> scheduler = LearningRateScheduler(WarmupCosine(warmup="5%", hold="5%"))
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        base_lr: float | Sequence[float] | None = None,
        min_lr: float = 0.0,
        optimizer: int | None = None,
        plateau: Plateau | None = None,
        existing: str = "refuse",
        clock: str = "attempted",
        record: bool = False,
    ) -> None:
        check_schedule(schedule)
        if plateau is not None and not isinstance(plateau, Plateau):
            raise TypeError(f"`plateau` must be a Plateau, got {shown(plateau)}.")
        self.schedule = schedule
        self.base_lr = check_base_lr(base_lr)
        self.min_lr = real_number("min_lr", min_lr, at_least=0)
        self.optimizer = None if optimizer is None else whole_number("optimizer", optimizer)
        self.plateau = plateau
        self.existing = one_of("existing", existing, ("refuse", "replace"))
        self.clock = one_of("clock", clock, ("attempted", "applied"))
        self.record = true_or_false("record", record)
        self._state_key = f"LearningRateScheduler[optimizer={self.optimizer}]"  # Lightning reads it at every hook
        self.lrs: list[float | tuple[float, ...]] = []
        self.resolved: Schedule | None = None
        self._schedulers: list[_TrainerLR] = []
        self._accumulation = 0
        self._epoch_begins = True
        self._announces = False  # whether steps may be skipped unseen: manual optimisation under a gradient scaler
        self._plateau_state = PlateauState()
        self._metric: Any = None  # the monitored metric as last seen: a new one is another object
        self._validated = False  # whether it is validation that logs it
        self._end = RemainingEnd()

    @property
    def state_key(self) -> str:
        """One key for each choice of optimizer."""
        return self._state_key

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the plateau's state, if there still is one; the position comes with the Trainer's schedulers."""
        if self.plateau is not None:
            self._plateau_state = PlateauState(*state_dict["plateau"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put a scheduler beside each optimizer; it is told its schedule when the run's length is known."""
        configs = trainer.strategy.lr_scheduler_configs
        for optimizer in self._chosen(trainer):
            self._displace(configs, optimizer)
            scheduler = _TrainerLR(
                optimizer,
                base_lr=self.base_lr,
                min_lr=self.min_lr,
                clock=self.clock,
            )
            self._schedulers.append(scheduler)
            configs.append(LRSchedulerConfig(scheduler, interval="step", frequency=_NEVER))
        self._end.watch(trainer, lambda: self.on_train_start(trainer, pl_module))  # for the rate at the end

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start at the restored position, or at the steps already taken."""
        self._end.remove()
        taken = trainer.global_step
        if not pl_module.automatic_optimization:
            taken //= max(len(trainer.optimizers), 1)  # there global_step counts every optimizer's
        self.resolved = None  # every fit logs its schedule
        if taken == 0:  # a new run, whatever this callback did before
            self.lrs.clear()
            self._plateau_state = PlateauState()
        elif not all(scheduler.restored for scheduler in self._schedulers):
            rank_zero_info(f"LearningRateScheduler joins a run that has taken {taken} steps, and starts there.")
        for scheduler in self._schedulers:
            scheduler.scale = self._plateau_state.factor
            scheduler.seek(scheduler.position if scheduler.restored else taken)
            # only from here on: to load the state of a sharded optimizer, torch takes a step that is none of the run's
            scheduler.record = self.lrs.append if self.record else None
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._epoch_begins, self._announces = True, scaled and not pl_module.automatic_optimization
        self._plan(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look around before the epoch's first step; other callbacks may still act before it."""
        self._epoch_begins = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look around before a step: has somebody changed the accumulation, or taken our place?

        In manual optimisation, announce a step that the gradient scaler may skip.
        """
        if trainer.accumulate_grad_batches != self._accumulation:
            self._plan(trainer, pl_module, trainer.fit_loop.epoch_loop.batch_idx)
        if self._epoch_begins:
            self._epoch_begins = False
            self._step_aside(trainer)
        if self._announces:
            for scheduler in self._schedulers:
                if scheduler.optimizer is optimizer:
                    scheduler.announce()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """In automatic optimisation, catch up with a step that the gradient scaler skipped."""
        if pl_module.automatic_optimization and self.clock == "attempted":
            for scheduler in self._schedulers:
                if scheduler.position != trainer.global_step:
                    scheduler.skip_to(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metric as it is, so that only what this validation logs is new."""
        self._new_metric(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a metric of the validation to the plateau, before checkpoints are written."""
        if not trainer.sanity_checking:
            value = self._new_metric(trainer)
            self._validated |= value is not None
            self._show_plateau(trainer, value)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a metric of the training epoch to the plateau."""
        value = self._new_metric(trainer)
        self._show_plateau(trainer, None if self._validated else value)

    def state_dict(self) -> dict[str, Any]:
        """Return the plateau's state, if there is a plateau."""
        return {} if self.plateau is None else {"version": _VERSION, "plateau": list(self._plateau_state)}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo: Lightning calls no ``teardown`` after an exception or Ctrl-C."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo."""
        self._release()

    def _release(self) -> None:
        """Take every hook off the optimizers."""
        self._end.remove()
        for scheduler in self._schedulers:
            scheduler.close()
        self._schedulers = []
        self._metric, self._validated = None, False

    def _chosen(self, trainer: Trainer) -> list[Optimizer]:
        optimizers = torch_optimizers(trainer)
        if self.optimizer is None:
            return optimizers
        if self.optimizer >= len(optimizers):
            raise MisconfigurationException(
                f"`optimizer` must be the index of one of the module's {len(optimizers)} optimizers, "
                f"got {self.optimizer}."
            )
        return [optimizers[self.optimizer]]

    def _displace(self, configs: list[Any], optimizer: Optimizer) -> None:
        """Refuse or remove schedulers of the same rates."""
        for config in [config for config in configs if _drives_lr_of(config.scheduler, optimizer)]:
            name = type(config.scheduler).__name__
            if self.existing == "refuse":
                raise MisconfigurationException(
                    f"the {type(optimizer).__name__} is already scheduled, by a {name}. Either return the optimizer "
                    "without a scheduler from `configure_optimizers`, or pass "
                    "`LearningRateScheduler(..., existing='replace')`, which takes that scheduler away."
                )
            if self.base_lr is None and _rewrites_base_rates(config.scheduler):
                raise MisconfigurationException(
                    f"`base_lr` must be given to replace a {name}, which has overwritten the optimizer's own rates."
                )
            configs.remove(config)
            rank_zero_info(f"LearningRateScheduler replaces the module's {name}.")

    def _step_aside(self, trainer: Trainer) -> None:
        """Leave the rates of an optimizer to whoever put a scheduler in our place, as Lightning's SWA callback does."""
        ours = {id(config.scheduler) for config in trainer.lr_scheduler_configs}
        for scheduler in [scheduler for scheduler in self._schedulers if id(scheduler) not in ours]:
            scheduler.close()
            self._schedulers.remove(scheduler)
            rank_zero_info("LearningRateScheduler leaves an optimizer to the scheduler that has replaced its own.")

    def _plan(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int | None = None) -> None:
        """Resolve the schedule for the run's length and follow it from here on."""
        self._accumulation = trainer.accumulate_grad_batches
        length = RunLength(None, None, "manual optimisation: only the module knows its steps")
        if pl_module.automatic_optimization:
            length = run_length(trainer, batch_idx)
        resolved = _resolve(self.schedule, length)
        if resolved != self.resolved:
            steps = "unknown" if length.total_steps is None else length.total_steps
            rank_zero_info(f"Learning-rate schedule: {resolved}. Steps of the run: {steps} ({length.source}).")
        self.resolved = resolved
        for scheduler in self._schedulers:
            scheduler.schedule = resolved
            scheduler.seek(scheduler.position)

    def _new_metric(self, trainer: Trainer) -> float | None:
        """Return the monitored metric if it was logged since the last look, else ``None``."""
        if self.plateau is None:
            return None
        before, self._metric = self._metric, trainer.callback_metrics.get(self.plateau.monitor)
        return None if self._metric is None or self._metric is before else float(self._metric)

    def _show_plateau(self, trainer: Trainer, value: float | None) -> None:
        if self.plateau is None:
            return
        if trainer.world_size > 1:  # ranks that disagree would train with different rates
            value = trainer.strategy.broadcast(value)
        if value is None:
            return
        before, self._plateau_state = self._plateau_state, self.plateau.update(self._plateau_state, value)
        if self._plateau_state.factor != before.factor:
            rank_zero_info(f"{self.plateau.monitor} stalls: the schedule is scaled by {self._plateau_state.factor:g}.")
        for scheduler in self._schedulers:
            scheduler.scale = self._plateau_state.factor
            scheduler.seek(scheduler.position)


class _TrainerLR(ScheduleLR):
    """A :class:`ScheduleLR` that follows its optimizer by a hook, and is given its schedule later.

    Its position is what the optimizer has done, in automatic as in manual optimisation, where Lightning steps no
    scheduler. Calls of ``step()`` by a module are harmless.
    """

    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        self.record: Callable[[Any], None] | None = None
        self.restored = False
        super().__init__(optimizer, Constant(), **options)

    def step(self, epoch: int | None = None) -> None:
        """Move on if the optimizer has; the argument that some modules pass is an epoch, which is not our unit."""
        if self.step_clock.attempted != self._steps_seen:
            self._note()
            super().step()

    def announce(self) -> None:
        """Catch up with a step that was announced but skipped, then announce the next."""
        self.step()
        self.step_clock.attempt()

    def skip_to(self, position: int) -> None:
        """Go to a position that no hook told of."""
        self._note()
        self.seek(position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over our own state; another scheduler's is recognised and left alone."""
        if not is_own_state(state_dict):
            rank_zero_info("LearningRateScheduler does not load the state of the scheduler that was here before it.")
            return
        super().load_state_dict(state_dict)
        self.restored = True

    def _note(self) -> None:
        """Record the rates of the step that is over."""
        if self.record is not None:
            self.record(self._last_lr[0] if len(self._last_lr) == 1 else tuple(self._last_lr))

    def _next_position(self) -> int:
        return self._origin + self._ticks()

    def _after_step(self) -> None:
        self.step()


def _resolve(schedule: Schedule, length: RunLength) -> Schedule:
    total, per_epoch = length.total_steps, length.steps_per_epoch
    try:
        return schedule.resolve(total, per_epoch or None)
    except RunLengthUnknownError as error:
        raise MisconfigurationException(f"{error} Here, {length.source}; or set the Trainer's `max_steps`.") from error
    except ScheduleTooLongError as error:
        resolved = schedule.resolve(total, per_epoch or None, strict=False)
        rank_zero_warn(
            f"The run of {total} steps ({length.source}) ends inside the learning-rate schedule: {error}",
            category=LightningPluginsWarning,
        )
        return resolved


def _drives_lr_of(scheduler: Any, optimizer: Optimizer) -> bool:
    return getattr(scheduler, "optimizer", None) is optimizer and getattr(scheduler, "parameter", "lr") == "lr"


def _rewrites_base_rates(scheduler: Any) -> bool:
    kinds = {type(part).__name__ for part in (scheduler, *getattr(scheduler, "_schedulers", ()))}
    return bool(kinds.intersection(_REWRITE_BASE_RATES))
