"""What the torch schedulers and the callback accept: schedules, base rates, and entries of an optimizer's groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from lightning_plugins.core.validation import did_you_mean, real_number, shown, whole_number
from lightning_plugins.schedules.fields import unwrapped
from lightning_plugins.schedules.schedule import Schedule

_FORMAT = "lightning_plugins.ScheduleLR"
CLOCKS = ("attempted", "applied", "time")
GroupSchedules: TypeAlias = Mapping[str, Schedule] | Mapping[int, Schedule]


def check_schedules(schedule: Any) -> Schedule | dict[str | int, Schedule]:
    """Return a schedule, or a dictionary of one for each named group.

    Raises:
        TypeError: If it is neither, or a name is neither a text nor an index.
        ValueError: If a mapping is empty or an index negative.
    """
    schedule = unwrapped(schedule)
    if not isinstance(schedule, Mapping):
        return _check_schedule("schedule", schedule)
    if not schedule:
        raise ValueError("`schedule` must name at least one group, got an empty mapping.")
    checked: dict[str | int, Schedule] = {}
    for name, part in schedule.items():
        group = name if isinstance(name, str) else whole_number("schedule: the index of a group", name)
        checked[group] = _check_schedule(f"schedule[{name!r}]", part)
    return checked


def check_closed(schedule: Any, groups: Sequence[dict[str, Any]]) -> Any:
    """Return a schedule, or one for each named group, whose every length is known.

    Raises:
        TypeError: If it is something else.
        ValueError: If a length is open, or a name is not that of a group.
    """
    checked = check_schedules(schedule)
    for part in checked.values() if isinstance(checked, dict) else (checked,):
        if part.is_open:
            raise ValueError(
                f"`schedule` must have every length in steps, got {shown(part)}; call its `resolve` first."
            )
    if isinstance(checked, dict):
        check_names(checked, groups)
    return checked


def check_parameter(parameter: Any) -> str:
    """Return the name of an entry of the groups.

    Raises:
        TypeError: If it is no text, or an empty one.
    """
    if not isinstance(parameter, str) or not parameter:
        raise TypeError(f"`parameter` must be the name of an entry of the groups, got {shown(parameter)}.")
    return parameter


def check_base_lr(base_lr: float | Sequence[float | None] | None) -> float | tuple[float | None, ...] | None:
    """Return the base rates as floats, or raise; a group whose entry is ``None`` keeps its own."""
    if isinstance(base_lr, Sequence) and not isinstance(base_lr, (str, bytes)):
        if not base_lr:
            raise ValueError("`base_lr` must have one rate for each of the groups, got none.")
        return tuple(None if rate is None else _base_rate(f"base_lr[{i}]", rate) for i, rate in enumerate(base_lr))
    return None if base_lr is None else _base_rate("base_lr", base_lr)


def check_group(group: dict[str, Any], parameter: str) -> None:
    """Raise unless a group has a number under ``parameter``, or a tuple that begins with one.

    Raises:
        TypeError: If the entry is no number.
        ValueError: If there is none of that name.
    """
    if parameter not in group:
        numbers = sorted(k for k, v in group.items() if isinstance(v, float) and not k.startswith("initial_"))
        raise ValueError(
            f"`parameter` must be an entry of the optimizer's groups, got {shown(parameter)}; "
            f"there are {', '.join(numbers)}{did_you_mean(parameter, group)}"
        )
    value = first_of(group[parameter])
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(
            f"`parameter` must name a number of the optimizer's groups, got {shown(parameter)}: {shown(value)}."
        )
    if "lr_scale" in group:
        real_number("lr_scale", group["lr_scale"], at_least=0)


def identity(parameter: str, clock: str) -> dict[str, str]:
    """Return what the state of a scheduler has in common with every scheduler that may load it."""
    others = {} if parameter == "lr" else {"parameter": parameter}
    return {"format": _FORMAT, **others, **({"clock": clock} if clock == "time" else {})}


def is_of(state: Mapping[str, Any], parameter: str, clock: str) -> bool:
    """Return whether a state is that of a scheduler of the same entry, whose positions count the same."""
    return {name: state[name] for name in ("format", "parameter", "clock") if name in state} == identity(
        parameter, clock
    )


def lr_scale(group: Mapping[str, Any], parameter: str) -> float:
    """Return the factor that a group brings for its rate, as timm's do: 1 where there is none."""
    scale: float = group.get("lr_scale", 1.0) if parameter == "lr" else 1.0
    return scale


def first_of(value: Any) -> Any:
    """Return the first number of a tuple, as of ``betas``, and any other value as it is."""
    return value[0] if isinstance(value, (tuple, list)) and value else value


def check_names(schedules: Mapping[str | int, Schedule], groups: Sequence[dict[str, Any]]) -> None:
    """Raise unless every name or index is that of one group, and each group is named once.

    Raises:
        ValueError: If one is not; the message lists the groups.
    """
    names = [f" ({group['name']!r})" if "name" in group else "" for group in groups]
    there = ", ".join(f"{index}{name}" for index, name in enumerate(names))
    taken: list[int] = []
    for name in schedules:
        found = [index for index, group in enumerate(groups) if name in (index, group.get("name"))]
        if not found:
            raise ValueError(f"`schedule` must name groups of the optimizer, got {name!r}; there are {there}.")
        if set(found) & set(taken):
            raise ValueError(f"`schedule` must name each group once, got {name!r} again; there are {there}.")
        taken += found


def named_groups(schedule: Any, groups: Sequence[dict[str, Any]]) -> set[int]:
    """Return the indexes of the groups that a schedule, or a mapping of them, drives."""
    if not isinstance(schedule, Mapping):
        return set(range(len(groups)))
    return {index for index, group in enumerate(groups) if index in schedule or group.get("name") in schedule}


def _check_schedule(name: str, schedule: Any) -> Schedule:
    if not isinstance(schedule, Schedule):
        is_class = isinstance(schedule, type) and issubclass(schedule, Schedule)
        remedy = f" Write {schedule.__name__}(...)." if is_class else ""
        raise TypeError(f"`{name}` must be a Schedule such as WarmupCosine(warmup=100), got {shown(schedule)}.{remedy}")
    return schedule


def _base_rate(name: str, rate: Any) -> float:
    return float(real_number(name, rate, above=0))
