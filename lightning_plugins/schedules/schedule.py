"""What every schedule is: a pure value that maps an optimizer step to a factor."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from lightning_plugins.core.durations import Duration, Horizon, ScheduleTooLongError
from lightning_plugins.core.imports import by_import_path
from lightning_plugins.core.validation import shown, whole_number
from lightning_plugins.schedules.fields import Declared, check_fields, keep, resolve_fields

Self = TypeVar("Self", bound="Schedule")


class Schedule(ABC, Declared):
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
        keep(self, {"_open": check_fields(self)})
        self._check()
        if not self._open:
            keep(self, self._prepare())

    # -- what a schedule defines

    @abstractmethod
    def _factor(self, step: float) -> float:
        """Return the factor at ``step`` >= 0; every length is known."""

    def _check(self) -> None:  # most have nothing to add
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

    def _counts_steps(self) -> bool:
        """Return whether the factor depends on a number of steps that is no length: no clock but steps will do then."""
        return False

    # -- what is done with one

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
        return self.resolve_for(Horizon.of(total_steps, steps_per_epoch, strict=strict))

    def resolve_for(self: Self, horizon: Horizon) -> Self:
        """Return this schedule for a run whose epochs may differ; see :meth:`resolve`."""
        resolved, total_steps = self._resolve(horizon), horizon.total_steps
        needed = resolved._needed_steps()
        if horizon.strict and total_steps is not None and needed > total_steps:
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
        labeled = {str(self): self, **(compare or {})}
        draw = _sibling("plot.plot_schedules")
        drawn: Path = draw(labeled, total_steps, path, base_lr=base_lr, steps_per_epoch=steps_per_epoch)
        return drawn

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as plain JSON values; functions become their import paths.

        Example:
            >>> from lightning_plugins import Linear, Schedule
            >>> Linear("10%", 0, 1).to_dict()
            {'class': 'Linear', 'steps': '10%', 'start': 0.0, 'end': 1.0}
            >>> Schedule.from_dict(Linear("10%", 0, 1).to_dict())
            Linear(steps='10%', start=0.0, end=1.0)
        """
        plain: dict[str, Any] = _sibling("configuration.to_plain")(self)
        return plain

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
        schedule: Schedule = _sibling("configuration.from_plain")(data, trust=trust)
        return schedule

    def delay(self, steps: Duration) -> Schedule:
        """Return f(max(t - steps, 0)): the first value for ``steps`` steps, then this schedule."""
        return _combined("Delayed", self, steps)

    def shift(self, steps: Duration) -> Schedule:
        """Return f(t + steps): this schedule from its step ``steps`` on; ``shift(1)`` skips a first rate of 0."""
        return _combined("Shifted", self, steps)

    def hold_every(self, steps: Duration) -> Schedule:
        """Return f(t // steps): every value lasts ``steps`` steps (OpenNMT's step duration)."""
        return _combined("HeldEvery", self, steps)

    def floor(self, factor: float) -> Schedule:
        """Return max(f(t), factor); lifts a warm-up from below too, as OpenNMT's minimum rate does."""
        return _combined("Floored", self, factor)

    def scale(self, factor: float) -> Schedule:
        """Return factor * f(t)."""
        return _combined("Scaled", self, factor)

    def cycle(
        self, period: Duration, count: int | None = None, multiplier: float = 1.0, decay: float = 1.0
    ) -> Schedule:
        """Return this schedule over and over; see :class:`~lightning_plugins.schedules.combinators.Cycled`."""
        return _combined("Cycled", self, period, count, multiplier, decay)

    def __mul__(self, other: Schedule | float) -> Schedule:
        """Return the product with another schedule or with a number."""
        if isinstance(other, Schedule):
            return _combined("Product", self, other)
        if isinstance(other, bool) or not isinstance(other, (int, float)):
            return NotImplemented
        return _combined("Scaled", self, other)

    __rmul__ = __mul__

    def _refuse(self, step: float) -> None:
        if self._open:
            raise ValueError(
                f"`schedule` must know the length of the run, got {self!r}, which has lengths that depend on the run's "
                "(shares of it also where `total` is given): call `resolve(total_steps)` first, or give every length "
                "in steps."
            )
        raise ValueError(f"`step` must be at least 0, got {shown(step)}.")


def _sibling(path: str) -> Any:
    """Return a name of another module of this package, which imports this one."""
    return by_import_path(f"{__package__}.{path}")


def _combined(name: str, *arguments: Any) -> Schedule:
    schedule: Schedule = _sibling(f"combinators.{name}")(*arguments)
    return schedule
