"""Schedules put together from pieces, one after another in time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

from lightning_plugins.core.durations import Duration, Horizon, ScheduleTooLongError, in_steps
from lightning_plugins.core.validation import shown, true_or_false
from lightning_plugins.schedules.curves import Curve, progress_along
from lightning_plugins.schedules.fields import (
    Declared,
    check_fields,
    curve,
    duration,
    durations,
    factor,
    factors,
    keep,
    parts,
    resolve_fields,
)
from lightning_plugins.schedules.schedule import Schedule


@dataclass(frozen=True)
class PiecewiseConstant(Schedule):
    """``values[0]`` before ``boundaries[0]``, ``values[1]`` from there on, and so on.

    At a boundary the later value answers, as in torch's ``MultiStepLR`` and optax; Keras changes one step later.

    Args:
        boundaries: Durations from the start, in ascending order.
        values: Factors, one more than boundaries.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the numbers do not match, a factor is negative or the boundaries descend.

    Example:
        >>> PiecewiseConstant(boundaries=[2, 4], values=[1, 0.5, 0.1]).preview(6)
        [1.0, 1.0, 0.5, 0.5, 0.1, 0.1]
    """

    boundaries: Sequence[Duration] = durations()
    values: Sequence[float] = factors()

    def _check(self) -> None:
        _check_number(self.boundaries, self.values, of="values")

    def _prepare(self) -> dict[str, Any]:
        _check_ascending(self.boundaries)
        return {}

    def _factor(self, step: float) -> float:
        return self.values[bisect_right(self.boundaries, step)]  # type: ignore[type-var]  # steps by now

    def _needed_steps(self) -> int:
        return in_steps(self.boundaries[-1]) if self.boundaries else 0


@dataclass(frozen=True)
class Join(Schedule):
    """One schedule after another; each counts its steps from its own beginning.

    At a boundary the later part answers, with its first value. A part may be cut by the next boundary, or end before
    it and hold its last value until there. A part without a length fills its stretch.

    Args:
        parts: Schedules, in order.
        boundaries: Where the second, third, ... part begins: durations from the start, in ascending order, one fewer
            than parts.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the numbers do not match or the boundaries descend.

    Example:
        >>> from lightning_plugins import Constant, Linear
        >>> Join([Linear(2, 0, 1), Constant(1), Linear(None, 1, 0)], boundaries=[2, 4]).preview(8)
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    parts: Sequence[Schedule] = parts()
    boundaries: Sequence[Duration] = durations()

    _begins: ClassVar[tuple[int, ...]]  # set by _prepare, on the instance

    def _check(self) -> None:
        _check_kind("parts", self.parts, Schedule)
        _check_number(self.boundaries, self.parts, of="parts")

    def _prepare(self) -> dict[str, Any]:
        _check_ascending(self.boundaries)
        return {"_begins": (0, *self.boundaries)}

    def _resolve(self, horizon: Horizon) -> Join:
        boundaries: tuple[int, ...] = resolve_fields(self, horizon)["boundaries"]
        begins, ends = (0, *boundaries), (*boundaries, None)
        resolved = tuple(
            part._resolve(horizon.after(begin) if end is None else horizon.until(end - begin))
            for part, begin, end in zip(self.parts, begins, ends, strict=True)
        )
        return replace(self, parts=resolved, boundaries=boundaries)

    def _factor(self, step: float) -> float:
        index = bisect_right(self._begins, step) - 1
        return self.parts[index]._factor(step - self._begins[index])

    def _needed_steps(self) -> int:
        return self._begins[-1] + self.parts[-1]._needed_steps()


