"""Reduction on a plateau: a factor that shrinks when a metric stops improving."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lightning_plugins.core.validation import a_list, one_of, real_number, shown, whole_number
from lightning_plugins.schedules.fields import keep


class PlateauState(NamedTuple):
    """Where a :class:`Plateau` stands; plain numbers.

    Args:
        factor: What the schedule is multiplied by, 1 at first.
        best: Best metric so far, ``None`` before the first.
        bad: Checks since the best that did not improve on it.
        cooldown: Checks left during which nothing counts as bad.
    """

    factor: float = 1.0
    best: float | None = None
    bad: int = 0
    cooldown: int = 0

    @classmethod
    def from_state(cls, state: Any) -> PlateauState:
        """Return the state that a checkpoint holds as a list, checked like arguments.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If there are not four, or one is out of range.
        """
        values = a_list("plateau", state)
        if len(values) != len(cls._fields):
            raise ValueError(f"`plateau` must have {len(cls._fields)} values, got {shown(state)}.")
        factor, best, bad, cooldown = values
        if best is not None and not (isinstance(best, float) and math.isinf(best)):
            best = real_number("best", best)
        return cls(
            real_number("factor", factor, at_least=0, at_most=1),
            best,
            whole_number("bad", bad, unit="checks"),
            whole_number("cooldown", cooldown, unit="checks"),
        )


@dataclass(frozen=True)
class Plateau:
    """Multiply a schedule by ``factor`` each time that a metric has not improved for more than ``patience`` checks.

    A check is one time that the metric is logged: every validation, or every training epoch. A check at which the
    metric is missing changes nothing; NaN counts as no improvement.

    Args:
        monitor: Name of the metric, as in ``trainer.callback_metrics``.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.
        factor: Multiplier at each reduction, in (0, 1).
        patience: Checks without improvement that are tolerated, at least 0.
        threshold: Relative change that counts as an improvement, at least 0.
        cooldown: Checks after a reduction during which none counts as bad, at least 0.
        min_factor: The product of all reductions does not fall below this, in [0, 1].

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> plateau, state = Plateau("val_loss", patience=1, factor=0.5), PlateauState()
        >>> for loss in [1.0, 0.9, 0.9, 0.9]:
        ...     state = plateau.update(state, loss)
        >>> state.factor
        0.5

    References:
        torch's ``ReduceLROnPlateau`` (``threshold_mode="rel"``), which cannot be combined with a warm-up, and which
        Lightning lets crash when the metric is missing.
    """

    monitor: str
    mode: Literal["min", "max"] = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    cooldown: int = 0
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not isinstance(self.monitor, str) or not self.monitor:
            raise TypeError(f"`monitor` must be the name of a metric, got {shown(self.monitor)}.")
        checked = {
            "mode": one_of("mode", self.mode, ("min", "max")),
            "factor": real_number("factor", self.factor, above=0, below=1),
            "patience": whole_number("patience", self.patience, unit="checks"),
            "threshold": real_number("threshold", self.threshold, at_least=0),
            "cooldown": whole_number("cooldown", self.cooldown, unit="checks"),
            "min_factor": real_number("min_factor", self.min_factor, at_least=0, at_most=1),
        }
        keep(self, checked)

    def update(self, state: PlateauState, metric: float) -> PlateauState:
        """Return the state after one more check."""
        best, bad, cooldown = state.best, state.bad + 1, state.cooldown
        if self._improves(metric, best):
            best, bad = metric, 0
        if cooldown > 0:
            bad, cooldown = 0, cooldown - 1
        if bad <= self.patience:
            return PlateauState(state.factor, best, bad, cooldown)
        reduced = min(state.factor, max(state.factor * self.factor, self.min_factor))
        return PlateauState(reduced, best, 0, self.cooldown)

    def _improves(self, metric: float, best: float | None) -> bool:
        if best is None:
            return not math.isnan(metric)
        if self.mode == "min":
            return metric < best * (1 - self.threshold)
        return metric > best * (1 + self.threshold)


class PlateauWatch:
    """Shows a plateau the metric each time that it is logged, and knows whether it has come at all.

    Args:
        plateau: Whose metric is watched.

    Attributes:
        state: Where the plateau stands.
    """

    def __init__(self, plateau: Plateau) -> None:
        self.plateau = plateau
        self.state = PlateauState()
        self._logged: Any = None  # the metric as last seen: a new one is another object
        self._by_validation = False  # whether it is validation that logs it
        self._came = self._epoch_ended = self._validation_ended = self._late = False

    def begin(self) -> None:
        """Begin a fit; a metric that came before a resume has come."""
        self._logged, self._by_validation = None, False
        self._came, self._epoch_ended, self._validation_ended = self.state.best is not None, False, False
        self._late = False

    def look(self, metrics: Mapping[str, Any]) -> float | None:
        """Return the metric if it was logged since the last look, else ``None``."""
        before, self._logged = self._logged, metrics.get(self.plateau.monitor)
        return None if self._logged is None or self._logged is before else float(self._logged)

    def after_validation(self, metrics: Mapping[str, Any]) -> float | None:
        """Return the metric if the validation that has ended logged it."""
        value = self.look(metrics)
        self._validation_ended = True
        self._by_validation |= value is not None
        return value

    def after_epoch(self, metrics: Mapping[str, Any]) -> float | None:
        """Return the metric if the training epoch that has ended logged it."""
        value = self.look(metrics)
        self._epoch_ended = True
        self._late = value is None
        return None if self._by_validation else value

    def before_epoch(self, metrics: Mapping[str, Any]) -> float | None:
        """Return the metric if the module logged it when the last epoch had ended for callbacks."""
        late, self._late = self._late, False
        return self.look(metrics) if late and not self._by_validation else None

    def show(self, value: float) -> bool:
        """Show a value to the plateau; return whether the factor fell."""
        self._came = True
        before, self.state = self.state, self.plateau.update(self.state, value)
        return self.state.factor != before.factor

    def missing(self, metrics: Mapping[str, Any], *, validates: bool) -> str:
        """Say what is wrong if an epoch, and a validation where the run has them, ended without the metric ever coming.

        Asked when the epoch is over: a module may log until the very end of it.
        """
        over = self._epoch_ended and (self._validation_ended or not validates)
        if not over or self._came or self.plateau.monitor in metrics:
            return ""
        return (
            f"`plateau` must monitor a metric that is logged, got {shown(self.plateau.monitor)}, which did not come in "
            f"an epoch and its validation. There are: {', '.join(sorted(metrics)) or 'none'}. Correct the name, or log "
            "it with `self.log`."
        )
