"""How long a run is, in optimizer steps: from where it stands and what lies ahead.

A *window* is the batches of one optimizer step. Lightning ends a window when the number of batches since the epoch
began is a multiple of the accumulation, and at the epoch's last batch. A Trainer is recognized by what it has.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_plugins.core.durations import Horizon
from lightning_plugins.core.validation import one_of, shown, true_or_false, whole_number


def _are_numbers(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count


@dataclass(frozen=True)
class AccumulationPlan:
    """How many batches make one optimizer step, over the course of a run.

    A callback that sets the accumulation tells its plan through a method ``accumulation_plan(trainer)``, which
    :func:`run_ahead` asks of every callback; a foreign callback may offer it too.

    Args:
        changes: ``((position, batches), ...)`` in ascending order, the first at position 0: from that position on,
            ``batches`` batches make one step.
        unit: What a position counts: epochs or optimizer steps, both from 0.
        carry: Whether a window that an epoch's end leaves incomplete goes on in the next epoch.

    Example:
        >>> AccumulationPlan(((0, 1), (10, 4)), unit="step").batches(epoch=0, step=12)
        4
    """

    changes: tuple[tuple[int, int], ...]
    unit: Literal["epoch", "step"] = "epoch"
    carry: bool = False

    def batches(self, epoch: int, step: int) -> int:
        """Return the number of batches in the window of optimizer step ``step`` in epoch ``epoch``."""
        position = epoch if self.unit == "epoch" else step
        return next(number for start, number in reversed(self.changes) if start <= position)

    def is_final(self, epoch: int, step: int) -> bool:
        """Return whether no change lies ahead of that epoch and step."""
        return self.changes[-1][0] <= (epoch if self.unit == "epoch" else step)

    def _steps_to_next_change(self, step: int) -> int | None:
        if self.unit == "epoch":
            return None
        return next((start - step for start, _ in self.changes if start > step), None)


def count_steps(
    plan: AccumulationPlan, *, batches_per_epoch: int, epochs: int, epoch: int = 0, batch: int = 0, step: int = 0
) -> int:
    """Return the number of optimizer steps that a run has taken when it ends.

    Windows are aligned to the batch index inside an epoch, as Lightning aligns them, so a change in mid-epoch leaves
    one shorter window at the joint; with ``plan.carry`` every window is whole but the run's last.

    Args:
        plan: The accumulation over the run.
        batches_per_epoch: Batches in every epoch.
        epochs: Number of epochs, those before ``epoch`` included.
        epoch: The epoch that the run is in, from 0.
        batch: Batches of that epoch that are over.
        step: Steps taken so far; the accumulation until then does not matter.

    Example:
        >>> count_steps(AccumulationPlan(((0, 3),)), batches_per_epoch=10, epochs=2)
        8
        >>> count_steps(AccumulationPlan(((0, 3),), carry=True), batches_per_epoch=10, epochs=2)
        7
        >>> count_steps(AccumulationPlan(((0, 1), (1, 5))), batches_per_epoch=10, epochs=2)
        12
    """
    if plan.carry:
        done, total = batches_per_epoch * epoch + batch, batches_per_epoch * epochs
        taken, begin = _whole_windows(plan, batches_per_epoch, range(done), 0)
        # a run that always had this plan stands in the window that began there; another one begins a window now
        begin = begin if taken == step else done
        step, begin = _whole_windows(plan, batches_per_epoch, range(begin, max(done, total)), step)
        return step + (begin < total)
    for current in range(epoch, epochs):
        while batch < batches_per_epoch:
            size = plan.batches(current, step)
            windows = -(-batches_per_epoch // size) - batch // size
            change = plan._steps_to_next_change(step)
            taken = windows if change is None else min(windows, change)
            batch = min((batch // size + taken) * size, batches_per_epoch)
            step += taken
        batch = 0
        if plan.is_final(current, step):  # the epochs that are left are alike
            return step + (epochs - current - 1) * -(-batches_per_epoch // plan.batches(current, step))
    return step


def _whole_windows(plan: AccumulationPlan, batches_per_epoch: int, batches: range, step: int) -> tuple[int, int]:
    """Return the steps taken after ``batches`` of a run that carries windows, and where the open window began."""
    begin = batches.start
    while begin < batches.stop:
        epoch = begin // batches_per_epoch
        size = plan.batches(epoch, step)
        whole = (batches.stop - begin) // size
        if plan.unit == "epoch":
            whole = min(whole, -(-((epoch + 1) * batches_per_epoch - begin) // size))
        change = plan._steps_to_next_change(step)
        taken = whole if change is None else min(whole, change)
        if not taken:
            break
        begin, step = begin + taken * size, step + taken
    return step, begin


@dataclass(frozen=True)
class RunEnd:
    """What ends a run, as its user has set it.

    Args:
        max_epochs: ``None``: no number of epochs does.
        max_steps: ``None``: no number of steps does.
    """

    max_epochs: int | None
    max_steps: int | None


@dataclass(frozen=True)
class RunAhead:
    """What lies ahead of a run, seen from where it stands.

    Args:
        batches_per_epoch: Batches of an epoch from here on, ``None`` when unknown.
        accumulation: How they make steps.
        epoch: The epoch that the run is in, from 0.
        batch: Batches of that epoch that are over.
        step: Steps taken.
    """

    batches_per_epoch: int | None
    accumulation: AccumulationPlan
    epoch: int = 0
    batch: int = 0
    step: int = 0

    def total_steps(self, end: RunEnd) -> int | None:
        """Return the steps of the whole run, those taken included, or ``None`` when that cannot be known."""
        if self.batches_per_epoch is None or end.max_epochs is None:
            return end.max_steps
        total = self._steps_until(end.max_epochs)
        return total if end.max_steps is None else min(total, end.max_steps)

    def steps_of_epochs(self, epochs: float) -> float:
        """Return the steps of the run's first ``epochs`` epochs, those that are over as they were.

        Where they differed from each other, the past ones count as equally long; 0 where the length is not known.
        """
        if self.step == 0 and len(self.accumulation.changes) == 1 and not self.accumulation.carry:
            return epochs * self._steps_until(1)
        whole = math.floor(epochs)
        begin, end = self._steps_until(whole), self._steps_until(whole + 1)
        return begin + (epochs - whole) * (end - begin)

    def horizon(self, end: RunEnd, *, strict: bool = True) -> Horizon:
        """Return the whole run as what durations are counted in; past epochs count as they were."""
        total = self.total_steps(end)
        return Horizon(total, self.steps_of_epochs if self.batches_per_epoch else None, total, strict)

    def continues(self, other: RunAhead) -> bool:
        """Return whether batches make steps as they do in ``other``, wherever the two stand."""
        return (self.batches_per_epoch, self.accumulation) == (other.batches_per_epoch, other.accumulation)

    def as_state(self) -> dict[str, Any]:
        """Return plain numbers, texts and lists for a checkpoint."""
        plan = self.accumulation
        return {
            "batches_per_epoch": self.batches_per_epoch,
            "accumulation": [list(change) for change in plan.changes],
            "unit": plan.unit,
            "carry": plan.carry,
            "stands": [self.epoch, self.batch, self.step],
        }

    @classmethod
    def from_state(cls, name: str, state: Any) -> RunAhead:
        """Return what :meth:`as_state` has described, checked like arguments.

        Args:
            name: What the state is called, for messages.
            state: From a checkpoint.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If one is missing or out of range.
        """
        keys = ("batches_per_epoch", "accumulation", "unit", "carry", "stands")
        if not isinstance(state, Mapping) or not state.keys() >= set(keys):
            raise ValueError(
                f"`{name}` must describe what lies ahead of a run by {', '.join(keys)}, got {shown(state)}."
            )
        batches, changes, unit, carry, stands = (state[key] for key in keys)
        if not isinstance(changes, (list, tuple)) or not all(_are_numbers(change, 2) for change in changes):
            raise ValueError(f"`{name} accumulation` must have pairs of numbers, got {shown(changes)}.")
        if not _are_numbers(stands, 3):
            raise ValueError(f"`{name} stands` must be epoch, batch and step, got {shown(stands)}.")
        pairs = [
            (whole_number(f"{name} accumulation", position), whole_number(f"{name} accumulation", number, at_least=1))
            for position, number in changes
        ]
        if not pairs or pairs[0][0] != 0:
            raise ValueError(f"`{name} accumulation` must begin at position 0, got {shown(changes)}.")
        unit = one_of(f"{name} unit", unit, ("epoch", "step"))
        plan = AccumulationPlan(tuple(sorted(pairs)), unit, true_or_false(f"{name} carry", carry))  # type: ignore[arg-type]
        return cls(
            None if batches is None else whole_number(f"{name} batches_per_epoch", batches),
            plan,
            *(
                whole_number(f"{name} stands, {what}", value)
                for what, value in zip(("epoch", "batch", "step"), stands, strict=True)
            ),
        )

    def _steps_until(self, epochs: int) -> int:
        """Return the steps taken when ``epochs`` epochs are over."""
        batches = self.batches_per_epoch or 0
        if epochs > self.epoch or (epochs == self.epoch and self.batch == 0):
            return count_steps(
                self.accumulation,
                batches_per_epoch=batches,
                epochs=epochs,
                epoch=self.epoch,
                batch=self.batch,
                step=self.step,
            )
        inside = self.batch // self.accumulation.batches(self.epoch, self.step)
        before = max(self.step - inside, 0)
        return before * epochs // self.epoch if self.epoch else 0


@dataclass(frozen=True)
class RunLength:
    """How long a run is and how that is known.

    Args:
        total_steps: Optimizer steps from the run's first to its last, ``None`` when that cannot be known.
        steps_per_epoch: Optimizer steps of the first epoch, ``None`` when unknown.
        source: Where the numbers come from, for a log line or an error message.
    """

    total_steps: int | None
    steps_per_epoch: int | None
    source: str


def run_length(trainer: Any) -> RunLength:
    """Return how many optimizer steps the fit has when it ends, those already taken included.

    The order of callbacks does not matter: each is asked for its plan, whether it has acted yet or not.

    Args:
        trainer: The Trainer, in ``on_train_start`` or later: only then are the training data and the position of a
            resumed run known.
    """
    ahead = run_ahead(trainer)
    per_epoch = None if ahead.batches_per_epoch is None else int(ahead.steps_of_epochs(1))
    return RunLength(ahead.total_steps(run_end(trainer)), per_epoch, source_of_length(trainer))


def horizon_of_run(trainer: Any, batch_idx: int | None = None, *, automatic: bool) -> tuple[Horizon, str]:
    """Return what durations are counted in, and where that comes from, for a log line or an error message.

    Args:
        trainer: The Trainer, in ``on_train_start`` or later.
        batch_idx: As in :func:`run_ahead`.
        automatic: Whether the optimization is: in manual optimization no length is known.
    """
    if not automatic:
        return Horizon(None, None, None), "manual optimization: only the module knows its steps"
    return run_ahead(trainer, batch_idx).horizon(run_end(trainer)), source_of_length(trainer)


def run_end(trainer: Any) -> RunEnd:
    """Return what ends a Trainer's run."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    return RunEnd(None if epochs in (None, -1) else epochs, None if steps == -1 else steps)


