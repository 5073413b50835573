"""The decay of a half-life, in steps, samples, epochs or a share of the run."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_plugins.core.durations import Horizon, check_duration
from lightning_plugins.core.validation import real_number, shown
from lightning_plugins.ema.decay import ConstantDecay, DecayRule


@dataclass(frozen=True)
class HalfLife(DecayRule):
    """2^(-k / h): after h steps, or h samples, half of the average is new.

    Args:
        steps: h in optimizer steps, at least 1; or a share of the run, as a float below 1 or ``"2%"``; or epochs,
            ``"2ep"``. What a share or epochs make is rounded to the nearest step; 0 steps copy the weights.
        samples: h in training samples, above 0; the half-life then stays the same when the batch size changes.
            Exactly one of the two.

    Example:
        >>> HalfLife(steps=4)(4, steps=4)
        0.5
        >>> HalfLife("2%").resolve(total_steps=200) == HalfLife(steps=4)
        True
        >>> HalfLife(samples=512).for_samples_per_step(128) == HalfLife(steps=4)
        True

    References:
        D. Busbridge et al., "How to scale your EMA", 2023, arXiv:2307.13813, for why samples.
    """

    steps: float | str | None = None
    samples: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.samples is None):
            raise ValueError(
                f"`HalfLife` must have exactly one of `steps` and `samples`, "
                f"got {shown(self.steps)} and {shown(self.samples)}."
            )
        if isinstance(self.steps, str):
            check_duration("steps", self.steps)
        elif self.steps is not None:
            vars(self)["steps"] = real_number("steps", self.steps, above=0)
        if self.samples is not None:
            vars(self)["samples"] = real_number("samples", self.samples, above=0)

    @property
    def needs_samples_per_step(self) -> bool:
        """Whether the half-life is in samples."""
        return self.samples is not None

    def for_samples_per_step(self, samples: float) -> DecayRule:
        """Return the half-life in steps of ``samples`` samples each."""
        if self.samples is None:
            return self
        steps = self.samples / real_number("samples", samples, above=0)
        if steps >= 1:
            return HalfLife(steps=steps)
        return ConstantDecay(2 ** (-1 / steps) if steps else 0.0)

    @property
    def is_open(self) -> bool:
        """Whether the half-life is a share of the run or in epochs."""
        return isinstance(self.steps, str) or (self.steps is not None and self.steps < 1)

    def resolve_for(self, horizon: Horizon) -> DecayRule:
        """Return the half-life in steps."""
        if not self.is_open:
            return self
        steps = horizon.steps("steps", self.steps)
        return HalfLife(steps=steps) if steps else ConstantDecay(0.0)

    def _single(self, n: int) -> float:
        return self._over(n, 1)

    def _over(self, n: int, steps: int) -> float:
        if self.steps is None:
            raise ValueError("`HalfLife(samples=...)` must know the samples per step: call `for_samples_per_step`.")
        if isinstance(self.steps, str) or self.steps < 1:
            raise ValueError(f"`{self!r}` must know the length of the run: call `resolve(total_steps)` first.")
        return float(2 ** (-steps / self.steps))
