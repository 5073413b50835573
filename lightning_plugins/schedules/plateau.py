"""Reduction on a plateau: a factor that shrinks when a metric stops improving."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from lightning_plugins.core.validation import one_of, real_number, shown, whole_number


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
    mode: str = "min"
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
        self.__dict__.update(checked)  # plain numbers, past the frozen dataclass's __setattr__

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
