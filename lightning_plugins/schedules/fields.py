"""How a schedule declares its fields, so that each is checked, resolved and written down by what it is."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_plugins.core.durations import Horizon, check_duration, is_open
from lightning_plugins.core.validation import a_list, real_number, whole_number

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform  # in `typing` from Python 3.11 on

_MISSING = dataclasses.MISSING


def duration(*, rest: bool = False, default: Any = _MISSING, kw_only: bool = False) -> Any:
    """Declare a field as a :data:`Duration`; ``rest`` allows ``None``."""
    return _field(partial(check_duration, rest=rest), default, "duration", kw_only=kw_only)


def durations() -> Any:
    """Declare a field as a sequence of durations."""
    return _field(partial(_each, check=check_duration), kind="durations")


def factor(*, default: Any = _MISSING, kw_only: bool = False, optional: bool = False, at_most: float = math.inf) -> Any:
    """Declare a field as a factor: finite, at least 0; ``optional`` allows ``None``."""
    check = partial(_check_factor, at_most=at_most)
    return _field(_optional(check) if optional else check, default, kw_only=kw_only)


def factors() -> Any:
    """Declare a field as a sequence of factors."""
    return _field(partial(_each, check=_check_factor))


def number(*, default: Any = _MISSING, **limits: Any) -> Any:
    """Declare a field as a finite number; ``limits`` are those of :func:`real_number`."""
    return _field(partial(real_number, **limits), default)


def whole(*, default: Any = _MISSING, unit: str = "", optional: bool = False) -> Any:
    """Declare a field as a whole number of at least 1; ``optional`` allows ``None``."""
    check = partial(whole_number, at_least=1, unit=unit)
    return _field(_optional(check) if optional else check, default)


def parts() -> Any:
    """Declare a field as one schedule or segment, or a sequence of them."""
    return _field(_check_parts, kind="parts")


def curve(*, default: Any = _MISSING) -> Any:
    """Declare a field as a curve: a name, a callable or an import path, which is code."""
    return _field(None, default, "curve")


if TYPE_CHECKING:

    @dataclass_transform(
        frozen_default=True, field_specifiers=(duration, durations, factor, factors, number, whole, parts, curve)
    )
    class Declared:
        """Tells type checkers that the functions above declare fields, and which of them have a default."""

else:
    Declared = object


def unwrapped(value: Any) -> Any:
    """Return what omegaconf has wrapped: Hydra hands over lists and mappings of schedules in its own containers."""
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is None or not omegaconf.OmegaConf.is_config(value):
        return value
    return omegaconf.OmegaConf.to_object(value)


def kind_of(field: dataclasses.Field[Any]) -> str:
    """Return what a field holds, if that is more than a value: duration, durations, parts or curve."""
    kind: str = field.metadata.get("kind", "")
    return kind


def field_items(item: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield name, value and kind of every field of a schedule or segment."""
    for field in dataclasses.fields(item):
        yield field.name, getattr(item, field.name), kind_of(field)


def keep(item: Any, values: Mapping[str, Any]) -> None:
    """Set attributes of a frozen dataclass while it is made; what is no field does not take part in comparisons."""
    vars(item).update(values)


def check_fields(item: Any) -> bool:
    """Check and normalize the fields of a frozen dataclass; return whether a length is still open.

    Factors become floats and sequences tuples, so that the dataclass compares and hashes by value.
    """
    checks = {field.name: field.metadata.get("check") for field in dataclasses.fields(item)}
    keep(item, {name: check(name, getattr(item, name)) for name, check in checks.items() if check})
    return any(_has_open_length(value, kind) for _, value, kind in field_items(item))


def resolve_fields(item: Any, horizon: Horizon) -> dict[str, Any]:
    """Return the lengths of a frozen dataclass in steps, and its schedules resolved, by field name."""
    changes: dict[str, Any] = {}
    for name, value, kind in field_items(item):
        if kind == "duration":
            changes[name] = horizon.steps(name, value)
        elif kind == "durations":
            changes[name] = _each(name, value, check=horizon.steps)
        elif kind == "parts" and not isinstance(value, tuple):
            changes[name] = value._resolve(horizon)
    return changes


def _field(
    check: Callable[[str, Any], Any] | None, default: Any = _MISSING, kind: str = "", *, kw_only: bool = False
) -> Any:
    return dataclasses.field(default=default, kw_only=kw_only, metadata={"check": check, "kind": kind})


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _each(name: str, values: Any, check: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    return tuple(check(f"{name}[{index}]", value) for index, value in enumerate(a_list(name, values)))


def _check_factor(name: str, value: Any, at_most: float = math.inf) -> float:
    return float(real_number(name, value, at_least=0, at_most=at_most))


def _check_parts(_: str, value: Any) -> Any:
    value = unwrapped(value)
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _has_open_length(value: Any, kind: str) -> bool:
    if kind == "duration":
        return is_open(value)
    if kind == "durations":
        return any(map(is_open, value))
    items = value if isinstance(value, tuple) else (value,)
    return kind == "parts" and any(getattr(item, "is_open", False) for item in items)
