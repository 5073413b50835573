"""Argument checks. Every message names the argument, the rule, the value and, where not obvious, the remedy."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any


class LightningPluginsWarning(UserWarning):
    """A run that is legal but probably not what was meant; filter it by this class."""


def whole_number(name: str, value: Any, *, at_least: int = 0, unit: str = "") -> int:
    """Return ``value`` as an ``int``, or raise when it is not a whole number of at least ``at_least``.

    Args:
        name: The argument's name, for the message.
        value: What the user gave: an ``int`` or anything with ``__index__`` (NumPy's integers), not a ``bool``.
        at_least: Smallest legal value.
        unit: What is counted (``"steps"``), for the message.

    Raises:
        TypeError: If ``value`` is not a whole number.
        ValueError: If it is below ``at_least``.

    Example:
        >>> whole_number("warmup", -3, unit="steps")
        Traceback (most recent call last):
        ...
        ValueError: `warmup` must be at least 0 steps, got -3.
    """
    what = f" of {unit}" if unit else ""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be a whole number{what}, got {value!r}.")
    number = operator.index(value)
    if number < at_least:
        raise ValueError(f"`{name}` must be at least {at_least}{' ' + unit if unit else ''}, got {number}.")
    return number


def real_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> float:
    """Return ``value``, or raise when it is not a finite number inside the given limits.

    Args:
        name: The argument's name, for the message.
        value: What the user gave; integers are fine, ``bool`` is not.
        above: Exclusive lower limit.
        at_least: Inclusive lower limit.
        at_most: Inclusive upper limit.
        below: Exclusive upper limit.

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If it is not finite or outside the limits.

    Example:
        >>> real_number("decay", 1.5, at_least=0, at_most=1)
        Traceback (most recent call last):
        ...
        ValueError: `decay` must be at least 0 and at most 1, got 1.5.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value!r}.")
    limits = [
        (above, value > above, "above"),
        (at_least, value >= at_least, "at least"),
        (at_most, value <= at_most, "at most"),
        (below, value < below, "below"),
    ]
    if not all(kept for _, kept, _ in limits):
        rule = " and ".join(f"{word} {limit:g}" for limit, _, word in limits if math.isfinite(limit))
        raise ValueError(f"`{name}` must be {rule}, got {value!r}.")
    return value if isinstance(value, (int, float)) else float(value)


def true_or_false(name: str, value: Any) -> bool:
    """Return ``value``, or raise when it is not a ``bool``: a typing error such as ``"no"`` would count as true.

    Raises:
        TypeError: If ``value`` is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return value


def one_of(name: str, value: Any, choices: Collection[str]) -> str:
    """Return ``value``, or raise when it is not one of ``choices``.

    Raises:
        ValueError: If ``value`` is none of them.

    Example:
        >>> one_of("mode", "up", ("min", "max"))
        Traceback (most recent call last):
        ...
        ValueError: `mode` must be one of 'min', 'max', got 'up'.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return value
