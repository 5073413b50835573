"""How fast an average forgets: decay rules as functions of the step.

The average *s* follows the weights *w* by ``s <- s - (1 - d) * (s - w)``. A rule says what *d* is for an update that
covers ``steps`` applied optimizer steps and ends with the ``n``-th since the average began, the first being 1. An
update that covers several steps uses the product of their single decays, each taken at its own step, so an average that
is updated every k steps forgets as fast as one that is updated every step. :class:`UpdateCounter` says when an update
is due.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_plugins.core.durations import Duration, Horizon, check_duration, is_open
from lightning_plugins.core.validation import real_number, shown, whole_number
from lightning_plugins.ema.power_exponent import check_sigma_rel, exponent

_LONGEST_GAP = 1_000_000
"""Most steps that a state may say were not averaged yet: an update takes the product of their decays."""


class DecayRule(ABC):
    """The decay of an update, as a function of the step; every rule is a frozen dataclass below this class.

    To write a rule of your own, subclass this class as a frozen dataclass and define ``_single(n)``, the decay of step
    n alone, in [0, 1]; an update over several steps takes the product. Where you know that in closed form, override
    ``_over(n, steps)``. A function of n needs no class: ``EMA(function)``.

    Example:
        >>> rule = ConstantDecay(0.9)
        >>> rule(1), round(rule(4, steps=2), 2)
        (0.9, 0.81)
        >>> @dataclass(frozen=True)
        ... class Sum(DecayRule):
        ...     # the mean of all weights so far, the untrained ones among them
        ...     def _single(self, n: int) -> float:
        ...         return n / (n + 1)
        >>> Sum()(1), Sum()(3, steps=2)
        (0.5, 0.5)
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Let a rule that defines ``_single`` alone be asked for it, although its parent knows a closed form."""
        super().__init_subclass__(**options)
        if "_single" in vars(cls) and "_over" not in vars(cls):
            cls._over = DecayRule._over  # type: ignore[method-assign]

    def __call__(self, n: int, steps: int = 1) -> float:
        """Return the decay of the update that ends with applied step ``n`` and covers ``steps`` of them.

        Args:
            n: Applied optimizer steps since the average began, the first being 1.
            steps: How many of them the update covers: 1 to ``n``.

        Returns:
            The share of the old average that is kept, in [0, 1].

        Raises:
            ValueError: If ``n`` is below 1, ``steps`` outside 1 to ``n``, or a decay of your own outside [0, 1].
        """
        n = whole_number("n", n, at_least=1, unit="steps")
        steps = whole_number("steps", steps, at_least=1, unit="steps")
        if steps > n:
            raise ValueError(f"`steps` must be at most `n`, got {steps} of {n} steps.")
        return self.checked(self._over(n, steps), n)

    def for_samples_per_step(self, samples: float) -> DecayRule:
        """Return the rule for a run whose every step sees ``samples`` samples; only :class:`HalfLife` cares."""
        return self

    @property
    def needs_samples_per_step(self) -> bool:
        """Whether the rule counts samples, so that :meth:`for_samples_per_step` has to be called first."""
        return False

    @property
    def is_open(self) -> bool:
        """Whether a length waits for the run's: then call :meth:`resolve` first."""
        return False

    def resolve(self, total_steps: int | None, steps_per_epoch: float | None = None) -> DecayRule:
        """Return the rule for a run of known length, every duration counted in steps.

        Args:
            total_steps: Optimizer steps of the run, at least 0; ``None`` when unknown.
            steps_per_epoch: Optimizer steps of an epoch, above 0; needed by durations such as ``"2ep"``.

        Raises:
            ValueError: If a length that depends on the run's cannot be known
                (:class:`~lightning_plugins.core.durations.RunLengthUnknownError`).
        """
        return self.resolve_for(Horizon.of(total_steps, steps_per_epoch)) if self.is_open else self

    def resolve_for(self, horizon: Horizon) -> DecayRule:
        """Return the rule for a run whose epochs may differ; see :meth:`resolve`."""
        return self

    def _over(self, n: int, steps: int) -> float:
        """Return the decay of the ``steps`` steps up to ``n``; both are checked."""
        if steps == 1:
            return self.checked(self._single(n), n)
        return math.prod(self.checked(self._single(step), step) for step in range(n - steps + 1, n + 1))

    @abstractmethod
    def _single(self, n: int) -> float:
        """Return the decay of step ``n`` alone."""

    def checked(self, decay: Any, n: int) -> float:
        """Return ``decay`` of step ``n``, or raise when it is not a number in [0, 1].

        Raises:
            TypeError: If it is no number.
            ValueError: If it is outside [0, 1].
        """
        if type(decay) is float and 0 <= decay <= 1:
            return decay
        try:
            return float(_share("decay", decay))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{str(error).removesuffix('.')} at step {n} from {shown(self)}.") from error


