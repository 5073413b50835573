"""How fast the averages of a run forget, counted in steps of that run as its length is known."""

from __future__ import annotations

from dataclasses import replace

from lightning_plugins.core.durations import Horizon, ScheduleTooLongError
from lightning_plugins.ema.decay import DecayRule, UpdateCounter


class Pace:
    """The decay rules of a run's averages, and the counter that says when an update is due.

    What depends on the length of the run is counted in its steps by :meth:`resolve_for`, again whenever that length
    has changed: a longer run is followed from its next update on. A length that fills the rest of the run begins where
    the average does.

    Args:
        rules: The decay of each average.
        counter: Says when the averages begin and when they are updated.

    Attributes:
        rules: The rules, counted in steps.
        counts_samples: Whether one counts samples.

    Example:
        >>> from lightning_plugins.ema.half_life import HalfLife
        >>> pace = Pace([HalfLife("10%")], UpdateCounter(start_step="50%"))
        >>> pace.resolve_for(Horizon.of(40))[0]
        'HalfLife(steps=4, samples=None), every step, from step 20 on.'
        >>> pace.rules[0](4, steps=4)
        0.5
    """

    def __init__(self, rules: list[DecayRule], counter: UpdateCounter) -> None:
        self.counter = counter
        self._given = rules
        self.rules = rules
        self.counts_samples = any(rule.needs_samples_per_step for rule in rules)
        self._horizon: Horizon | None = None

    @property
    def is_open(self) -> bool:
        """Whether anything depends on the length of the run."""
        return self.counter.is_open or any(rule.is_open for rule in self._given)

    def for_samples_per_step(self, samples: float) -> list[DecayRule]:
        """Return the rules for a run whose every step sees ``samples`` samples."""
        return [rule.for_samples_per_step(samples) for rule in self.rules]

    def resolve_for(self, horizon: Horizon) -> tuple[str, str]:
        """Count everything in the steps of a run.

        Args:
            horizon: The run of the present Trainer; steps that were taken under an earlier one lie before it.

        Returns:
            A sentence on what is followed now, if that is new, and a warning, if the run is too short for a schedule.

        Raises:
            RunLengthUnknownError: If that needs a length which is not known.
        """
        counter = self.counter
        before = self.rules, counter.start_step, counter.every
        counter.resolve_for(horizon)
        if horizon.total_steps is not None:
            total = horizon.total_steps + counter.earlier
            horizon = replace(horizon, total_steps=total, remaining=total)
        self._horizon = horizon
        warning = self.follow_origin()
        if before == (self.rules, counter.start_step, counter.every):
            return "", ""
        rules = (rule for rule, given in zip(self.rules, self._given, strict=True) if given.is_open)
        often = "every step" if counter.every == 1 else f"every {counter.every} steps"
        return f"{', '.join([*map(repr, rules), often])}, from step {counter.start_step} on.", warning

    def follow_origin(self) -> str:
        """Count the rules' lengths anew from where the average has begun; return a warning, if there is one."""
        if self._horizon is None:
            return ""
        origin = self.counter.start_step if self.counter.origin is None else self.counter.origin
        horizon = self._horizon.after(origin)
        try:
            self.rules = [rule.resolve_for(horizon) for rule in self._given]
        except ScheduleTooLongError as error:
            self.rules = [rule.resolve_for(replace(horizon, strict=False)) for rule in self._given]
            return f"the run of {horizon.total_steps} steps ends inside the schedule of the decay: {error}"
        return ""
