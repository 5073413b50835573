"""How long a run is, in optimizer steps: the arithmetic of accumulation windows.

A *window* is the batches of one optimizer step. Lightning ends a window when the number of batches since the epoch
began is a multiple of the accumulation, and at the epoch's last batch. Nothing here knows a Trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AccumulationPlan:
    """How many batches make one optimizer step, over the course of a run.

    A callback that sets the accumulation tells its plan through a method ``accumulation_plan(trainer)``, which
    :func:`lightning_plugins.core.lightning.run_length` asks of every callback; a foreign callback may offer it too.

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
        epoch: Where the run stands: the epoch it is in, from 0,
        batch: the batches that it has finished in that epoch,
        step: and the steps that it has taken, whatever the accumulation was until then.

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
class RunLength:
    """How long a run is and how that is known.

    Args:
        total_steps: Optimizer steps from the run's first to its last, ``None`` when nobody can know.
        steps_per_epoch: Optimizer steps of the first epoch, ``None`` when unknown.
        source: Where the numbers come from, for a log line or an error message.
    """

    total_steps: int | None
    steps_per_epoch: int | None
    source: str
