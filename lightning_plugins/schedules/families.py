"""Schedules without an end: a warm-up, then a decay by a formula of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_plugins.core.durations import Duration, in_steps
from lightning_plugins.schedules.fields import duration, factor, whole
from lightning_plugins.schedules.schedule import Schedule


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """Linear warm-up to 1, then the inverse square root of the step.

    With w = warmup, s = timescale: start + (1 - start) * t / w for t < w, then 1 / sqrt((t - w + s) / s); with the
    default s = w that is sqrt(w / t).

    Args:
        warmup: Duration of the warm-up.
        timescale: Steps over which the decay unfolds, at least 1; ``None``: the warm-up, or 10,000 when that is 0.
        start: Factor of the first step, at least 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> InverseSqrt(warmup=4)(16)
        0.5

    References:
        Hugging Face's and fairseq's inverse square root; ``.shift(1)`` gives OpenNMT-tf's, which counts from 1.
    """

    warmup: Duration = duration()
    timescale: int | None = whole(default=None, unit="steps", optional=True)
    start: float = factor(default=0.0)

    _warmup: ClassVar[int]  # set by _prepare, on the instance
    _scale: ClassVar[int]

    def _prepare(self) -> dict[str, Any]:
        return {"_warmup": self.warmup, "_scale": self.timescale or self.warmup or 10_000}

    def _factor(self, step: float) -> float:
        past = step - self._warmup
        if past < 0:
            return self.start + (1.0 - self.start) * (step / self._warmup)
        return math.sqrt(self._scale / (past + self._scale))

    def _counts_steps(self) -> bool:
        return self.timescale is not None or self.warmup == 0

    def _needed_steps(self) -> int:
        return self._warmup


@dataclass(frozen=True)
class ReciprocalSqrt(Schedule):
    """1 / sqrt(max(t, warmup)): flat, then falling; no ramp. Multiply by sqrt(warmup) for a peak of 1.

    Args:
        warmup: Duration of the flat part; 0 counts as 1.

    Raises:
        TypeError: If ``warmup`` is no duration.
        ValueError: If it is negative.

    Example:
        >>> ReciprocalSqrt(warmup=100).preview(2)
        [0.1, 0.1]

    References:
        OpenNMT-tf's ``RsqrtDecay``, T5's schedule (Raffel et al., 2019, arXiv:1910.10683).
    """

    warmup: Duration = duration()

    _warmup: ClassVar[int]  # set by _prepare, on the instance

    def _prepare(self) -> dict[str, Any]:
        return {"_warmup": self.warmup}

    def _factor(self, step: float) -> float:
        return 1.0 / math.sqrt(max(step, self._warmup, 1))

    def _counts_steps(self) -> bool:
        return True

    def _needed_steps(self) -> int:
        return self._warmup


@dataclass(frozen=True)
class Noam(Schedule):
    """The Transformer's schedule: model_dim^-0.5 * min(n^-0.5, n * warmup^-1.5) with n = t + 1.

    The base rate is the scale (2 in OpenNMT's default, 1 in the paper). The peak, (model_dim * warmup)^-0.5, is used
    by the step with index warmup - 1.

    Args:
        model_dim: Width of the model, at least 1.
        warmup: Duration of the linear part; with 0 the rate falls from the start.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``model_dim`` is below 1 or ``warmup`` negative.

    Example:
        >>> rate = Noam(model_dim=4, warmup=8000).scale(2)(1)  # the second step of the OpenNMT article's example
        >>> f"{rate:.9f}"
        '0.000002795'

    References:
        Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762; OpenNMT-tf's ``NoamDecay``.
    """

    model_dim: int = whole()
    warmup: Duration = duration()

    _warmup: ClassVar[int]  # set by _prepare, on the instance
    _scale: ClassVar[float]
    _slope: ClassVar[float]

    def _prepare(self) -> dict[str, Any]:
        warmup = in_steps(self.warmup)
        return {"_warmup": warmup, "_scale": self.model_dim**-0.5, "_slope": warmup**-1.5 if warmup else 0.0}

    def _factor(self, step: float) -> float:
        n = step + 1
        return self._scale * (n * self._slope if n < self._warmup else 1.0 / math.sqrt(n))

    def _counts_steps(self) -> bool:
        return True

    def _needed_steps(self) -> int:
        return self._warmup


@dataclass(frozen=True)
class RNMTPlus(Schedule):
    """The schedule of RNMT+ for synchronous training on r = replicas workers.

    min(1 + t (r - 1) / (r p), r, r (2 r)^((S - r t) / (E - S))) with p = warmup, S = start_step, E = end_step: from 1
    up to r, a plateau, then an exponential decay without a floor. S and E count the steps of all replicas together.

    Args:
        replicas: Number of workers, at least 1.
        warmup: Duration of the warm-up.
        start_step: Where the decay begins, in steps of all replicas.
        end_step: Sets the slope of the decay, at least ``start_step``; equal: the factor drops to 0 there.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If one is out of range.

    References:
        Chen et al., The Best of Both Worlds, 2018, arXiv:1804.09849; OpenNMT-tf's ``RNMTPlusDecay``.
    """

    replicas: int = whole()
    warmup: Duration = duration()
    start_step: Duration = duration()
    end_step: Duration = duration()

    _lengths: ClassVar[tuple[int, int, int]]  # set by _prepare, on the instance

    def _prepare(self) -> dict[str, Any]:
        warmup, start, end = in_steps(self.warmup), in_steps(self.start_step), in_steps(self.end_step)
        if end < start:
            raise ValueError(f"`end_step` must be at least `start_step`, got {end} < {start}.")
        return {"_lengths": (warmup, start, end)}

    def _factor(self, step: float) -> float:
        replicas, (warmup, start, end) = self.replicas, self._lengths
        ramp = 1 + step * (replicas - 1) / (replicas * warmup) if warmup else math.inf
        past = replicas * step - start
        if past <= 0:  # the third term is at least r here; computing it might overflow
            return float(min(ramp, replicas))
        decay = replicas * (2 * replicas) ** (-past / (end - start)) if end > start else 0.0
        return float(min(ramp, replicas, decay))

    def _counts_steps(self) -> bool:
        return True

    def _needed_steps(self) -> int:
        return self._lengths[0]
