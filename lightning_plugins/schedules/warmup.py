"""Schedules that span a run: a warm-up from ``start`` to the peak of 1, and a way down to ``end``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar, cast

from lightning_plugins.core.durations import Duration, Horizon, ScheduleTooLongError, in_steps, is_open
from lightning_plugins.core.validation import one_of
from lightning_plugins.schedules.curves import NAMED_CURVES, Progress
from lightning_plugins.schedules.fields import duration, factor, number
from lightning_plugins.schedules.schedule import Schedule

Self = TypeVar("Self", bound="_WarmupThenDecay")


class _WarmupThenDecay:
    """Linear from ``start`` to 1, a plateau of 1, then a decay to ``end`` that finishes at step ``total``."""

    warmup: Duration
    total: Duration
    start: float
    end: float
    _stated: ClassVar[tuple[str, ...]]  # the lengths that have to fit into `total`
    _shape: ClassVar[str] = "cosine"

    _warmup_length: ClassVar[int]  # this and the next three are set by _prepare, on the instance
    _decay_begin: ClassVar[int]
    _decay_length: ClassVar[int]
    _progress: ClassVar[Progress]

    def _decay_steps(self) -> int:
        """Return the length of the decay: what the stated lengths leave of the total."""
        return in_steps(self.total) - sum(in_steps(getattr(self, name)) for name in self._stated)

    def _prepare(self) -> dict[str, Any]:
        lengths, total = {name: getattr(self, name) for name in self._stated}, in_steps(self.total)
        if sum(lengths.values()) > total:
            raise ScheduleTooLongError(
                f"{' + '.join(f'`{name}`' for name in lengths)} must be at most `total`, "
                f"got {' + '.join(map(str, lengths.values()))} > {total} steps; shorten them or lengthen the run."
            )
        decay = self._decay_steps()
        return {
            "_warmup_length": in_steps(self.warmup),
            "_decay_begin": total - decay,
            "_decay_length": decay,
            "_progress": NAMED_CURVES[self._shape],
        }

    def _resolve(self: Self, horizon: Horizon) -> Self:
        lengths = {name: horizon.steps(name, getattr(self, name)) for name in self._stated}
        total = horizon.steps("total", self.total)
        if not horizon.strict and is_open(self.total):
            total = max(total, sum(lengths.values()))
        return replace(cast(Any, self), total=total, **lengths)  # type: ignore[no-any-return]

    def _factor(self, step: float) -> float:
        position = step - self._decay_begin
        if position >= 0:
            if position >= self._decay_length:
                return self.end
            return 1.0 + (self.end - 1.0) * self._progress(position / self._decay_length)
        if step < self._warmup_length:
            return self.start + (1.0 - self.start) * (step / self._warmup_length)
        return 1.0


@dataclass(frozen=True)
class WarmupCosine(_WarmupThenDecay, Schedule):
    """Linear warm-up, a hold at 1, half a cosine wave down.

    With w = warmup, h = hold, N = total:

    - t < w: start + (1 - start) * t / w
    - w <= t < w + h: 1
    - w + h <= t < N: end + (1 - end) * (1 + cos(pi * (t - w - h) / (N - w - h))) / 2
    - t >= N: end

    The peak of 1 is used by step w. A warm-up from 0 makes the first step a step of rate 0; ``.shift(1)`` skips it.

    Args:
        warmup: Duration of the warm-up. 5 % of the run is a usual choice. A share is of the run, which the callback or
            ``resolve`` knows, also where ``total`` is given.
        hold: Duration of the plateau at the peak.
        total: Duration of the whole schedule; ``None`` is the run. May be longer or shorter than the run.
        start: Factor of the first step, at least 0.
        end: Factor after the decay, at least 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a length or factor is negative or not finite, or warm-up and hold exceed ``total``.

    Example:
        >>> [round(value, 3) for value in WarmupCosine(warmup=2, hold=1, total=5).preview(6)]
        [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]

    References:
        Goyal et al., Accurate, Large Minibatch SGD, 2017, arXiv:1706.02677; He et al., Bag of Tricks for Image
        Classification, 2018, arXiv:1812.01187. Unlike Hugging Face's and the usual Keras recipe, the rate does not
        climb again past the end, ``start`` is used, and zero-length parts do not divide by zero.
    """

    warmup: Duration = duration()
    hold: Duration = duration(default=0)
    total: Duration = duration(rest=True, default=None)
    start: float = factor(default=0.0)
    end: float = factor(default=0.0)
    _stated = ("warmup", "hold")


@dataclass(frozen=True)
class WarmupLinear(_WarmupThenDecay, Schedule):
    """Linear warm-up to 1, then a straight line to ``end`` at step ``total``: BERT's schedule.

    With w = warmup, N = total: start + (1 - start) * t / w for t < w, then 1 + (end - 1) * (t - w) / (N - w), then
    ``end`` from t = N on.

    Args:
        warmup: Duration of the warm-up. A share is of the run, also where ``total`` is given.
        total: Duration of the whole schedule; ``None`` is the run.
        start: Factor of the first step, at least 0.
        end: Factor after the decay, at least 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a length or factor is negative or not finite, or the warm-up exceeds ``total``.

    Example:
        >>> WarmupLinear(warmup=2, total=4).preview(6)
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]

    References:
        Devlin et al., BERT, 2018, arXiv:1810.04805.
    """

    warmup: Duration = duration()
    total: Duration = duration(rest=True, default=None)
    start: float = factor(default=0.0)
    end: float = factor(default=0.0)
    _stated = ("warmup",)
    _shape = "linear"


@dataclass(frozen=True)
class WarmupStableDecay(_WarmupThenDecay, Schedule):
    """Linear warm-up, a stable phase at 1, and a decay over the last ``decay`` steps: the trapezoid, WSD.

    With w = warmup, d = decay, N = total, x = (t - N + d) / d in the decay: ``"1-sqrt"`` follows
    end + (1 - end) * (1 - sqrt(x)), ``"linear"`` end + (1 - end) * (1 - x), ``"cosine"`` half a cosine wave.

    Args:
        warmup: Duration of the warm-up. A share is of the run, also where ``total`` is given.
        decay: Duration of the decay; 10 to 20 % of the run is usual.
        total: Duration of the whole schedule; ``None`` is the run.
        shape: ``"1-sqrt"`` (the best of the three in the paper), ``"linear"`` or ``"cosine"``.
        start: Factor of the first step, at least 0.
        end: Factor after the decay, at least 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a length or factor is negative or not finite, warm-up and decay exceed ``total``, or ``shape``
            is unknown.

    Example:
        >>> WarmupStableDecay(warmup=2, decay=4, total=8, shape="linear").preview(9)
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]

    References:
        Hägele et al., 2024, arXiv:2405.18392; Hu et al., MiniCPM, 2024, arXiv:2404.06395.
    """

    warmup: Duration = duration()
    decay: Duration = duration()
    total: Duration = duration(rest=True, default=None)
    shape: Literal["1-sqrt", "linear", "cosine"] = "1-sqrt"
    start: float = factor(default=0.0)
    end: float = factor(default=0.0)
    _stated = ("warmup", "decay")

    def _check(self) -> None:
        one_of("shape", self.shape, NAMED_CURVES)

    def _decay_steps(self) -> int:
        return in_steps(self.decay)

    def _prepare(self) -> dict[str, Any]:
        return {**super()._prepare(), "_progress": NAMED_CURVES[self.shape]}


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Up to the peak and down to almost nothing in one run, as torch's ``OneCycleLR`` (two phases).

    With N = total and p = peak_at * N - 1: from ``start`` at t = 0 to 1 at t = p, then to ``end`` at t = N - 1. Closed,
    unlike every other schedule here: the last step uses exactly ``end``. The peak falls on a step where
    peak_at * N is whole; otherwise the nearest steps are a little below it.

    Args:
        total: Duration; ``None`` is the run.
        peak_at: Share of the run where the peak lies, in [0, 1].
        start: Factor of the first step, at least 0; torch's 1 / ``div_factor``.
        end: Factor of the last step, at least 0; torch's 1 / (``div_factor`` * ``final_div_factor``).
        shape: ``"cosine"`` or ``"linear"``, of both phases.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> [round(value, 3) for value in OneCycle(total=6, peak_at=0.5, start=0.1, end=0).preview(7)]
        [0.1, 0.55, 1.0, 0.75, 0.25, 0.0, 0.0]

    References:
        Smith and Topin, Super-Convergence, 2017, arXiv:1708.07120; torch's ``OneCycleLR``, which raises past its end
        where this holds, and takes the peak rate as an argument where this takes the optimizer's rate.
    """

    total: Duration = duration(rest=True, default=None)
    peak_at: float = number(at_least=0, at_most=1, default=0.3)
    start: float = factor(default=1 / 25)
    end: float = factor(default=1e-4 / 25)
    shape: Literal["cosine", "linear"] = "cosine"

    _peak: ClassVar[float]  # set by _prepare, on the instance
    _last: ClassVar[int]
    _progress: ClassVar[Progress]

    def _check(self) -> None:
        one_of("shape", self.shape, ("cosine", "linear"))

    def _prepare(self) -> dict[str, Any]:
        total = in_steps(self.total)
        return {"_peak": self.peak_at * total - 1, "_last": total - 1, "_progress": NAMED_CURVES[self.shape]}

    def _factor(self, step: float) -> float:
        if step >= self._last:
            return self.end
        if step > self._peak:
            return 1.0 + (self.end - 1.0) * self._progress((step - self._peak) / (self._last - self._peak))
        return self.start + (1.0 - self.start) * self._progress(step / self._peak) if self._peak > 0 else 1.0
