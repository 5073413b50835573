"""What the optimizers of a Trainer's run follow: a schedule with its lengths counted for that run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

from lightning_plugins.core.durations import RunLengthUnknownError, ScheduleTooLongError
from lightning_plugins.core.lightning import MisconfigurationException, Trainer, rank_zero_info, rank_zero_warn
from lightning_plugins.core.run_length import RunAhead, RunEnd, run_ahead, run_end, source_of_length
from lightning_plugins.core.time_limit import TimeLimit, time_limit
from lightning_plugins.core.validation import LightningPluginsWarning, real_number, whole_number
from lightning_plugins.schedules.continuation import Course, resolve
from lightning_plugins.schedules.schedule import Schedule
from lightning_plugins.schedules.time_budget import TimeBudget, resolve_in_time

# seconds, some hundred years: more is no time that a run took
_LONGEST_RUN = 1e10
Schedules = Schedule | dict[str | int, Schedule]


class RunPlan(ABC):
    """A schedule and the run that it is followed in.

    Args:
        schedule: A schedule, or one for each named group.
        title: What it is called in log lines.

    Attributes:
        resolved: The schedule for the run as it is known now, once training has started.
    """

    def __init__(self, schedule: Schedules, title: str) -> None:
        self._schedule, self._title = schedule, title
        self.resolved: Schedules | None = None

    def resolved_for(self, total_steps: int, steps_per_epoch: float | None) -> Schedules:
        """Return the schedule for a run of so many steps, to look at before training."""
        return cast(Schedules, each_schedule(self._schedule, lambda part: part.resolve(total_steps, steps_per_epoch)))

    @abstractmethod
    def forget(self) -> None:
        """Forget another run."""

    def prepare(self, trainer: Trainer) -> None:  # noqa: B027  # most have nothing to do
        """Prepare when a fit begins: states are loaded by then."""

    @abstractmethod
    def begin(self, trainer: Trainer, *, automatic: bool) -> int:
        """Begin when training starts; return the position of a run whose schedulers have restored none."""

    @abstractmethod
    def look(self, trainer: Trainer, *, automatic: bool, batch_idx: int | None = None) -> Schedules | None:
        """Return what to follow from here on, or ``None`` where nothing has changed."""

    def sees_other_accumulation(self, trainer: Trainer) -> bool:
        """Return whether so many batches make a step that :meth:`look` has to be called."""
        return False

    def position(self, *, pause: bool = False) -> int | None:
        """Return the position after a batch or a pause, ``None`` where steps alone tell it."""
        return None

    def end(self) -> None:  # noqa: B027
        """Tell what there is to tell at the end of training."""

    def release(self) -> None:  # noqa: B027
        """Stop."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` has returned."""


