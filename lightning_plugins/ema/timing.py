"""When an average begins and when it is updated, in applied optimizer steps."""

from __future__ import annotations

from typing import Any

_VERSION = 1


class Pace:
    """Counts the steps of an average.

    Args:
        start_step: Applied steps after which the average begins, as a copy of the weights.
        every: Steps between two updates.

    Attributes:
        applied: Applied steps of the run, as of the last look.
        origin: Of these, how many had been taken when the average began; ``None`` before.
        last: Steps from there to the last update; 0 means that the average is still the copy it began as.

    Example:
        >>> pace = Pace(start_step=2, every=2)
        >>> [pace.begins(applied) for applied in (0, 1, 2)]
        [False, False, True]
        >>> pace.due(3), pace.due(4)
        (None, (2, 2))
        >>> pace.updated(2); pace.due(5), pace.due(6)
        (None, (4, 2))
    """

    def __init__(self, start_step: int = 0, every: int = 1) -> None:
        self.start_step = start_step
        self.every = every
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self.applied = 0
        self.origin: int | None = None
        self.last = 0

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

    def updated(self, n: int) -> None:
        """Note that the update for step ``n`` was done."""
        self.last = n

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as plain numbers; -1 for an average that has not begun."""
        origin = -1 if self.origin is None else self.origin
        return {"version": _VERSION, "applied_steps": self.applied, "origin": origin, "last_update": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the counters over.

        Raises:
            ValueError: If another version of this class wrote them.
        """
        if state.get("version", _VERSION) != _VERSION:
            raise ValueError(f"The state of an average must be of version {_VERSION}, got {state.get('version')!r}.")
        self.applied, self.last = int(state["applied_steps"]), int(state["last_update"])
        self.origin = None if state["origin"] < 0 else int(state["origin"])
