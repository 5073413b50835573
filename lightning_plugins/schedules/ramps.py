"""Schedules of one piece: a constant, and the ways from one value to another.

All are half-open: at step t < ``steps`` the value is start + (end - start) * p(t / steps) with the progress p of the
class, and from t = ``steps`` on it is exactly ``end``. The first step uses exactly ``start``; the end value is first
used by the step with index ``steps``, so a decay over the whole run stops one step short of its end (the convention of
optax, Hugging Face and Keras; :class:`~lightning_plugins.Segments` has ``endpoint=True`` for the other one). With
``steps=0`` the value is ``end`` at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_plugins.core.durations import Duration, in_steps
from lightning_plugins.core.validation import real_number
from lightning_plugins.schedules import curves
from lightning_plugins.schedules.curves import Curve, Progress, progress_along
from lightning_plugins.schedules.fields import curve, duration, factor, number
from lightning_plugins.schedules.schedule import Schedule


@dataclass(frozen=True)
class Constant(Schedule):
    """The same factor at every step.

    Args:
        value: The factor, at least 0.

    Raises:
        ValueError: If ``value`` is negative or not finite.
    """

    value: float = factor(default=1.0)

    def _factor(self, step: float) -> float:
        return self.value


class _Ramp(Schedule):
    """From ``start`` to ``end`` in ``steps`` along the progress of the class."""

    steps: Duration
    start: float
    end: float
    _progress: ClassVar[Progress]
    _length: ClassVar[int]  # set by _prepare, on the instance

    def _prepare(self) -> dict[str, Any]:
        return {"_length": in_steps(self.steps)}

    def _factor(self, step: float) -> float:
        if step >= self._length:
            return self.end
        return self.start + (self.end - self.start) * self._progress(step / self._length)

    def _needed_steps(self) -> int:
        return self._length


@dataclass(frozen=True)
class Linear(_Ramp):
    """A straight line: start + (end - start) * t / steps.

    Args:
        steps: Duration; ``None`` fills the rest of the run.
        start: Factor of the first step, at least 0.
        end: Factor from step ``steps`` on, at least 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a length or factor is negative or not finite.

    Example:
        >>> Linear(steps=4, start=0, end=1).preview(6)
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    steps: Duration = duration(rest=True)
    start: float = factor()
    end: float = factor()
    _progress = staticmethod(curves.linear)


@dataclass(frozen=True)
class Cosine(_Ramp):
    """Half a cosine wave: end + (start - end) * (1 + cos(pi * t / steps)) / 2.

    Args:
        steps: Duration; ``None`` fills the rest of the run.
        start: Factor of the first step, at least 0.
        end: Factor from step ``steps`` on, at least 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a length or factor is negative or not finite.

    References:
        Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2016, arXiv:1608.03983. Unlike
        torch's and Hugging Face's, it does not climb again past its end.
    """

    steps: Duration = duration(rest=True)
    start: float = factor()
    end: float = factor()
    _progress = staticmethod(curves.cosine)


@dataclass(frozen=True)
class OneMinusSqrt(_Ramp):
    """start + (end - start) * sqrt(t / steps): from 1 to 0 it is 1 - sqrt(x), the cooldown that beats linear.

    Args:
        steps: Duration; ``None`` fills the rest of the run.
        start: Factor of the first step, at least 0.
        end: Factor from step ``steps`` on, at least 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a length or factor is negative or not finite.

    References:
        Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations, 2024,
        arXiv:2405.18392.
    """

    steps: Duration = duration(rest=True)
    start: float = factor()
    end: float = factor()
    _progress = staticmethod(curves.one_minus_sqrt)


@dataclass(frozen=True)
class Polynomial(_Ramp):
    """end + (start - end) * (1 - t / steps) ** power.

    Args:
        steps: Duration; ``None`` fills the rest of the run.
        start: Factor of the first step, at least 0.
        end: Factor from step ``steps`` on, at least 0.
        power: Exponent, above 0; 1 is a straight line.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a length or factor is negative or not finite, or ``power`` is not above 0.
    """

    steps: Duration = duration(rest=True)
    start: float = factor()
    end: float = factor()
    power: float = number(above=0, default=1.0)

    def _factor(self, step: float) -> float:
        if step >= self._length:
            return self.end
        return float(self.end + (self.start - self.end) * (1.0 - step / self._length) ** self.power)


@dataclass(frozen=True)
class Exponential(_Ramp):
    """Geometric: start * (end / start) ** (t / steps), so every step multiplies by the same number.

    Args:
        steps: Duration; ``None`` fills the rest of the run.
        start: Factor of the first step, above 0.
        end: Factor from step ``steps`` on, above 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a length is negative or a factor not above 0.

    Example:
        >>> Exponential(steps=2, start=1, end=0.01).preview(4)
        [1.0, 0.1, 0.01, 0.01]
    """

    steps: Duration = duration(rest=True)
    start: float = factor()
    end: float = factor()

    def _check(self) -> None:
        real_number("start", self.start, above=0)
        real_number("end", self.end, above=0)

    def _factor(self, step: float) -> float:
        if step >= self._length:
            return self.end
        x = step / self._length
        return float(self.start ** (1 - x) * self.end**x)  # end / start might overflow


@dataclass(frozen=True)
class Shape(_Ramp):
    """A curve of your own, rescaled so that its ends are exact.

    start + (end - start) * (c(t / steps) - c(0)) / (c(1) - c(0)).

    Args:
        curve: A callable on [0, 1], its import path (``"my_package.my_curve"``) or one of ``"linear"``, ``"cosine"``,
            ``"1-sqrt"``.
        steps: Duration; ``None`` fills the rest of the run.
        start: Factor of the first step, at least 0.
        end: Factor from step ``steps`` on, at least 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a length or factor is negative or not finite, or the curve cannot be imported or has equal ends
            while ``start`` and ``end`` differ.

    Example:
        >>> import math
        >>> [round(value, 3) for value in Shape(math.exp, steps=4, start=0, end=1).preview(6)]
        [0.0, 0.165, 0.378, 0.65, 1.0, 1.0]

    References:
        ``Shape`` of Swift for TensorFlow's training loop, which refuses a flat curve; here one is legal where start
        and end are equal.
    """

    curve: str | Curve = curve()
    steps: Duration = duration(rest=True)
    start: float = factor()
    end: float = factor()

    def _check(self) -> None:
        self._own_progress()

    def _prepare(self) -> dict[str, Any]:
        return {**super()._prepare(), "_progress": self._own_progress()}

    def _own_progress(self) -> Curve:
        return progress_along("curve", self.curve, flat=self.start == self.end)
