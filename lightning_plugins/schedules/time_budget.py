"""Time as the clock of a schedule: positions are the milliseconds of a run that are over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning_plugins.core.durations import Duration, Horizon, ScheduleTooLongError
from lightning_plugins.core.validation import shown
from lightning_plugins.schedules.fields import field_items
from lightning_plugins.schedules.schedule import Schedule

_PER_SECOND = 1000
# batches between two readings that ranks share, at most
_LONGEST_STRETCH = 128


def seconds() -> float:
    """Return the reading of a clock that never goes back, whatever is done to the system's time."""
    return time.monotonic()


class TimeBudget:
    """Where a run stands in its time, in milliseconds: the same on every rank, and never back.

    Ranks that read their own clocks would train with different rates. Rank zero's reading is therefore shared, after 1,
    2, 4, ... batches, at most 128, and once a second where that is more often; in between every rank adds the
    time that a batch took on average between the last two readings. Without ``share`` the clock is read for each batch.

    Args:
        elapsed: Seconds that are over when the run begins or goes on.
        remaining: Seconds that are left.
        share: Returns rank zero's value on every rank; ``None``: there is one rank.

    Attributes:
        total: Milliseconds of the whole run.
    """

    def __init__(self, elapsed: float, remaining: float, share: Callable[[Any], Any] | None = None) -> None:
        self._share = share
        self._before: float
        self._before, remaining = (elapsed, remaining) if share is None else share((elapsed, remaining))
        self.total = max(round((self._before + remaining) * _PER_SECOND), 0)
        self._begin = seconds()
        # the last shared reading, the batches since, and those until the next, which tells the seconds of one
        self._known, self._batches, self._stretch = self._before, 0, 1
        self._pace: float
        self._position = round(self._before * _PER_SECOND)

    @property
    def elapsed(self) -> float:
        """Seconds that are over, as this rank measures them."""
        return self._before + seconds() - self._begin

    @property
    def left(self) -> float:
        """Seconds that are left, as this rank measures them; negative when more than all are over."""
        return self.total / _PER_SECOND - self.elapsed

    @property
    def position(self) -> int:
        """Milliseconds that were over when :meth:`after_batch` or :meth:`after_pause` was called."""
        return self._position

    def after_batch(self) -> int:
        """Return the position; called on every rank when a batch is over."""
        if self._share is None:
            return self._move(self.elapsed)
        self._batches += 1
        if self._batches < self._stretch:
            return self._move(self._known + self._batches * self._pace)
        now = self._share(self.elapsed)
        self._pace = (now - self._known) / self._batches
        per_second = int(1 / self._pace) if self._pace > 0 else _LONGEST_STRETCH
        self._known, self._batches = now, 0
        self._stretch = max(min(2 * self._stretch, _LONGEST_STRETCH, per_second), 1)
        return self._move(now)

    def after_pause(self) -> int:
        """Return the position; called on every rank after something else than batches, such as a validation."""
        self._known = self.elapsed if self._share is None else self._share(self.elapsed)
        self._batches, self._stretch = 0, 1
        return self._move(self._known)

    def _move(self, elapsed: float) -> int:
        self._position = max(self._position, round(elapsed * _PER_SECOND))
        return self._position


def resolve_in_time(schedule: Schedule, total: int) -> Schedule:
    """Return ``schedule`` with its shares in milliseconds, of which the run has ``total``.

    Raises:
        ValueError: If a length is in steps or epochs, or a part depends on the number of steps: what time they take is
            known only afterwards. Also if the shares are more than the whole.
    """
    for part in _parts(schedule):
        if part._counts_steps():
            raise ValueError(
                f"`schedule` must not depend on the number of steps with `clock='time'`, got {shown(part)}; take one "
                "that has an end, such as WarmupCosine('5%')."
            )
    try:
        return schedule.resolve_for(_TimeHorizon(total, None, total))
    except ScheduleTooLongError as error:
        raise ScheduleTooLongError(f"{error} Here a step is a millisecond.") from error


def _parts(schedule: Schedule) -> Iterator[Schedule]:
    """Yield a schedule and all that it is made of."""
    yield schedule
    for _, value, _ in field_items(schedule):
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Schedule):
                yield from _parts(item)


@dataclass(frozen=True)
class _TimeHorizon(Horizon):
    """A run of so many milliseconds."""

    def steps(self, name: str, duration: Duration) -> int:
        """Return a duration in milliseconds; 0 is 0 in every unit."""
        if duration and (isinstance(duration, int) or str(duration).strip().endswith("ep")):
            what = f"{duration} steps" if isinstance(duration, int) else shown(duration)
            raise ValueError(
                f"`{name}` must be a share of the time with `clock='time'`, such as 0.05 or '5%', got {what}: how long "
                "they take is known only afterwards."
            )
        return super().steps(name, duration)
