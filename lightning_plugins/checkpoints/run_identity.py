"""Tells the checkpoints of one run from those of others that lie in the same directory.

Checkpoint averaging writes into every file which fits have led to it, a *lineage*: for each fit a name that no other
has and the step up to which the run followed it. A run that was killed at step 90 and resumed from step 50 goes on in a
new fit; what the first fit wrote after step 50 is no part of it any more.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lightning_plugins.core import checkpoint_keys
from lightning_plugins.core.validation import check_state_version, plain_text, shown

_MOST_FITS = 10_000
_LONGEST_NAME = 80


@dataclass(frozen=True)
class Lineage:
    """The fits that have led to a file, or to where a run stands.

    Args:
        fits: For each fit its name and the step up to which it counts, the oldest first. Names sort by time.

    Example:
        >>> first = Lineage((("a", 50),))
        >>> resumed = Lineage((("a", 50), ("b", 70)))
        >>> first in resumed, Lineage((("a", 90),)) in resumed, resumed in first
        (True, False, False)
    """

    fits: tuple[tuple[str, int], ...] = ()

    def __contains__(self, other: Lineage) -> bool:
        """Return whether a file of the lineage ``other`` is one of this run's."""
        if not other.fits:
            return False
        name, step = other.fits[-1]
        return any(name == fit and step <= last for fit, last in self.fits)

    @property
    def began(self) -> str:
        """When its latest fit began, as text that sorts by time; empty without any."""
        return self.fits[-1][0] if self.fits else ""

    def new_fit(self, name: str, step: int) -> Lineage:
        """Return the lineage of a fit called ``name`` that goes on from ``step``; at step 0 a run begins."""
        before = [(fit, min(last, step)) for fit, last in self.at(step).fits] if step else []
        return Lineage((*before, (name, step)))

    def at(self, step: int) -> Lineage:
        """Return the lineage when the latest fit has reached ``step``."""
        return Lineage((*self.fits[:-1], (self.fits[-1][0], step))) if self.fits else self

    def plain(self) -> dict[str, Any]:
        """Return it as plain values, for a checkpoint."""
        return {"version": 1, "fits": [list(fit) for fit in self.fits]}


def new_fit_name() -> str:
    """Return a name for a fit: when it begins, to the microsecond, and something that no other has."""
    moment = time.time_ns() // 1000
    return f"{moment:020d}-{secrets.token_hex(4)}"


def lineage_of(checkpoint: Mapping[str, Any]) -> Lineage:
    """Return the lineage in a loaded checkpoint; an empty one if there is none that can be understood."""
    try:
        return checked_lineage(checkpoint.get(checkpoint_keys.RUN))
    except (TypeError, ValueError):
        return Lineage()


def checked_lineage(plain: Any) -> Lineage:
    """Return what :meth:`Lineage.plain` returned.

    Raises:
        TypeError: If it is nothing of the kind.
        ValueError: If a name or a number is not possible, or the version is a later one.
    """
    if isinstance(plain, Mapping):
        plain = check_state_version("the run", plain, 1)
    fits = plain.get("fits") if isinstance(plain, Mapping) else None
    if not isinstance(fits, (list, tuple)) or len(fits) > _MOST_FITS:
        raise TypeError(f"`{checkpoint_keys.RUN}` must hold a list of fits, got {shown(plain)}.")
    return Lineage(tuple(_checked_fit(fit) for fit in fits))


def _checked_fit(fit: Any) -> tuple[str, int]:
    if not isinstance(fit, (list, tuple)) or len(fit) != 2:
        raise TypeError(f"`fits` must hold names and steps, got {shown(fit)}.")
    name, step = fit
    if not plain_text("fits", name, longest=_LONGEST_NAME):
        raise ValueError("`fits` must hold names of fits, got an empty one.")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"`fits` must hold steps of at least 0, got {shown(step)}.")
    return name, step


Item = TypeVar("Item")


def newest_run(items: Sequence[Item], told: Mapping[Item, tuple[Lineage, int, int | None]]) -> list[Item]:
    """Return those of ``items`` that belong to the newest run.

    Runs with a lineage are told apart by it, and the one whose latest fit began last is the newest. Without one, an
    epoch that falls while the step rises is another run, and the run with the highest step is the newest.

    Args:
        items: Checkpoints.
        told: What each says: its lineage, step and epoch (``None`` if it does not say).

    Example:
        >>> steps = {"a": (10, 0), "b": (20, 1), "c": (30, 0), "d": (60, 1)}
        >>> newest_run("abcd", {name: (Lineage(), *numbers) for name, numbers in steps.items()})
        ['c', 'd']
    """
    named = [item for item in items if told[item][0].fits]
    newest = max(named, key=lambda item: (told[item][0].began, told[item][1]), default=None)
    runs = [] if newest is None else [[item for item in named if told[item][0] in told[newest][0]]]
    runs += _runs_without_names([item for item in items if not told[item][0].fits], told)
    # of equal ones the first, which is the one that has a name
    return max(runs, key=lambda run: max(told[item][1] for item in run), default=[])


def _runs_without_names(
    items: Iterable[Item], told: Mapping[Item, tuple[Lineage, int, int | None]]
) -> list[list[Item]]:
    ordered = sorted(items, key=lambda item: (told[item][1], told[item][2] or 0))
    runs = _shared_out(ordered, told, [])
    # now that it is known how many there are, files go where epochs are about as long: the first ones fitted everywhere
    runs = _shared_out(ordered, told, [_pace(*told[run[-1]][1:]) for run in runs])
    return [run for run in runs if run]


def _shared_out(
    ordered: Iterable[Item], told: Mapping[Item, tuple[Lineage, int, int | None]], paces: list[float]
) -> list[list[Item]]:
    """Return runs, each of files that can follow each other; a file goes where the pace is nearest to its own."""
    runs: list[list[Item]] = [[] for _ in paces]
    paces = list(paces)
    for item in ordered:
        _, step, epoch = told[item]
        pace = _pace(step, epoch)
        fitting = [index for index, run in enumerate(runs) if not run or _follows(step, epoch, told[run[-1]])]
        if fitting:
            runs[min(fitting, key=lambda index: abs(paces[index] - pace))].append(item)
        else:
            runs.append([item])
            paces.append(pace)
    return runs


def _pace(step: int, epoch: int | None) -> float:
    """Return the logarithm of how many steps an epoch has, as far as one file can tell."""
    return math.log((step + 1) / ((epoch or 0) + 1))


def _follows(step: int, epoch: int | None, last: tuple[Lineage, int, int | None]) -> bool:
    """Return whether a file can be of the run whose last file so far is ``last``."""
    _, last_step, last_epoch = last
    if epoch is None or last_epoch is None:
        return True
    return epoch >= last_epoch if step > last_step else epoch == last_epoch
