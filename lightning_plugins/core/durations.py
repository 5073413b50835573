"""Lengths of time in a run: steps, shares of the run, epochs, or the rest.

=============  ==========================================================================================
``100``        optimizer steps
``0.05``       a share of the run, in (0, 1), rounded to the nearest step
``"5%"``       the same, written as a percentage, 0 to 100
``"2ep"``      epochs, rounded to the nearest step
``None``       the rest of the run (where a parameter's description says so)
``"rest"``     the same, for a configuration file, where nothing means that an argument is missing
=============  ==========================================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from lightning_plugins.core.validation import real_number, shown, whole_number

Duration: TypeAlias = int | float | str | None
"""A length: steps (``100``), share of the run (``0.05`` or ``"5%"``), epochs (``"2ep"``), or ``None``: the rest."""

_TEXT = re.compile(r"(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>%|ep)")
_REMEDY = "give steps (100), a share of the run (0.05 or '5%') or epochs ('2ep')"


class ScheduleTooLongError(ValueError):
    """The parts of a schedule need more steps than there are."""


class RunLengthUnknownError(ValueError):
    """A share of a run, its rest or a number of epochs is asked for, and the length of that is not known."""


def check_duration(name: str, value: Any, *, rest: bool = False) -> Duration:
    """Return ``value``, or raise when it is not a duration.

    Args:
        name: The argument's name, for the message.
        value: What the user gave.
        rest: Whether ``None``, the rest of the run, is legal here.

    Raises:
        TypeError: If ``value`` is of another type.
        ValueError: If it is negative, or a share or a text that cannot be read.
    """
    if rest and (value is None or (isinstance(value, str) and value == "rest")):
        return None
    if isinstance(value, str):
        return _check_text(name, value)
    if isinstance(value, float):
        if not 0 < value < 1:
            raise ValueError(
                f"`{name}` as a float is a share of the run and must lie between 0 and 1 (both excluded), "
                f"got {shown(value)}; {_REMEDY}."
            )
        return float(value)
    try:
        return whole_number(name, value, unit="steps")
    except TypeError:
        raise TypeError(f"`{name}` must be a duration, got {shown(value)}; {_REMEDY}.") from None


def is_open(duration: Duration) -> bool:
    """Return whether ``duration`` can be counted in steps only when the run is known."""
    return not isinstance(duration, int)


def in_steps(duration: Duration) -> int:
    """Return a duration that has been resolved, as the ``int`` that it is."""
    if not isinstance(duration, int):
        raise TypeError(f"`duration` must be in steps by now, got {shown(duration)}; call `resolve` first.")
    return duration


@dataclass(frozen=True)
class Horizon:
    """The stretch of a run that a schedule has to fill.

    Args:
        total_steps: Steps of the run, of which shares are taken; ``None`` when unknown.
        steps_of_epochs: Steps of the first so many epochs; ``None`` when unknown.
        remaining: What ``None`` durations fill: less than the run for a part that begins later.
        strict: Whether stated lengths that do not fit are an error. Otherwise the rest is empty and the run ends
            inside the schedule.

    Example:
        >>> [Horizon.of(200, steps_per_epoch=20).steps("warmup", length) for length in (7, 0.05, "5%", "2ep", None)]
        [7, 10, 10, 40, 200]
    """

    total_steps: int | None
    steps_of_epochs: Callable[[float], float] | None
    remaining: int | None
    strict: bool = True

    @classmethod
    def of(cls, total_steps: int | None, steps_per_epoch: float | None = None, *, strict: bool = True) -> Horizon:
        """Return the whole of a run whose epochs are alike.

        Args:
            total_steps: Optimizer steps of the run, at least 0; ``None`` when unknown.
            steps_per_epoch: Optimizer steps of an epoch, above 0; ``None`` when unknown.
            strict: Whether stated lengths that do not fit are an error.
        """
        if total_steps is not None:
            total_steps = whole_number("total_steps", total_steps, unit="steps")
        if steps_per_epoch is None:
            return cls(total_steps, None, total_steps, strict)
        per_epoch = real_number("steps_per_epoch", steps_per_epoch, above=0)
        return cls(total_steps, lambda number: number * per_epoch, total_steps, strict)

    def steps(self, name: str, duration: Duration) -> int:
        """Return ``duration`` in steps.

        Raises:
            RunLengthUnknownError: If that needs a length which is not known.
        """
        if isinstance(duration, int):
            return duration
        if duration is None:
            return int(self._known(name, duration, self.remaining, "the run"))
        if isinstance(duration, float):
            return _nearest(name, duration * self._known(name, duration, self.total_steps, "the run"))
        number, unit = _parse(duration)
        if unit == "%":
            return _nearest(name, number * self._known(name, duration, self.total_steps, "the run") / 100)
        return _nearest(name, self._known(name, duration, self.steps_of_epochs, "an epoch")(number))

    def after(self, steps: int) -> Horizon:
        """Return the horizon of a part that begins ``steps`` later; negative: earlier."""
        return self if self.remaining is None else replace(self, remaining=max(self.remaining - steps, 0))

    def until(self, steps: int) -> Horizon:
        """Return the horizon of a part that lasts ``steps``."""
        return replace(self, remaining=steps)

    def slowed(self, factor: int) -> Horizon:
        """Return the horizon as counted by a clock that ticks once every ``factor`` steps."""
        fast = self.steps_of_epochs
        return replace(
            self,
            total_steps=None if self.total_steps is None else -(-self.total_steps // factor),
            steps_of_epochs=None if fast is None else lambda number: fast(number) / factor,
            remaining=None if self.remaining is None else -(-self.remaining // factor),
        )

    @staticmethod
    def _known(name: str, duration: Duration, length: Any, of_what: str) -> Any:
        if length is None:
            what = "the rest" if duration is None else repr(duration)
            raise RunLengthUnknownError(
                f"`{name}` is {what} of {of_what}, and the length of {of_what} is not known; state it in steps."
            )
        return length


def _check_text(name: str, value: str) -> str:
    match = _TEXT.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"`{name}` must be a duration, got {shown(value)}; {_REMEDY}.")
    if match["unit"] == "%" and float(match["number"]) > 100:
        raise ValueError(f"`{name}` must be at most 100% of the run, got {shown(value)}.")
    return value


def _parse(text: str) -> tuple[float, str]:
    match = _TEXT.fullmatch(text.strip())
    assert match is not None  # noqa: S101  # checked at construction
    return float(match["number"]), match["unit"]


def _nearest(name: str, steps: float) -> int:
    whole = math.floor(real_number(name, steps) + 0.5)  # not Python's round, which takes 2.5 to 2
    return whole_number(name, whole, unit="steps")
