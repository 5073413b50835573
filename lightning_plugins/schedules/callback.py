"""The callback that drives the learning rate of a Trainer's optimizers along a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer

from lightning_plugins.core.callback import Callback, Stage
from lightning_plugins.core.lightning import LightningModule, MisconfigurationException, Trainer, rank_zero_info
from lightning_plugins.core.validation import one_of, real_number, shown, true_or_false, whole_number
from lightning_plugins.core.zero import is_deepspeed
from lightning_plugins.schedules.attached_schedulers import AttachedSchedulers
from lightning_plugins.schedules.plateau import Plateau, PlateauState, PlateauWatch
from lightning_plugins.schedules.plot import draw_panels, drawn_steps
from lightning_plugins.schedules.preview import preview_groups
from lightning_plugins.schedules.ramps import Constant
from lightning_plugins.schedules.run_plan import RunPlan, Schedules, StepPlan, TimePlan, each_schedule
from lightning_plugins.schedules.schedule import Schedule
from lightning_plugins.schedules.scheduler import ScheduleLR
from lightning_plugins.schedules.scheduler_arguments import (
    CLOCKS,
    GroupSchedules,
    check_base_lr,
    check_parameter,
    check_schedules,
)


class LearningRateScheduler(Callback):
    """Sets the learning rate of every optimizer step: max(base * schedule(t) * plateau, min_lr).

    The run's length is found when training starts and logged with its source. When it changes (a loader of another
    length, other accumulation, an epoch that was left), the schedule goes on from the value where it stands and ends
    with the run. A longer horizon (more epochs on resume) is followed from the next step on.

    With ``clock="time"`` the shares are those of the time that the run may take (``Trainer(max_time=...)`` or a
    ``Timer``), and the rate reaches its end when time does. Such a run cannot be repeated bit by bit.

    A rate that was written elsewhere (by a finetuning callback, a search, your code) is that group's rate at this step,
    and its base rate from there on is rate / schedule(t). timm's ``lr_scale`` of a group multiplies its rate.

    When:
        The rate of step t is in the optimizer when step t runs, from the first on. It changes once per optimizer step,
        not per batch.

    Checkpoint:
        The position is saved with the Trainer's other learning-rate schedulers, the plateau's state and the run's
        length under this callback's key; the curve comes from the arguments. Added to a resumed run that had none, it
        starts at the steps already taken.

    Distributed:
        Every rank computes the same rates; a monitored metric is rank zero's. Time is rank zero's too: it is broadcast
        after 1, 2, 4, ... batches, at most 128 and at least once a second, and goes on at the pace of the last batches.

    Cost:
        About what a torch scheduler costs.

    Does not compose with:
        Another scheduler of the same rates, unless it is replaced (``existing``). Several of these callbacks may drive
        different parameters or groups of one optimizer.

    Args:
        schedule: Factor by step; lengths may be shares of the run. Or a mapping from a group's name or index to a
            schedule: groups that are not named keep their own rate.
        base_lr: Absolute base rate for all parameter groups, or one for each. ``None``: each group's own rate, on
            resume the checkpoint's.
        min_lr: Absolute rate below which no group falls, at least 0; it lifts the warm-up too.
        optimizer: Index of the optimizer to schedule; ``None``: all. In manual optimization each rate follows its
            optimizer's own steps, and the length of the run cannot be known, so give lengths in steps.
        parameter: The entry of the groups to set: ``"lr"``, ``"weight_decay"``, ``"momentum"``, ``"betas"`` (the first
            of them), ... The other arguments are then about that. A group in which it is 0 keeps 0.
        plateau: Multiplies the schedule by a factor that shrinks when a metric stalls.
        existing: What to do with an optimizer that ``configure_optimizers`` already schedules: ``"refuse"``, or
            ``"replace"`` its scheduler.
        clock: What a position counts. ``"attempted"``: steps as ``trainer.global_step`` counts them, and as the run's
            length is planned. ``"applied"``: those that changed the weights, so the schedule waits while the gradient
            scaler skips and may not reach its end. ``"time"``: milliseconds of training, as Lightning's ``Timer``
            counts them, earlier parts of the run included; every length must be a share.
        record: Whether to keep every step's rate in :attr:`lrs`.

    Attributes:
        lrs: With ``record=True`` the rate that each step of this process ran with: a float, or a tuple when the
            optimizer has several groups.
        resolved: The schedule with its lengths counted for the run as it is known now, once training has started.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If one is out of range.
        MisconfigurationException: When the fit starts, if the schedule clashes with the module or the Trainer; at the
            end of the first epoch with a validation, if the plateau's metric was not logged.

    Example:
        >>> from lightning_plugins import LearningRateScheduler, WarmupCosine
        >>> scheduler = LearningRateScheduler(WarmupCosine(warmup="5%", hold="5%"))
    """

    stage = Stage.RATES

    def __init__(
        self,
        schedule: Schedule | GroupSchedules,
        *,
        base_lr: float | Sequence[float] | None = None,
        min_lr: float = 0.0,
        optimizer: int | None = None,
        parameter: str = "lr",
        plateau: Plateau | None = None,
        existing: Literal["refuse", "replace"] = "refuse",
        clock: Literal["attempted", "applied", "time"] = "attempted",
        record: bool = False,
    ) -> None:
        given: Any = plateau
        if plateau is not None and not isinstance(given, Plateau):
            remedy = f" Write Plateau({shown(given)})." if isinstance(given, str) else ""
            raise TypeError(f"`plateau` must be a Plateau, got {shown(given)}.{remedy}")
        self.schedule = check_schedules(schedule)
        self.base_lr = check_base_lr(base_lr)
        self.min_lr = real_number("min_lr", min_lr, at_least=0)
        self.optimizer = None if optimizer is None else whole_number("optimizer", optimizer)
        self.parameter = check_parameter(parameter)
        self.plateau = plateau
        self.existing = one_of("existing", existing, ("refuse", "replace"))
        one_of("clock", clock, CLOCKS)
        self.clock = clock
        self.record = true_or_false("record", record)
        identity: dict[str, Any] = {"optimizer": self.optimizer}
        if self.parameter != "lr":
            identity["parameter"] = self.parameter
        if isinstance(self.schedule, dict):
            identity["groups"] = list(self.schedule)
        super().__init__(**identity)
        self.lrs: list[float | tuple[float, ...]] = []
        options = {"base_lr": self.base_lr, "min_lr": self.min_lr, "clock": self.clock, "parameter": self.parameter}
        first = each_schedule(self.schedule, lambda _: Constant())
        self._attached = AttachedSchedulers(first, self.optimizer, self.existing, options)
        title = "Learning-rate schedule" if self.parameter == "lr" else f"Schedule of `{self.parameter}`"
        self._run: RunPlan = (TimePlan if clock == "time" else StepPlan)(self.schedule, title)
        self._epoch_begins = True
        self._announces = False  # whether steps may be skipped unseen: manual optimization under a gradient scaler
        self._by_batch = False  # whether the optimizer's own steps are none of the run's
        # in automatic optimization: whether positions are the Trainer's steps, or the optimizer's; this batch's step
        self._trainers_clock = self._own_clock = self._announced = False
        self._watch = None if plateau is None else PlateauWatch(plateau)

    @property
    def resolved(self) -> Schedules | None:
        """The schedule with its lengths counted for the run as it is known now, once training has started."""
        return self._run.resolved

    def preview(
        self, optimizer: Optimizer, total_steps: int, steps_per_epoch: float | None = None
    ) -> dict[str | int, list[float]]:
        """Return what every group of an optimizer would have in each step of a run, without training.

        Args:
            optimizer: As ``configure_optimizers`` returns it; it is not changed.
            total_steps: Optimizer steps of the run; with ``clock="time"`` equal parts of its time.
            steps_per_epoch: Optimizer steps of an epoch, for durations in epochs.

        Returns:
            A list for each group, by its name, or by its index where it has none: rates, or what ``parameter`` names.
            The plateau counts as one that never stalls.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If the schedule does not fit into the run, or a group lacks what is asked for.

        Example:
            >>> import torch
            >>> from lightning_plugins import LearningRateScheduler, Linear
            >>> optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "name": "head"}], lr=0.4)
            >>> LearningRateScheduler(Linear("50%", 1, 0.5)).preview(optimizer, 4)
            {'head': [0.4, 0.30000000000000004, 0.2, 0.2]}
        """
        schedule = self._run.resolved_for(total_steps, steps_per_epoch)
        return preview_groups(optimizer, schedule, total_steps, self._attached.options)

    def plot(
        self,
        optimizer: Optimizer,
        total_steps: int,
        path: str | Path,
        *,
        beside: Sequence[LearningRateScheduler] = (),
        steps_per_epoch: float | None = None,
    ) -> Path:
        """Draw what :meth:`preview` returns; needs matplotlib (``pip install lightning-plugins[plot]``).

        Args:
            optimizer: As ``configure_optimizers`` returns it; it is not changed.
            total_steps: Optimizer steps of the run.
            path: Where to write; the suffix chooses the format. Parent directories are made.
            beside: Others that drive the same optimizer; each parameter has a panel of its own.
            steps_per_epoch: Optimizer steps of an epoch, for durations in epochs.

        Returns:
            The path written.
        """
        steps = drawn_steps(whole_number("total_steps", total_steps, at_least=1, unit="steps"))
        panels: dict[str, dict[str, list[float]]] = {}
        for callback in (self, *beside):
            for name, values in callback.preview(optimizer, total_steps, steps_per_epoch).items():
                panels.setdefault(callback.parameter, {})[str(name)] = [values[step] for step in steps]
        return draw_panels(panels, steps, path)

    # -- hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget another run; a state of this one is loaded later."""
        super().setup(trainer, pl_module, stage)
        counts = pl_module.automatic_optimization and self.clock == "attempted"
        if stage == "fit" and is_deepspeed(trainer.strategy) and not counts:
            raise MisconfigurationException(
                "`clock` must be 'attempted' under DeepSpeed, in automatic optimization: its optimizer's own steps, "
                f"one for each part of the weights, are none of the run's; got {self.clock!r}."
            )
        if stage == "fit" and trainer.global_step == 0:
            self._run.forget()
            self._watch = None if self.plateau is None else PlateauWatch(self.plateau)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put a scheduler beside each optimizer; it is told its schedule when the run's length is known."""
        self._run.prepare(trainer)
        self._attached.attach(trainer)
        self.when_nothing_is_left(trainer, lambda: self.on_train_start(trainer, pl_module))  # for the rate at the end

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start at the restored position, or at the steps already taken."""
        self.training_starts()
        self._run.resolved = None  # every fit logs its schedule
        stands, timed = self._run.begin(trainer, automatic=pl_module.automatic_optimization), self.clock == "time"
        if trainer.global_step == 0:
            self.lrs.clear()
        elif any(scheduler.restored is False for scheduler in self._attached.schedulers):
            rank_zero_info("LearningRateScheduler does not load the state of the scheduler that was here before it.")
        elif not all(scheduler.restored for scheduler in self._attached.schedulers):
            unit = "milliseconds" if timed else "steps"
            rank_zero_info(f"LearningRateScheduler joins a run that has taken {stands} {unit}, and starts there.")
        for scheduler in self._attached.schedulers:
            if trainer.global_step == 0:
                scheduler.rebase()
            scheduler.scale = 1.0 if self._watch is None else self._watch.state.factor
            self._start(scheduler, scheduler.position if scheduler.restored and not timed else stands, pl_module)
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._epoch_begins, self._announces = True, scaled and not pl_module.automatic_optimization
        self._own_clock = pl_module.automatic_optimization and self.clock != "attempted"
        self._trainers_clock = pl_module.automatic_optimization and not self._own_clock
        # DeepSpeed steps an inner optimizer once for each part of the weights
        self._by_batch = is_deepspeed(trainer.strategy)
        if self._watch is not None:
            self._watch.begin()
        self._plan(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the run's length again: the loader may be another one now."""
        self._epoch_begins = True
        if self._watch is not None:
            self._check_monitor(trainer)
            self._show_plateau(trainer, self._watch, self._watch.before_epoch(trainer.callback_metrics))
        self._plan(trainer, pl_module, batch_idx=0)
        self._keep_time(pause=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notice other optimizers and other schedulers; a clock of the optimizer's own follows its every step."""
        self._announced = False
        if self._epoch_begins or trainer.strategy.optimizers is not self._attached.optimizers:
            self._follow_optimizers(trainer, pl_module)
        for scheduler in self._attached.schedulers if self._own_clock else ():
            scheduler.follow(every_step=True)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Announce the step; before it, notice other accumulation and other optimizers."""
        if trainer.strategy.optimizers is not self._attached.optimizers:
            self._follow_optimizers(trainer, pl_module)
        if self._run.sees_other_accumulation(trainer):
            self._plan(trainer, pl_module, trainer.fit_loop.epoch_loop.batch_idx)
        again, self._announced = self._announced, True
        for scheduler in self._attached.schedulers if not self._by_batch else ():
            if self._announces:
                if scheduler.optimizer is optimizer:
                    scheduler.expect()
            elif not again:
                scheduler.expected = True
            elif self._trainers_clock:  # a second step with one batch is none of the Trainer's
                scheduler.refresh(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """In automatic optimization, catch up with steps that came without an announcement; look at the time."""
        for scheduler in self._attached.schedulers:
            if self._own_clock:
                scheduler.follow(every_step=False)
            elif self._trainers_clock and scheduler.last_epoch != trainer.global_step:
                scheduler.skip_to(trainer.global_step)
        self._keep_time()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metric as it is, so that only what this validation logs is new."""
        if self._watch is not None:
            self._watch.look(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a metric of the validation to the plateau, before checkpoints are written; look at the time."""
        self._keep_time(pause=True)
        if self._watch is not None and not trainer.sanity_checking:
            self._show_plateau(trainer, self._watch, self._watch.after_validation(trainer.callback_metrics))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a metric of the training epoch to the plateau."""
        if self._watch is not None:
            self._show_plateau(trainer, self._watch, self._watch.after_epoch(trainer.callback_metrics))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a metric that never came in a run of one epoch, too; tell when time has not ended the run."""
        self._check_monitor(trainer)
        self._run.end()

    def leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the rates as they are, and later files without the schedulers."""
        self._attached.detach(trainer)

    def release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take every hook off the optimizers."""
        self._attached.release()
        self._run.release()

    # -- state

    def get_state(self) -> dict[str, Any]:
        """Return what lay ahead of the run or how long it took, and the plateau's state if there is a plateau."""
        state = self._run.state()
        return state if self._watch is None else {**state, "plateau": list(self._watch.state)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over both, as far as there are any; the position comes with the Trainer's schedulers."""
        self._run.load(state)
        if self._watch is not None and "plateau" in state:
            self._watch.state = PlateauState.from_state(state["plateau"])

    # -- optimizers

    def _follow_optimizers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow optimizers that were set up anew in mid-fit, from where the run stands."""
        self._epoch_begins = False
        for new, position in self._attached.follow(trainer):
            self._start(new, position, pl_module)
        if self._trainers_clock:
            for scheduler in self._attached.schedulers:
                scheduler.refresh(trainer.global_step)  # a checkpoint may have been restored

    def _start(self, scheduler: ScheduleLR, position: int, pl_module: LightningModule) -> None:
        scheduler.seek(position)
        # only from here on: to load the state of a sharded optimizer, torch takes a step that is none of the run's
        scheduler.lrs = self.lrs if self.record else None
        scheduler.follow(every_step=not pl_module.automatic_optimization)

    # -- the run's length

    def _plan(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int | None = None) -> None:
        """Follow the schedule for the run as it is now."""
        schedule = self._run.look(trainer, automatic=pl_module.automatic_optimization, batch_idx=batch_idx)
        for scheduler in self._attached.schedulers if schedule is not None else ():
            scheduler.schedule = schedule
            scheduler.refresh()

    def _keep_time(self, *, pause: bool = False) -> None:
        position = self._run.position(pause=pause)
        if position is not None:
            for scheduler in self._attached.schedulers:
                scheduler.refresh(position)

    # -- the plateau

    def _show_plateau(self, trainer: Trainer, watch: PlateauWatch, value: float | None) -> None:
        if trainer.world_size > 1:  # ranks that disagree would train with different rates
            value = trainer.strategy.broadcast(value)
        if value is None:
            return
        if watch.show(value):
            rank_zero_info(f"{watch.plateau.monitor} stalls: the schedule is scaled by {watch.state.factor:g}.")
        for scheduler in self._attached.schedulers:
            scheduler.scale = watch.state.factor
            scheduler.refresh()

    def _check_monitor(self, trainer: Trainer) -> None:
        if self._watch is not None:
            missing = self._watch.missing(trainer.callback_metrics, validates=trainer.enable_validation)
            if missing:
                raise MisconfigurationException(missing)
