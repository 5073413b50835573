"""Schedules as plain JSON values and back, without ever running code that the values name unless told to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_plugins.core.imports import by_import_path, declared_names
from lightning_plugins.core.validation import shown
from lightning_plugins.schedules.curves import NAMED_CURVES, import_path
from lightning_plugins.schedules.fields import field_items, kind_of
from lightning_plugins.schedules.schedule import Schedule

_FAMILIES = ("combinators", "families", "piecewise", "ramps", "warmup")
_MODULES = {
    name: module
    for name, module in declared_names("lightning_plugins.schedules").items()
    if module.rpartition(".")[2] in _FAMILIES
}
SCHEDULES = tuple(sorted(_MODULES))
"""Every schedule class, and Segment: what a configuration or an expression may name."""


def to_plain(schedule: Schedule) -> dict[str, Any]:
    """Return what :meth:`Schedule.to_dict` promises."""
    kind = type(schedule)
    known = known_schedules().get(kind.__name__) is kind
    name = kind.__name__ if known else f"{kind.__module__}.{kind.__qualname__}"
    return {"class": name, **_plain_fields(schedule)}


def from_plain(data: Mapping[str, Any], *, trust: bool) -> Schedule:
    """Return what :meth:`Schedule.from_dict` promises."""
    schedule = _build(data, trust=trust)
    if not isinstance(schedule, Schedule):
        raise ValueError(f"`data` must describe a schedule, got {dict(data)!r}; its name belongs under 'class'.")  # noqa: TRY004
    return schedule


def known_schedules() -> dict[str, type[Any]]:
    """Return this package's schedules, and its ``Segment``, by class name."""
    return {name: by_import_path(f"{_MODULES[name]}.{name}") for name in SCHEDULES}


def _plain_fields(item: Any) -> dict[str, Any]:
    return {name: _plain_value(name, value, kind) for name, value, kind in field_items(item)}


def _plain_value(name: str, value: Any, kind: str) -> Any:
    if kind == "curve":
        return import_path(name, value)
    if isinstance(value, Schedule):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return _plain_fields(value)
    if isinstance(value, tuple):
        return [_plain_value(name, item, kind) for item in value]
    return value


def _build(data: Mapping[str, Any], *, trust: bool) -> Any:
    if not isinstance(data, Mapping):
        raise TypeError(f"`data` must be a mapping as `to_dict` returns it, got {shown(data)}.")
    arguments = dict(data)
    path = arguments.pop("class", "Segment")  # a segment is the one part that is no schedule
    kind = known_schedules().get(path) or _imported(path, trust=trust)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(arguments) - set(fields))
    if unknown:
        if "class" not in data:
            raise ValueError(f"`data` must name the schedule under 'class', got {shown(dict(data))}.")
        raise ValueError(f"`{path}` has no argument `{unknown[0]}`; choose from {', '.join(fields)}.")
    for name, value in arguments.items():
        if kind_of(fields[name]) == "curve" and not trust and value not in NAMED_CURVES:
            raise ValueError(
                f"`{name}` must be one of {', '.join(map(repr, NAMED_CURVES))} unless `trust=True`: "
                f"{value!r} names code, which would run."
            )
        arguments[name] = _built(value, trust=trust)
    return kind(**arguments)


def _built(value: Any, *, trust: bool) -> Any:
    if isinstance(value, Mapping):
        return _build(value, trust=trust)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_built(item, trust=trust) for item in value)
    return value


def _imported(path: str, *, trust: bool) -> Any:
    if not trust:
        raise ValueError(
            f"`class` must be one of {', '.join(sorted(known_schedules()))}, got {shown(path)}; a schedule of your own "
            "needs `trust=True`, because importing it runs its code."
        )
    try:
        kind = by_import_path(str(path))
    except ImportError as error:
        raise ValueError(
            f"`class` must name a schedule, got {shown(path)}, which cannot be imported: {error}."
        ) from error
    if not (dataclasses.is_dataclass(kind) and isinstance(kind, type) and issubclass(kind, Schedule)):
        raise ValueError(f"`class` must name a schedule, got {shown(path)}, which is {kind!r}.")
    return kind
