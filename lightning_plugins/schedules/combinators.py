"""Schedules made from schedules. Each has a method on :class:`Schedule` that reads better: ``f.delay(100)``."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lightning_plugins.core.durations import Duration, Horizon, in_steps
from lightning_plugins.core.validation import shown, whole_number
from lightning_plugins.schedules.curves import cosine
from lightning_plugins.schedules.fields import duration, factor, number, parts, whole
from lightning_plugins.schedules.schedule import Schedule


class _OfOne(Schedule):
    """A schedule made from one other."""

    schedule: Schedule

    def _check(self) -> None:
        _check_schedule("schedule", self.schedule)

    def _needed_steps(self) -> int:
        return self.schedule._needed_steps()


@dataclass(frozen=True)
class Delayed(_OfOne):
    """f(max(t - steps, 0)): the first value for ``steps`` steps, then the schedule.

    Args:
        schedule: f.
        steps: Duration of the delay. What f leaves open ends with the run.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``steps`` is negative.
    """

    schedule: Schedule = parts()
    steps: Duration = duration()

    def _resolve(self, horizon: Horizon) -> Delayed:
        steps = horizon.steps("steps", self.steps)
        return replace(self, schedule=self.schedule._resolve(horizon.after(steps)), steps=steps)

    def _factor(self, step: float) -> float:
        return self.schedule._factor(max(step - in_steps(self.steps), 0))

    def _needed_steps(self) -> int:
        return in_steps(self.steps) + self.schedule._needed_steps()


@dataclass(frozen=True)
class Shifted(_OfOne):
    """f(t + steps): the schedule from its step ``steps`` on.

    Args:
        schedule: f.
        steps: Duration that is skipped. What f leaves open ends with the run.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``steps`` is negative.
    """

    schedule: Schedule = parts()
    steps: Duration = duration()

    def _resolve(self, horizon: Horizon) -> Shifted:
        steps = horizon.steps("steps", self.steps)
        return replace(self, schedule=self.schedule._resolve(horizon.after(-steps)), steps=steps)

    def _factor(self, step: float) -> float:
        return self.schedule._factor(step + in_steps(self.steps))

    def _needed_steps(self) -> int:
        return max(self.schedule._needed_steps() - in_steps(self.steps), 0)


@dataclass(frozen=True)
class HeldEvery(_OfOne):
    """f(t // steps): every value lasts ``steps`` steps, and f's lengths count values.

    Args:
        schedule: f. ``"5%"`` is 5 % of the run all the same, ``"1ep"`` an epoch.
        steps: Duration of a value, at least 1; ``"1ep"`` changes the rate once an epoch.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``steps`` is below 1.
    """

    schedule: Schedule = parts()
    steps: Duration = duration()

    def _prepare(self) -> dict[str, Any]:
        whole_number("steps", self.steps, at_least=1, unit="steps")
        return {}

    def _resolve(self, horizon: Horizon) -> HeldEvery:
        steps = whole_number("steps", horizon.steps("steps", self.steps), at_least=1, unit="steps")
        return replace(self, schedule=self.schedule._resolve(horizon.slowed(steps)), steps=steps)

    def _factor(self, step: float) -> float:
        return self.schedule._factor(step // in_steps(self.steps))

    def _needed_steps(self) -> int:
        return self.schedule._needed_steps() * in_steps(self.steps)


@dataclass(frozen=True)
class Floored(_OfOne):
    """max(f(t), factor).

    Args:
        schedule: f.
        factor: Smallest factor, at least 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``factor`` is negative or not finite.
    """

    schedule: Schedule = parts()
    factor: float = factor()

    def _factor(self, step: float) -> float:
        return max(self.schedule._factor(step), self.factor)


@dataclass(frozen=True)
class Scaled(_OfOne):
    """factor * f(t).

    Args:
        schedule: f.
        factor: Multiplier, at least 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``factor`` is negative or not finite.
    """

    schedule: Schedule = parts()
    factor: float = factor()

    def _factor(self, step: float) -> float:
        return self.factor * self.schedule._factor(step)


@dataclass(frozen=True)
class Product(Schedule):
    """f(t) * g(t).

    Args:
        left: f.
        right: g.

    Raises:
        TypeError: If an argument is no schedule.
    """

    left: Schedule = parts()
    right: Schedule = parts()

    def _check(self) -> None:
        _check_schedule("left", self.left)
        _check_schedule("right", self.right)

    def _factor(self, step: float) -> float:
        return self.left._factor(step) * self.right._factor(step)

    def _needed_steps(self) -> int:
        return max(self.left._needed_steps(), self.right._needed_steps())


_LONGEST = 2.0**62  # steps; no run gets there


class _Cycles:
    """Cycles that grow: each lasts ``multiplier`` times as long as the one before, rounded down to whole steps."""

    def __init__(self, first: int, multiplier: float) -> None:
        self._multiplier = multiplier
        self._begins, self._lengths = [0], [first]

    def locate(self, step: float) -> tuple[int, float, int]:
        """Return the number of the cycle that ``step`` is in, the position inside it, and its length."""
        while step >= self._begins[-1] + self._lengths[-1]:
            begin, length = self._begins[-1], self._lengths[-1]
            grown = int(min(length * self._multiplier, _LONGEST))
            if grown == length:  # from here on all are of one length
                count, position = divmod(step - begin, length)
                return len(self._begins) - 1 + int(count), position, length
            self._begins.append(begin + length)
            self._lengths.append(grown)
        index = bisect_right(self._begins, step) - 1
        return index, step - self._begins[index], self._lengths[index]


@dataclass(frozen=True)
class Cycled(_OfOne):
    """A schedule over and over: decay^i * f(s * period / T_i) at position s of cycle i, whose length is T_i.

    T_0 = period, and T_i = T_{i-1} * multiplier, rounded down to whole steps: f is stretched to the longer cycle. After
    ``count`` cycles it holds decay^(count - 1) * f(period).

    Args:
        schedule: f. For it a period is the run: ``"5%"`` is 5 % of the period, and what it leaves open ends with it.
        period: Duration of the first cycle, at least 1.
        count: Number of cycles, at least 1; ``None``: without end.
        multiplier: Each cycle's length over the previous one's, at least 1.
        decay: Each cycle's height over the previous one's, in [0, 1].

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> from lightning_plugins import Linear
        >>> Linear(2, 1, 0).cycle(2, count=2, decay=0.5).preview(6)
        [1.0, 0.5, 0.5, 0.25, 0.0, 0.0]
    """

    schedule: Schedule = parts()
    period: Duration = duration()
    count: int | None = whole(default=None, unit="cycles", optional=True)
    multiplier: float = number(at_least=1, default=1.0)
    decay: float = factor(at_most=1, default=1.0)

    _cycles: ClassVar[_Cycles]  # set by _prepare, on the instance

    def _prepare(self) -> dict[str, Any]:
        return {"_cycles": _Cycles(_at_least_one("period", self.period), self.multiplier)}

    def _resolve(self, horizon: Horizon) -> Cycled:
        period = _at_least_one("period", horizon.steps("period", self.period))
        inner = replace(horizon, total_steps=period, remaining=period)
        return replace(self, schedule=self.schedule._resolve(inner), period=period)

    def _factor(self, step: float) -> float:
        index, position, length = self._cycles.locate(step)
        period = in_steps(self.period)
        if self.count is not None and index >= self.count:
            return self.decay ** (self.count - 1) * self.schedule._factor(period)
        if length != period:
            position *= period / length
        return float(self.decay**index * self.schedule._factor(position))

    def _needed_steps(self) -> int:
        return in_steps(self.period)


@dataclass(frozen=True)
class CosineRestarts(Schedule):
    """Cosine decays one after another (SGDR): end + (decay^i - end) * (1 + cos(pi * s / T_i)) / 2.

    s is the position in cycle i; T_0 = first and T_i = T_{i-1} * multiplier, rounded down to whole steps. The peak
    shrinks by ``decay`` each cycle, ``end`` does not. Without end.

    Args:
        first: Duration of the first cycle, at least 1.
        multiplier: Each cycle's length over the previous one's, at least 1.
        decay: Each cycle's peak over the previous one's, in [0, 1].
        end: Factor towards which every cycle falls, at least 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> [round(value, 3) for value in CosineRestarts(first=2, multiplier=2).preview(7)]
        [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]

    References:
        Loshchilov and Hutter, 2016, arXiv:1608.03983; torch's ``CosineAnnealingWarmRestarts``, which takes whole
        multipliers only.
    """

    first: Duration = duration()
    multiplier: float = number(at_least=1, default=1.0)
    decay: float = factor(at_most=1, default=1.0)
    end: float = factor(default=0.0)

    _cycles: ClassVar[_Cycles]  # set by _prepare, on the instance

    def _prepare(self) -> dict[str, Any]:
        return {"_cycles": _Cycles(_at_least_one("first", self.first), self.multiplier)}

    def _factor(self, step: float) -> float:
        index, position, length = self._cycles.locate(step)
        peak = self.decay**index
        return float(peak + (self.end - peak) * cosine(position / length))

    def _needed_steps(self) -> int:
        return in_steps(self.first)


def _check_schedule(name: str, value: Any) -> None:
    if not isinstance(value, Schedule):
        raise TypeError(f"`{name}` must be a schedule, got {shown(value)}.")


def _at_least_one(name: str, length: Duration) -> int:
    return whole_number(name, length, at_least=1, unit="steps")
