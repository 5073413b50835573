"""Curves that a segment may follow: functions on [0, 1], by name, as a callable or by import path."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from lightning_plugins.core.imports import by_import_path
from lightning_plugins.core.validation import did_you_mean, shown

Curve: TypeAlias = Callable[[float], float]
if TYPE_CHECKING:
    Progress: TypeAlias = staticmethod[[float], float]  # a curve kept as an attribute
else:
    Progress = staticmethod  # which Python 3.10 and 3.11 cannot subscript


def linear(x: float) -> float:
    """X itself: equal steps."""
    return x


def cosine(x: float) -> float:
    """(1 - cos(pi x)) / 2, as sin^2(pi x / 2): exactly 0 and 1 at the ends."""
    return math.sin(math.pi / 2 * x) ** 2


def one_minus_sqrt(x: float) -> float:
    """sqrt(x): a decay along it follows 1 - sqrt(x)."""
    return math.sqrt(x)


NAMED_CURVES: dict[str, Curve] = {"linear": linear, "cosine": cosine, "1-sqrt": one_minus_sqrt}


def progress_along(name: str, curve: Curve | str, *, flat: bool = False) -> Curve:
    """Return the progress from start to end, 0 at x = 0 and 1 at x = 1, along ``curve``.

    Args:
        name: The argument's name, for messages.
        curve: One of the names in ``NAMED_CURVES``, a callable on [0, 1], or its import path. A callable c is rescaled
            to (c(x) - c(0)) / (c(1) - c(0)).
        flat: Whether start and end are equal; then a curve with c(0) = c(1) is legal.

    Raises:
        TypeError: If ``curve`` is neither a text nor callable.
        ValueError: If it cannot be imported or has equal or non-finite ends.
    """
    if isinstance(curve, str) and curve in NAMED_CURVES:
        return NAMED_CURVES[curve]
    function = _load(name, curve)
    try:
        first, last = float(function(0.0)), float(function(1.0))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"`{name}` must take every number from 0 to 1 and return one, got {shown(curve)}: {error}."
        ) from error
    if not (math.isfinite(first) and math.isfinite(last)):
        raise ValueError(f"`{name}` must be finite at 0 and 1, got {first} and {last} from {curve!r}.")
    if first == last:
        if flat:
            return linear
        raise ValueError(
            f"`{name}` must have different values at 0 and 1 to lead from start to end, got {first} at both "
            f"from {curve!r}."
        )
    return partial(_rescaled, function, first, last - first)


def import_path(name: str, curve: Curve | str) -> str:
    """Return the text that stands for ``curve`` in a configuration.

    Raises:
        ValueError: If ``curve`` has no import path, as a lambda.
    """
    if isinstance(curve, str):
        return curve
    path = f"{getattr(curve, '__module__', None)}.{getattr(curve, '__qualname__', '<unnamed>')}"
    if "<" in path:
        raise ValueError(f"`{name}` has no import path, got {shown(curve)}; define it as a function of a module.")
    return path


def _rescaled(function: Curve, first: float, rise: float, x: float) -> float:
    return (float(function(x)) - first) / rise


def _load(name: str, curve: Curve | str) -> Curve:
    if callable(curve):
        return curve
    if not isinstance(curve, str):
        raise TypeError(
            f"`{name}` must be one of {', '.join(map(repr, NAMED_CURVES))}, a callable or its import path, "
            f"got {shown(curve)}."
        )
    try:
        loaded = by_import_path(curve)
    except ImportError as error:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, NAMED_CURVES))} or an import path, "
            f"got {shown(curve)}, which cannot be imported: {error}{did_you_mean(curve, NAMED_CURVES)}"
        ) from error
    if not callable(loaded):
        raise TypeError(f"`{name}` must be callable, got {shown(loaded)} at {curve!r}.")
    return loaded  # type: ignore[no-any-return]  # checked where it is called, at 0 and at 1