@dataclass(frozen=True)
class Segment(Declared):
    """A piece of :class:`Segments`: from ``start`` to ``end`` in ``steps`` along a shape.

    Args:
        shape: ``"linear"``, ``"cosine"``, ``"1-sqrt"``, a callable on [0, 1] or its import path; a callable c is
            rescaled to (c(x) - c(0)) / (c(1) - c(0)).
        end: Last factor, at least 0.
        start: First factor, at least 0; ``None`` continues from the previous segment's end, 0 for the first.
        steps: Duration; ``None``, in one segment at most, fills the rest of the run.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a length or factor is negative or not finite.
    """

    shape: str | Curve = curve(default="linear")
    end: float = factor(kw_only=True)
    start: float | None = factor(default=None, kw_only=True, optional=True)
    steps: Duration = duration(rest=True, default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the fields."""
        keep(self, {"is_open": check_fields(self)})
        progress_along("shape", self.shape, flat=True)


class _Piece(NamedTuple):
    """From step ``begin`` to the next piece: start + (end - start) * progress((t - origin) / span), then end."""

    begin: int
    origin: int
    span: int
    start: float
    end: float
    progress: Curve


@dataclass(frozen=True)
class Segments(Schedule):
    """Segments of arbitrary shape, one after another: the schedule of Swift for TensorFlow's training loop.

    Half-open by default: a segment of n steps that begins at step b has the value
    start + (end - start) * p((t - b) / n) at step t, and its end is the next segment's first value.

    With ``endpoint=True`` it is closed: a segment's n values run from exactly ``start`` to exactly ``end``
    (p((t - b) / (n - 1)), as ``numpy.linspace``), and a segment that starts where the previous one ended shares that
    value with it, so that k segments of n steps make k (n - 1) + 1 values.

    Args:
        segments: The segments, at least one. The one without ``steps`` fills the rest of the run.
        endpoint: Whether ends are closed.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no segment, or more than one without ``steps``, or a flat curve has different ends.

    Example:
        BERT's schedule, up in 10 steps, then down to 0 at the run's last step:

        >>> schedule = Segments([Segment(start=0, end=1, steps=10), Segment(end=0)], endpoint=True)
        >>> rates = schedule.preview(500)
        >>> rates[0], rates[9], rates[499]
        (0.0, 1.0, 0.0)

    References:
        ``makeSchedule`` of swift-models. There a joint belongs to the earlier segment and a stated start that differs
        from the previous end never happens; here it is the value of the next step. There a segment of one step is
        never selected and its end is lost; here it sets the value from which the next segment starts, as one of zero
        steps does. Past the end that one traps and this holds.
    """

    segments: Sequence[Segment] = parts()
    endpoint: bool = False

    _pieces: ClassVar[tuple[_Piece, ...]]  # set by _prepare, on the instance
    _begins: ClassVar[tuple[int, ...]]

    def _check(self) -> None:
        _check_kind("segments", self.segments, Segment)
        true_or_false("endpoint", self.endpoint)
        if sum(segment.steps is None for segment in self.segments) > 1:
            raise ValueError("`segments` must leave `steps` out of one segment at most, got several without.")
        for index, (segment, start) in enumerate(zip(self.segments, self._starts(), strict=True)):
            progress_along(f"segments[{index}].shape", segment.shape, flat=start == segment.end)

    def _prepare(self) -> dict[str, Any]:
        counts = self._value_counts([in_steps(segment.steps) for segment in self.segments])
        begins = tuple(accumulate(counts, initial=0))[:-1]
        pieces = []
        for segment, start, begin, count in zip(self.segments, self._starts(), begins, counts, strict=True):
            steps = in_steps(segment.steps)
            progress = progress_along("shape", segment.shape, flat=start == segment.end)
            span = steps - 1 if self.endpoint else steps
            pieces.append(_Piece(begin, begin - (steps - count), span, start, segment.end, progress))
        return {"_pieces": tuple(pieces), "_begins": begins}

    def _resolve(self, horizon: Horizon) -> Segments:
        steps = [0 if s.steps is None else horizon.steps("steps", s.steps) for s in self.segments]
        for index in [i for i, segment in enumerate(self.segments) if segment.steps is None]:
            stated = sum(self._value_counts(steps))
            total = horizon.steps("steps", None)
            if stated > total and horizon.strict:
                raise ScheduleTooLongError(
                    f"`segments` must fit into the run, got {stated} stated steps > {total}; shorten them or "
                    "lengthen the run."
                )
            # A closed segment that continues another has one value more than steps of its own: the shared joint.
            steps[index] = max(total - stated, 0) + (self.endpoint and self._shares_joint(index, steps))
        return replace(self, segments=tuple(replace(s, steps=n) for s, n in zip(self.segments, steps, strict=True)))

    def _factor(self, step: float) -> float:
        piece = self._pieces[bisect_right(self._begins, step) - 1]
        position = step - piece.origin
        if position >= piece.span:
            return piece.end
        return piece.start + (piece.end - piece.start) * piece.progress(position / piece.span)

    def _needed_steps(self) -> int:
        return sum(self._value_counts([in_steps(segment.steps) for segment in self.segments]))

    def _starts(self) -> list[float]:
        """Return every segment's first factor."""
        ends = [0.0, *(segment.end for segment in self.segments)]
        return [
            end if segment.start is None else segment.start for segment, end in zip(self.segments, ends, strict=False)
        ]

    def _value_counts(self, steps: Sequence[int]) -> list[int]:
        """Return how many steps of the run belong to each segment."""
        counts: list[int] = []
        for index, number in enumerate(steps):
            shared = self.endpoint and self._shares_joint(index, counts)
            counts.append(max(number - shared, 0))
        return counts

    def _shares_joint(self, index: int, counts: Sequence[int]) -> bool:
        """Return whether a segment starts with the value that the last step before it used."""
        used = [segment.end for segment, count in zip(self.segments[:index], counts, strict=False) if count]
        return bool(used) and used[-1] == self._starts()[index]


def _check_kind(name: str, items: Any, kind: type) -> None:
    if not isinstance(items, tuple) or not items or not all(isinstance(item, kind) for item in items):
        raise TypeError(f"`{name}` must be a list of {kind.__name__} with at least one, got {shown(items)}.")


def _check_number(boundaries: Sequence[Duration], pieces: Sequence[Any], *, of: str) -> None:
    if len(boundaries) != len(pieces) - 1:
        raise ValueError(f"`boundaries` must be one fewer than `{of}`, got {len(boundaries)} and {len(pieces)}.")


def _check_ascending(boundaries: Sequence[Duration]) -> None:
    steps = [in_steps(boundary) for boundary in boundaries]
    if steps != sorted(steps):
        raise ValueError(f"`boundaries` must not descend, got {steps}.")