def run_ahead(trainer: Any, batch_idx: int | None = None) -> RunAhead:
    """Return what lies ahead of a Trainer's run.

    Args:
        trainer: The Trainer, in ``on_train_start`` or later.
        batch_idx: Batches of the current epoch that are over, where the hook knows; ``None``: from the progress.
    """
    return RunAhead(
        _batches_per_epoch(trainer),
        _accumulation(trainer)[0],
        trainer.current_epoch,
        _batches_over(trainer) if batch_idx is None else batch_idx,
        trainer.global_step,
    )


def source_of_length(trainer: Any) -> str:
    """Return where a Trainer's length comes from, for a log line or an error message."""
    batches, end = _batches_per_epoch(trainer), run_end(trainer)
    by_steps = f"max_steps={end.max_steps}"
    if batches is None:
        return "the length of the training data is unknown" if end.max_steps is None else by_steps
    if end.max_epochs is None:
        return "max_epochs=-1: the run has no end" if end.max_steps is None else by_steps
    if end.max_steps is not None and end.max_steps < run_ahead(trainer).steps_of_epochs(end.max_epochs):
        return by_steps
    default = " (what an unset max_epochs means)" if end.max_epochs == 1000 else ""
    return f"max_epochs={end.max_epochs}{default} of {batches} batches, {_accumulation(trainer)[1]}"


