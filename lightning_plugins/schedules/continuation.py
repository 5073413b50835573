"""How a schedule goes on when the length of its run has changed: from the value where it stands, to its end."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_plugins.core.run_length import RunAhead, RunEnd
from lightning_plugins.core.validation import real_number, shown, whole_number
from lightning_plugins.schedules.fields import parts
from lightning_plugins.schedules.schedule import Schedule


@dataclass(frozen=True)
class Course:
    """Where a run stands on its schedule.

    A run whose length never changed follows the schedule that was resolved for it, step by step. When the length
    changes at step ``begin``, what is left of that schedule is spread over the steps that are left: at step t its
    position is position + (t - begin) * (V - position) / (N - begin), where V is the length that it was resolved for
    and N the run's. The position is continuous, and so is the rate; a part that is over stays over.

    A longer horizon (more epochs, more steps) is no such change: it lengthens V and N alike.

    Args:
        curve: The run that the schedule is resolved for.
        latest: The run as it was last seen.
        begin: Step of the last change.
        position: Where the schedule stood then.
    """

    curve: RunAhead
    latest: RunAhead
    begin: int = 0
    position: float = 0.0

    def holds(self, now: RunAhead, end: RunEnd) -> bool:
        """Return whether the run is as long as it was said to be."""
        return self.latest.total_steps(end) == now.total_steps(end)

    def follow(self, schedule: Schedule, end: RunEnd) -> Schedule:
        """Return what the run follows: ``schedule`` with every length known."""
        resolved = resolve(schedule, self.curve, end, strict=False)
        # no change has its place at the first step
        if self.begin == 0:
            return resolved
        return _Continued(resolved, self.begin, self.position, self._speed(end))

    def goes_on(self, now: RunAhead, end: RunEnd, schedules: Collection[Schedule]) -> Course:
        """Return the course of the run as it is now.

        Where the schedules for the new length have the same value at this step, as in a warm-up of so many steps or on
        a plateau, they are followed as if the run had always had that length. Parts given in steps keep their length.
        """
        if self.holds(now, end) and now.continues(self.latest):
            return self
        total = now.total_steps(end)
        position = self._position_at(now.step, end)
        before = self.curve.total_steps(end)
        if now.step == 0 or total is None or before is None or position >= before:
            return Course(now, now)
        if not self.holds(now, end) and (now.step >= total or self._agrees(now, end, schedules)):
            return Course(now, now)
        return Course(self.curve, now, now.step, position)

    def _agrees(self, now: RunAhead, end: RunEnd, schedules: Collection[Schedule]) -> bool:
        return all(
            resolve(schedule, now, end, strict=False)(now.step) == self.follow(schedule, end)(now.step)
            for schedule in schedules
        )

    def _position_at(self, step: int, end: RunEnd) -> float:
        return self.position + (step - self.begin) * self._speed(end)

    def _speed(self, end: RunEnd) -> float:
        before, total = self.curve.total_steps(end), self.latest.total_steps(end)
        if before is None or total is None or total <= self.begin:
            return 1.0
        return (before - self.position) / (total - self.begin)

    def as_state(self) -> dict[str, Any]:
        """Return plain numbers, texts and lists for a checkpoint."""
        latest = None if self.latest is self.curve else self.latest.as_state()
        return {"curve": self.curve.as_state(), "latest": latest, "begin": self.begin, "position": self.position}

    @classmethod
    def from_state(cls, state: Any) -> Course:
        """Return what :meth:`as_state` has described, checked like arguments.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If one is missing or out of range.
        """
        names = ("curve", "latest", "begin", "position")
        if not isinstance(state, Mapping) or not state.keys() >= set(names):
            raise ValueError(f"`run` must say where a schedule stands by {', '.join(names)}, got {shown(state)}.")
        curve, latest, begin, position = (state[name] for name in names)
        known = RunAhead.from_state("run", curve)
        return cls(
            known,
            known if latest is None else RunAhead.from_state("run", latest),
            whole_number("begin", begin, unit="steps"),
            float(real_number("position", position, at_least=0)),
        )


def resolve(schedule: Schedule, ahead: RunAhead, end: RunEnd, *, strict: bool = True) -> Schedule:
    """Return ``schedule`` for a run, every duration counted in steps; past epochs count as they were."""
    return schedule.resolve_for(ahead.horizon(end, strict=strict))


@dataclass(frozen=True)
class _Continued(Schedule):
    """A schedule from ``position`` on, reached at step ``begin``, at ``speed`` positions a step."""

    schedule: Schedule = parts()
    begin: int = 0
    position: float = 0.0
    speed: float = 1.0

    def _factor(self, step: float) -> float:
        return self.schedule._factor(self.position + (step - self.begin) * self.speed)
