"""How much time a Trainer's run may still take: what its ``Timer`` says, which ``max_time`` makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TimeLimit:
    """Where a run stands in the time that it may take.

    Args:
        elapsed: Seconds of training that are over, in earlier parts of the run too.
        remaining: Seconds that are left.
    """

    elapsed: float
    remaining: float


def time_limit(trainer: Any) -> TimeLimit | None:
    """Return the limit that ends a Trainer's run first, or ``None`` when no time does.

    A Timer, of either namespace or of your own, is recognized by what it has.

    Args:
        trainer: The Trainer, in ``on_fit_start``: states are loaded by then, and no Timer has begun this fit.
    """
    limits = []
    for callback in trainer.callbacks:
        if hasattr(callback, "time_remaining") and hasattr(callback, "time_elapsed"):
            remaining = callback.time_remaining()
            limits += [] if remaining is None else [TimeLimit(callback.time_elapsed(), remaining)]
    return min(limits, key=lambda limit: limit.remaining, default=None)