class _ClosedForm(DecayRule):
    """A rule whose decay over several steps has a closed form."""

    def _single(self, n: int) -> float:
        return self._over(n, 1)

    @abstractmethod
    def _over(self, n: int, steps: int) -> float:
        """Return the decay of the ``steps`` steps up to ``n``; both are checked."""


@dataclass(frozen=True)
class ConstantDecay(_ClosedForm):
    """The same decay at every step: d.

    Over k steps d^k. The average starts at the untrained weights and forgets them only after several times 1 / (1 - d)
    steps; :class:`WarmupDecay` and :class:`DebiasedDecay` do not have this fault.

    Args:
        value: d, in [0, 1]; 1 never moves, 0 copies.
    """

    value: float

    def __post_init__(self) -> None:
        _keep(self, value=_share("value", self.value))

    def _over(self, n: int, steps: int) -> float:
        return float(self.value**steps)


@dataclass(frozen=True)
class WarmupDecay(DecayRule):
    """min(d, (1 + n) / (10 + n)): TensorFlow's rule, and what a plain number means.

    The average spans about a ninth of the steps so far until it reaches its full length, near n = 9 / (1 - d).

    Args:
        value: d, the decay that is reached, in [0, 1].

    Example:
        >>> [round(WarmupDecay(0.3)(n), 3) for n in (1, 2, 3, 4)]
        [0.182, 0.25, 0.3, 0.3]

    References:
        ``tf.train.ExponentialMovingAverage(num_updates=...)``; OpenNMT's ``MovingAverage``. There the first update
        copies the weights; here the average begins as the weights before the first step.
    """

    value: float

    def __post_init__(self) -> None:
        _keep(self, value=_share("value", self.value))

    def _single(self, n: int) -> float:
        return float(min(self.value, (1 + n) / (10 + n)))


@dataclass(frozen=True)
class InverseGammaDecay(DecayRule):
    """clip(1 - (1 + (n - 1) / inv_gamma)^(-power), min_value, max_value), and 0 at n = 1.

    With ``power=1`` it is the plain mean of all weights so far.

    Args:
        max_value: Largest decay, in [0, 1].
        inv_gamma: Stretches the warm-up; above 0.
        power: Its exponent, above 0; 2/3 for a million steps or more, 3/4 for fewer (Katherine Crowson's advice).
        min_value: Smallest decay after the first step, in [0, max_value].

    References:
        K. Crowson's k-diffusion; timm's ``ModelEmaV3``, diffusers' ``EMAModel``.
    """

    max_value: float = 0.9999
    inv_gamma: float = 1.0
    power: float = 2 / 3
    min_value: float = 0.0

    def __post_init__(self) -> None:
        _keep(self, max_value=_share("max_value", self.max_value))
        _keep(self, inv_gamma=real_number("inv_gamma", self.inv_gamma, above=0))
        _keep(self, power=real_number("power", self.power, above=0))
        _keep(self, min_value=real_number("min_value", self.min_value, at_least=0, at_most=self.max_value))

    def _single(self, n: int) -> float:
        if n == 1:
            return 0.0
        decay = 1 - (1 + (n - 1) / self.inv_gamma) ** -self.power
        return float(min(max(decay, self.min_value), self.max_value))


