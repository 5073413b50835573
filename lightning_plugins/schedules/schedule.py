"""What every schedule is: a pure value that maps an optimizer step to a factor."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from lightning_plugins.core.validation import a_list, real_number, shown, whole_number
from lightning_plugins.schedules.durations import (
    Duration,
    Horizon,
    ScheduleTooLongError,
    check_duration,
    is_open,
)

Self = TypeVar("Self", bound="Schedule")


def duration(*, rest: bool = False, default: Any = dataclasses.MISSING, kw_only: bool = False) -> Any:
    """Declare a field as a :data:`Duration`; ``rest`` allows ``None``."""
    return dataclasses.field(default=default, kw_only=kw_only, metadata={"duration": True, "rest": rest})


def durations() -> Any:
    """Declare a field as a sequence of durations."""
    return dataclasses.field(metadata={"durations": True})


def factor(*, default: Any = dataclasses.MISSING, kw_only: bool = False, optional: bool = False) -> Any:
    """Declare a field as a factor: finite, at least 0; ``optional`` allows ``None``."""
    return dataclasses.field(default=default, kw_only=kw_only, metadata={"factor": True, "optional": optional})


def factors() -> Any:
    """Declare a field as a sequence of factors."""
    return dataclasses.field(metadata={"factors": True})


def parts() -> Any:
    """Declare a field as one schedule or segment, or a sequence of them."""
    return dataclasses.field(metadata={"parts": True})


def curve(*, default: Any = dataclasses.MISSING) -> Any:
    """Declare a field as a curve: a name, a callable or an import path, which is code."""
    return dataclasses.field(default=default, metadata={"curve": True})


def field_items(item: Any) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield name, value and kind of every field of a schedule or segment."""
    for field in dataclasses.fields(item):
        yield field.name, getattr(item, field.name), field.metadata


def check_fields(item: Any) -> bool:
    """Check and normalise the fields of a frozen dataclass; return whether a length is still open.

    Numbers of factors become floats and sequences tuples, so that the dataclass compares and hashes by value.
    """
    checked: dict[str, Any] = {}
    for name, value, kind in field_items(item):
        if "duration" in kind:
            checked[name] = check_duration(name, value, rest=kind["rest"])
        elif "durations" in kind:
            checked[name] = _each(name, value, check_duration)
        elif "factor" in kind:
            checked[name] = None if value is None and kind["optional"] else _check_factor(name, value)
        elif "factors" in kind:
            checked[name] = _each(name, value, _check_factor)
        elif "parts" in kind:
            checked[name] = tuple(value) if isinstance(value, (list, tuple)) else value
    item.__dict__.update(checked)  # past the frozen dataclass's __setattr__
    return any(_has_open_length(getattr(item, name), kind) for name, _, kind in field_items(item))


def resolve_fields(item: Any, horizon: Horizon) -> dict[str, Any]:
    """Return the lengths of a frozen dataclass in steps, and its schedules resolved, by field name."""
    changes: dict[str, Any] = {}
    for name, value, kind in field_items(item):
        if "duration" in kind:
            changes[name] = horizon.steps(name, value)
        elif "durations" in kind:
            changes[name] = _each(name, value, horizon.steps)
        elif isinstance(value, Schedule):
            changes[name] = value._resolve(horizon)
    return changes