def _batches_per_epoch(trainer: Any) -> int | None:
    """Return how many batches this epoch has, or ``None`` when that is not known.

    Lightning asks a loader once; one that becomes shorter by itself (batches of so many tokens) ends its epoch earlier.
    """
    batches, loader = trainer.num_training_batches, trainer.train_dataloader
    if math.isinf(batches):
        return None
    if not isinstance(loader, (Sequence, Mapping)):
        with contextlib.suppress(TypeError, NotImplementedError):
            return min(int(batches), len(loader))
    return int(batches)


def _batches_over(trainer: Any) -> int:
    """Return how many batches of the current epoch are over, when training starts: where Lightning's loop begins.

    Between two epochs its counter still shows the last one's.
    """
    loop, batches = trainer.fit_loop.epoch_loop, trainer.num_training_batches
    if not loop.restarting:
        return 0
    over = int(loop.batch_progress.current.completed)
    if loop.restarted_on_train_batch_end:
        return 0 if over + 1 >= batches else over + 1
    return int(batches) if loop.batch_progress.is_last_batch and not math.isinf(batches) else over


def _accumulation(trainer: Any) -> tuple[AccumulationPlan, str]:
    """Return the run's accumulation and what sets it."""
    for callback in trainer.callbacks:
        ask = getattr(callback, "accumulation_plan", None)
        plan = ask(trainer) if callable(ask) else _plan_of_scheduler(callback)
        if plan is not None:
            return plan, f"accumulation by {type(callback).__name__}"
    number = trainer.accumulate_grad_batches
    return AccumulationPlan(((0, number),)), f"{number} a step" if number > 1 else "one a step"


def _plan_of_scheduler(callback: Any) -> AccumulationPlan | None:
    """Return the plan of Lightning's own ``GradientAccumulationScheduler``, of either namespace."""
    if not hasattr(callback, "get_accumulate_grad_batches"):
        return None
    scheduling: Mapping[int, int] = callback.scheduling
    return AccumulationPlan(tuple(sorted(scheduling.items())), unit="epoch")