@dataclass(frozen=True)
class PowerDecay(_ClosedForm):
    """(1 - 1/n)^(gamma + 1): an average whose length is a fixed share of the training so far.

    The weight of step t in the average at step n is proportional to t^gamma. Over k steps (1 - k/n)^(gamma + 1).

    Args:
        sigma_rel: Relative standard deviation of the weighting, above 0 and below 0.2886 (a plain mean of all
            steps); 0.05 to 0.10 are usual.

    References:
        T. Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2023, arXiv:2312.02696.
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        _keep(self, sigma_rel=check_sigma_rel("sigma_rel", self.sigma_rel))

    def _over(self, n: int, steps: int) -> float:
        return float((1 - steps / n) ** (exponent(self.sigma_rel) + 1))


@dataclass(frozen=True)
class DebiasedDecay(_ClosedForm):
    """d (1 - d^(n-1)) / (1 - d^n): the average of a constant decay that knows nothing of the untrained weights.

    The same as an average that starts at zero and is divided by 1 - d^n. The first step copies; over k steps the
    decay is d^k (1 - d^(n-k)) / (1 - d^n).

    Args:
        value: d, in [0, 1); 1 would be the plain mean, which ``InverseGammaDecay(1.0, power=1)`` is.

    References:
        D. Kingma and J. Ba, "Adam", 2014, arXiv:1412.6980, section 3; ``optax.ema(debias=True)``.
    """

    value: float

    def __post_init__(self) -> None:
        _keep(self, value=real_number("value", self.value, at_least=0, below=1))

    def _over(self, n: int, steps: int) -> float:
        if self.value == 0:
            return 0.0
        # expm1: near d = 1 the plain difference would lose its digits
        log = math.log(self.value)
        return float(self.value**steps * math.expm1((n - steps) * log) / math.expm1(n * log))


def interval(name: str, value: Any) -> Duration:
    """Return ``value``, or raise when it is not a duration that can lie between two updates.

    Raises:
        TypeError: If it is of another type.
        ValueError: If it is below 1 step, or a share or a text that cannot be read.
    """
    duration = check_duration(name, value)
    return whole_number(name, duration, at_least=1, unit="steps") if isinstance(duration, int) else duration


class UpdateCounter:
    """Counts the steps of an average and says when an update is due, all in applied optimizer steps.

    Args:
        start_step: Applied steps after which the average begins, as a copy of the weights; a duration.
        every: Steps between two updates; a duration, of which 0 steps count as 1.
        name_of_every: What that is called in messages.

    Attributes:
        start_step: The same in steps; see :meth:`resolve_for`.
        every: The same in steps.
        applied: Applied steps of the run, as of the last look.
        earlier: Of these, how many were taken in the fits of other Trainers, which count anew.
        origin: Of these, how many had been taken when the average began; ``None`` before.
        last: Steps from there to the last update; 0 means that the average is still the copy it began as.

    Example:
        >>> counter = UpdateCounter(start_step=2, every=2)
        >>> [counter.begins(applied) for applied in (0, 1, 2)]
        [False, False, True]
        >>> counter.due(3), counter.due(4)
        (None, (2, 2))
        >>> counter.last = 2; counter.due(5), counter.due(6)
        (None, (4, 2))
    """

    def __init__(
        self, start_step: Duration = 0, every: Duration = 1, *, name_of_every: str = "update_every_n_steps"
    ) -> None:
        self._given = {"start_step": start_step, name_of_every: every}
        # one that waits for the length of the run begins later
        self.start_step = start_step if isinstance(start_step, int) else sys.maxsize
        self.every = every if isinstance(every, int) else 1
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self.applied = 0
        self.earlier = 0
        self.origin: int | None = None
        self.last = 0

    @property
    def is_open(self) -> bool:
        """Whether a length waits for the run's: then :meth:`resolve_for` has to be called first."""
        return any(map(is_open, self._given.values()))

    def resolve_for(self, horizon: Horizon) -> None:
        """Count both lengths in steps.

        Raises:
            RunLengthUnknownError: If that needs a length which is not known.
        """
        self.start_step, every = (horizon.steps(name, duration) for name, duration in self._given.items())
        self.every = max(every, 1)

    def begins(self, applied: int) -> bool:
        """Return whether the average begins now, and remember it."""
        self.applied = applied
        if self.origin is not None or applied < self.start_step:
            return False
        self.origin = applied
        return True

    def due(self, applied: int) -> tuple[int, int] | None:
        """Return the number of the step that an update is due for and how many it covers, ``None`` when none is."""
        self.applied = applied
        if self.origin is None:
            return None
        n = applied - self.origin
        return (n, n - self.last) if n // self.every > self.last // self.every else None

    def state(self) -> dict[str, int]:
        """Return the counters as plain numbers, -1 for an average that has not begun; nothing before the first step."""
        if not self.applied and self.origin is None:
            return {}
        origin = -1 if self.origin is None else self.origin
        earlier = {"earlier_steps": self.earlier} if self.earlier else {}
        return {"applied_steps": self.applied, "origin": origin, "last_update": self.last, **earlier}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the counters over.

        Raises:
            TypeError: If one is not a whole number.
            ValueError: If one is missing or they cannot be those of a run.
        """
        missing = [name for name in ("applied_steps", "origin", "last_update") if name not in state]
        if missing:
            raise ValueError(f"The state of an average must have `{missing[0]}`, which is missing in the checkpoint.")
        applied = whole_number("applied_steps", state["applied_steps"], unit="steps")
        origin = whole_number("origin", state["origin"], at_least=-1, unit="steps")
        last = whole_number("last_update", state["last_update"], unit="steps")
        since = 0 if origin < 0 else applied - origin
        if since < last or since - last > max(_LONGEST_GAP, self.every):
            raise ValueError(
                f"`last_update` must be at most the steps since the average began, and at most {_LONGEST_GAP} fewer, "
                f"got {last} with {since} steps: the checkpoint's state was damaged."
            )
        earlier = whole_number("earlier_steps", state.get("earlier_steps", 0), at_most=applied, unit="steps")
        self.applied, self.earlier = applied, earlier
        self.origin, self.last = None if origin < 0 else origin, last


def _share(name: str, value: float) -> float:
    return real_number(name, value, at_least=0, at_most=1)


def _keep(rule: DecayRule, **checked: float) -> None:
    """Set fields of a frozen rule to what was checked: plain numbers, so that rules compare, hash and pickle."""
    rule.__dict__.update(checked)