class Schedule(ABC):
    """A learning-rate schedule: ``schedule(step)`` is the factor on the base rate that the step with that index uses.

    Steps count optimizer steps from 0, which is the first step. Every step >= 0 has a value; past its end a schedule
    holds its last value. Schedules are frozen dataclasses: they compare, hash, pickle and compose.

    A length may be given in steps, as a share of the run (``0.05``, ``"5%"``) or in epochs (``"2ep"``), and the last
    one may be left out to fill the rest. A schedule with such lengths is *open*: :meth:`resolve` counts them for a
    run of known length and returns the schedule that can be called.

    To write a schedule of your own, subclass this class as a frozen dataclass and define ``_factor(step)``.

    Example:
        >>> from lightning_plugins import WarmupCosine
        >>> schedule = WarmupCosine(warmup="20%").resolve(total_steps=10)
        >>> schedule
        WarmupCosine(warmup=2, hold=0, total=10, start=0.0, end=0.0)
        >>> [round(schedule(step), 3) for step in range(12)]
        [0.0, 0.5, 1.0, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038, 0.0, 0.0]
    """

    _open = False  # whether a length still waits for `resolve`

    def __post_init__(self) -> None:
        """Check the fields, then, once every length is known, let the schedule prepare its constants."""
        self.__dict__["_open"] = check_fields(self)
        self._check()
        if not self._open:
            self.__dict__.update(self._prepare())  # no fields, so equality and hash ignore them

    # -- what a schedule defines ------------------------------------------------------------------------------------

    @abstractmethod
    def _factor(self, step: float) -> float:
        """Return the factor at ``step`` >= 0; every length is known."""

    def _check(self) -> None:  # noqa: B027  # most have nothing to add
        """Raise when the arguments alone show a fault."""

    def _prepare(self) -> dict[str, Any]:
        """Check the lengths against each other and return constants for ``_factor``, by attribute name."""
        return {}

    def _resolve(self: Self, horizon: Horizon) -> Self:
        """Return the schedule with every length in steps."""
        return dataclasses.replace(cast(Any, self), **resolve_fields(self, horizon))  # type: ignore[no-any-return]

    def _needed_steps(self) -> int:
        """Return how long a run must be for every stated part to happen."""
        return 0

    # -- what everybody does with one -------------------------------------------------------------------------------

    def __call__(self, step: int) -> float:
        """Return the factor that optimizer step ``step`` uses, counted from 0.

        Raises:
            ValueError: If ``step`` is negative, or a length still waits for :meth:`resolve`.
        """
        if self._open or step < 0:
            self._refuse(step)
        return self._factor(step)

    @property
    def is_open(self) -> bool:
        """Whether a length waits for the run's: then call :meth:`resolve` first."""
        return self._open

    def resolve(
        self: Self, total_steps: int | None, steps_per_epoch: float | None = None, *, strict: bool = True
    ) -> Self:
        """Return this schedule for a run of known length, every duration counted in steps.

        Args:
            total_steps: Optimizer steps of the run, at least 0. ``None``: unknown, which is an error only if a length
                depends on it.
            steps_per_epoch: Optimizer steps of an epoch, above 0; needed by durations such as ``"2ep"``.
            strict: Whether a schedule that states more steps than the run has is an error. With ``False`` the run
                ends inside the schedule, as in a quick trial.

        Raises:
            TypeError: If a length is of the wrong type.
            ValueError: If the parts need more steps than there are (:class:`ScheduleTooLongError`) or a share of a
                run of unknown length is asked for (:class:`RunLengthUnknownError`).
        """
        if total_steps is not None:
            total_steps = whole_number("total_steps", total_steps, unit="steps")
        if steps_per_epoch is not None:
            steps_per_epoch = real_number("steps_per_epoch", steps_per_epoch, above=0)
        resolved = self._resolve(Horizon(total_steps, steps_per_epoch, total_steps, strict))
        needed = resolved._needed_steps()
        if strict and total_steps is not None and needed > total_steps:
            raise ScheduleTooLongError(
                f"`total_steps` must be at least {needed}, the steps that {resolved!r} needs, got {total_steps}; "
                "shorten the schedule or lengthen the run."
            )
        return resolved

    def preview(self, total_steps: int, steps_per_epoch: float | None = None) -> list[float]:
        """Return the factors of the first ``total_steps`` steps; an open schedule is resolved for that many.

        Example:
            >>> from lightning_plugins import Linear
            >>> Linear(steps=4, start=1, end=0).preview(6)
            [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        """
        total_steps = whole_number("total_steps", total_steps, unit="steps")
        schedule = self.resolve(total_steps, steps_per_epoch) if self._open else self
        return [schedule(step) for step in range(total_steps)]

    def plot(
        self,
        total_steps: int,
        path: str | Path,
        *,
        compare: Mapping[str, Schedule] | None = None,
        base_lr: float | None = None,
        steps_per_epoch: float | None = None,
    ) -> Path:
        """Draw the schedule into a picture; needs matplotlib (``pip install lightning-plugins[plot]``).

        Args:
            total_steps: Optimizer steps to draw.
            path: Where to write; the suffix chooses the format. Parent directories are made.
            compare: Further schedules in the same picture, by label.
            base_lr: Base learning rate; the axis then shows rates instead of factors.
            steps_per_epoch: Optimizer steps of an epoch, for durations in epochs.

        Returns:
            The path written.
        """
        labelled = {str(self): self, **(compare or {})}
        return plot.plot_schedules(labelled, total_steps, path, base_lr=base_lr, steps_per_epoch=steps_per_epoch)

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as plain JSON values; functions become their import paths.

        Example:
            >>> from lightning_plugins import Linear, Schedule
            >>> Linear("10%", 0, 1).to_dict()
            {'class': 'Linear', 'steps': '10%', 'start': 0.0, 'end': 1.0}
            >>> Schedule.from_dict(Linear("10%", 0, 1).to_dict())
            Linear(steps='10%', start=0.0, end=1.0)
        """
        return configuration.to_plain(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any], trust: bool = False) -> Schedule:  # noqa: FBT001, FBT002  # contract
        """Return the schedule that :meth:`to_dict` described.

        Args:
            data: What ``to_dict`` returned, possibly after a trip through JSON.
            trust: Whether import paths in ``data`` (a curve of your own, a schedule of your own) may be followed,
                which runs the code they name.

        Raises:
            ValueError: If ``data`` names an unknown schedule or argument, or code that is not trusted.
        """
        return configuration.from_plain(data, trust=trust)

    def delay(self, steps: Duration) -> combinators.Delayed:
        """Return f(max(t - steps, 0)): the first value for ``steps`` steps, then this schedule."""
        return combinators.Delayed(self, steps)

    def shift(self, steps: Duration) -> combinators.Shifted:
        """Return f(t + steps): this schedule from its step ``steps`` on; ``shift(1)`` skips a first rate of 0."""
        return combinators.Shifted(self, steps)

    def hold_every(self, steps: Duration) -> combinators.HeldEvery:
        """Return f(t // steps): every value lasts ``steps`` steps (OpenNMT's step duration)."""
        return combinators.HeldEvery(self, steps)

    def floor(self, factor: float) -> combinators.Floored:
        """Return max(f(t), factor); lifts a warm-up from below too, as OpenNMT's minimum rate does."""
        return combinators.Floored(self, factor)

    def scale(self, factor: float) -> combinators.Scaled:
        """Return factor * f(t)."""
        return combinators.Scaled(self, factor)

    def cycle(
        self, period: Duration, count: int | None = None, multiplier: float = 1.0, decay: float = 1.0
    ) -> combinators.Cycled:
        """Return this schedule over and over; see :class:`~lightning_plugins.schedules.combinators.Cycled`."""
        return combinators.Cycled(self, period, count, multiplier, decay)

    def __mul__(self, other: Schedule | float) -> combinators.Product | combinators.Scaled:
        """Return the product with another schedule or with a number."""
        if isinstance(other, Schedule):
            return combinators.Product(self, other)
        if isinstance(other, bool) or not isinstance(other, (int, float)):
            return NotImplemented
        return combinators.Scaled(self, other)

    __rmul__ = __mul__

    def _refuse(self, step: float) -> None:
        if self._open:
            raise ValueError(
                f"{self!r} has lengths that depend on the run's: call `resolve(total_steps)` first, "
                "or give every length in steps."
            )
        raise ValueError(f"`step` must be at least 0, got {shown(step)}.")


def _each(name: str, values: Any, check: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    return tuple(check(f"{name}[{index}]", value) for index, value in enumerate(a_list(name, values)))


def _check_factor(name: str, value: Any) -> float:
    return float(real_number(name, value, at_least=0))


def _has_open_length(value: Any, kind: Mapping[str, Any]) -> bool:
    if "duration" in kind:
        return is_open(value)
    if "durations" in kind:
        return any(map(is_open, value))
    items = value if isinstance(value, tuple) else (value,)
    return "parts" in kind and any(getattr(item, "is_open", False) for item in items)


# At the end, because what they hold are schedules themselves.
from lightning_plugins.schedules import combinators, configuration, plot  # noqa: E402