class StepPlan(RunPlan):
    """A schedule for the run's steps, counted again whenever something that their number depends on has changed."""

    def __init__(self, schedule: Schedules, title: str) -> None:
        super().__init__(schedule, title)
        self._course: Course | None = None
        self._planned_end: RunEnd | None = None
        self._accumulation = 0

    def forget(self) -> None:
        """Forget another run."""
        self._course = None

    def begin(self, trainer: Trainer, *, automatic: bool) -> int:
        """Return the steps that were taken."""
        taken: int = trainer.global_step
        return taken if automatic else taken // max(len(trainer.optimizers), 1)  # there it counts every optimizer's

    def sees_other_accumulation(self, trainer: Trainer) -> bool:
        """Return whether the accumulation is another one since the length was asked for."""
        return bool(trainer.accumulate_grad_batches != self._accumulation)

    def look(self, trainer: Trainer, *, automatic: bool, batch_idx: int | None = None) -> Schedules | None:
        """Return what to follow from here on, or ``None`` where the run's length is the one that was known.

        Raises:
            MisconfigurationException: If a share of a run of unknown length is asked for.
        """
        self._accumulation = trainer.accumulate_grad_batches
        if not automatic:
            return self._look_once(run_ahead(trainer))
        now, end = run_ahead(trainer, batch_idx), run_end(trainer)
        before = self._course or Course(now, now)
        parts = self._schedule.values() if isinstance(self._schedule, dict) else (self._schedule,)
        course = before.goes_on(now, end, parts)
        total, source = now.total_steps(end), source_of_length(trainer)
        if self.resolved is not None and end == self._planned_end and (course is before or total is None):
            return None  # a length that is not known any more leaves what was planned
        seen = course.curve if course.curve == course.latest else now
        resolved = each_schedule(self._schedule, lambda part: _resolve(part, seen, end, source))
        followed: Schedules = each_schedule(self._schedule, lambda part: course.follow(part, end))
        if resolved != self.resolved:
            known = before.latest.total_steps(end)
            steps = "unknown" if total is None else str(total)
            if known != total:
                steps += f", before: {known}; it goes on from where it stands"
            rank_zero_info(f"{self._title}: {resolved}. Steps of the run: {steps} ({source}).")
        self._course, self._planned_end, self.resolved = course, end, resolved
        return followed

    def _look_once(self, ahead: RunAhead) -> Schedules | None:
        """Return what manual optimization follows, whose number of steps the module alone knows."""
        if self.resolved is not None:
            return None
        source = "manual optimization: only the module knows its steps"
        unknown = RunAhead(None, ahead.accumulation)
        self.resolved = each_schedule(self._schedule, lambda part: _resolve(part, unknown, RunEnd(None, None), source))
        rank_zero_info(f"{self._title}: {self.resolved}. Steps of the run: unknown ({source}).")
        return self.resolved

    def state(self) -> dict[str, Any]:
        """Return what lay ahead of the run, for a checkpoint."""
        return {} if self._course is None else {"run": self._course.as_state()}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` has returned."""
        if "run" in state:
            self._course = Course.from_state(state["run"])


class TimePlan(RunPlan):
    """A schedule for the time that the run may take; see :class:`~lightning_plugins.schedules.time_budget.TimeBudget`.

    Every length is a share; positions are milliseconds.
    """

    def __init__(self, schedule: Schedules, title: str) -> None:
        super().__init__(schedule, title)
        self._elapsed = 0.0
        self._limit: TimeLimit | None = None
        self._budget: TimeBudget | None = None
        self._followed: Schedules | None = None

    def resolved_for(self, total_steps: int, steps_per_epoch: float | None) -> Schedules:
        """Return the schedule for so many equal parts of the time."""
        whole_number("total_steps", total_steps, unit="steps")
        return cast(Schedules, each_schedule(self._schedule, lambda part: resolve_in_time(part, total_steps)))

    def forget(self) -> None:
        """Forget another run."""
        self._elapsed = 0.0

    def prepare(self, trainer: Trainer) -> None:
        """Ask for the limit when a fit begins: states are loaded by then, and no Timer has begun.

        Raises:
            MisconfigurationException: If there is none.
        """
        self._limit = time_limit(trainer)
        if self._limit is None:
            raise MisconfigurationException(
                "`clock='time'` needs a run that ends by time. Give it one: `Trainer(max_time='00:12:00:00')`, or a "
                "`Timer` with a duration among the callbacks."
            )

    def begin(self, trainer: Trainer, *, automatic: bool) -> int:
        """Count the shares and start the clock; return the milliseconds that are over.

        Raises:
            MisconfigurationException: If a length is no share.
        """
        assert self._limit is not None  # noqa: S101  # asked for by `prepare`
        known = max(self._elapsed, self._limit.elapsed)
        share = trainer.strategy.broadcast if trainer.world_size > 1 else None
        self._budget = budget = TimeBudget(known, self._limit.remaining, share)
        try:
            self._followed = each_schedule(self._schedule, lambda part: resolve_in_time(part, budget.total))
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        return budget.position

    def look(self, trainer: Trainer, *, automatic: bool, batch_idx: int | None = None) -> Schedules | None:
        """Return the schedule once: a limit of time does not change."""
        if self.resolved is not None or self._budget is None:
            return None
        self.resolved, budget = self._followed, self._budget
        over = f", {budget.position} are over" if budget.position else ""
        rank_zero_info(f"{self._title}: {self.resolved}. Milliseconds of the run: {budget.total}{over}.")
        return self.resolved

    def position(self, *, pause: bool = False) -> int | None:
        """Return the milliseconds that are over, after a batch or a pause; ``None`` before training has started."""
        if self._budget is None:
            return None
        return self._budget.after_pause() if pause else self._budget.after_batch()

    def end(self) -> None:
        """Tell when something else than time has ended the run."""
        if self._budget is not None and self._budget.left > 0:
            left = self._budget.left
            rank_zero_info(f"{self._title}: the run ends inside it, with {left:.1f} s of its time left.")

    def release(self) -> None:
        """Stop the clock; a second fit goes on from there."""
        if self._budget is not None:
            self._elapsed, self._budget = self._budget.elapsed, None

    def state(self) -> dict[str, Any]:
        """Return the seconds that are over, for a checkpoint."""
        return {"elapsed": self._elapsed if self._budget is None else self._budget.elapsed}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` has returned."""
        if "elapsed" in state:
            self._elapsed = float(real_number("elapsed", state["elapsed"], at_least=0, at_most=_LONGEST_RUN))


def each_schedule(schedule: Schedules, function: Callable[[Schedule], Schedule]) -> Any:
    """Apply ``function`` to a schedule, or to those of each group."""
    if isinstance(schedule, dict):
        return {name: function(part) for name, part in schedule.items()}
    return function(schedule)


def _resolve(schedule: Schedule, ahead: RunAhead, end: RunEnd, source: str) -> Schedule:
    try:
        return resolve(schedule, ahead, end)
    except RunLengthUnknownError as error:
        raise MisconfigurationException(f"{error} Here, {source}; or set the Trainer's `max_steps`.") from error
    except ScheduleTooLongError as error:
        rank_zero_warn(
            f"The run of {ahead.total_steps(end)} steps ({source}) ends inside the learning-rate schedule: {error}",
            category=LightningPluginsWarning,
        )
        return resolve(schedule, ahead, end, strict=False)
