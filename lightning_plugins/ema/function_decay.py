"""What a number, a function of the step or a schedule means where a decay is expected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_plugins.core.durations import Horizon
from lightning_plugins.core.imports import by_import_path
from lightning_plugins.core.validation import real_number, shown
from lightning_plugins.ema.decay import DecayRule, WarmupDecay


def as_decay_rule(decay: Any) -> DecayRule:
    """Return ``decay`` as a rule.

    A number d means ``WarmupDecay(d)``, a function f means f(n), and a schedule, which is a function with a method
    ``resolve(total_steps, steps_per_epoch)``, means schedule(n - 1): schedules count steps from 0. A text is the import
    path of any of these.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it is a number outside [0, 1] or an import path that leads nowhere.
    """
    if isinstance(decay, DecayRule):
        return decay
    if isinstance(decay, str) and "." in decay:
        try:
            found = by_import_path(decay)
        except ImportError as error:
            raise ValueError(f"`decay` as a text must be an import path, got {shown(decay)}: {error}.") from error
        if not isinstance(found, str):
            return as_decay_rule(found)
    if callable(decay) and not isinstance(decay, type):
        return ScheduleDecay(decay) if hasattr(decay, "resolve") else FunctionDecay(decay)
    if isinstance(decay, (bool, str, type)) or not hasattr(decay, "__float__"):
        raise TypeError(
            "`decay` must be a number or a decay rule such as HalfLife(steps=1000), a schedule, or a function of the "
            f"step or its import path, got {shown(decay)}."
        )
    return WarmupDecay(real_number("decay", decay, at_least=0, at_most=1))


@dataclass(frozen=True)
class FunctionDecay(DecayRule):
    """f(n), the first step being 1: what a function means where a decay is expected.

    Args:
        function: The decay of step n alone, in [0, 1].
    """

    function: Callable[[int], float]

    def _single(self, n: int) -> float:
        return self.function(n)


@dataclass(frozen=True)
class ScheduleDecay(DecayRule):
    """schedule(n - 1): what a schedule means where a decay is expected; schedules count steps from 0.

    Shares are of the whole run; a length that fills the rest begins with the average.

    Args:
        schedule: A function of the step with ``resolve(total_steps, steps_per_epoch)``, which gives the function for a
            run of known length.

    References:
        J.-B. Grill et al., "Bootstrap your own latent", 2020, arXiv:2006.07733, and M. Caron et al., "Emerging
        properties in self-supervised vision transformers" (DINO), 2021, arXiv:2104.14294: ``Cosine(None, 0.996, 1)``.
    """

    schedule: Any

    @property
    def is_open(self) -> bool:
        """Whether a length of the schedule waits for the run's."""
        return bool(getattr(self.schedule, "is_open", True))

    def resolve_for(self, horizon: Horizon) -> DecayRule:
        """Return the same for the schedule of the run."""
        resolve: Any = getattr(self.schedule, "resolve_for", None)
        if resolve is not None:
            return ScheduleDecay(resolve(horizon))
        epoch = None if horizon.steps_of_epochs is None else horizon.steps_of_epochs(1)
        return ScheduleDecay(self.schedule.resolve(horizon.remaining, epoch))

    def _single(self, n: int) -> float:
        decay: float = self.schedule(n - 1)
        return decay
