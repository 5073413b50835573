"""What a scheduler writes into an optimizer's groups, step by step, without training and without the optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_plugins.core.validation import shown, whole_number
from lightning_plugins.schedules.scheduler import ScheduleLR
from lightning_plugins.schedules.scheduler_arguments import first_of


def preview_groups(
    optimizer: Optimizer, schedule: Any, total_steps: int, options: dict[str, Any]
) -> dict[str | int, list[float]]:
    """Return the values of an entry of every group for the first ``total_steps`` steps.

    Args:
        optimizer: Whose groups are meant; it is not changed.
        schedule: A schedule, or one for each named group, every length known.
        total_steps: Optimizer steps, at least 0.
        options: Keyword arguments of :class:`ScheduleLR`.

    Returns:
        A list for each group, by its name, or by its index where it has none of its own.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"`optimizer` must be a torch optimizer, got {shown(optimizer)}.")
    copy = _Copy(optimizer)
    scheduler = ScheduleLR(copy, schedule, **options)
    values: list[list[float]] = [[] for _ in copy.param_groups]
    for step in range(whole_number("total_steps", total_steps, unit="steps")):
        scheduler.refresh(step)
        for group, known in zip(copy.param_groups, values, strict=True):
            known.append(float(first_of(group[scheduler.parameter])))
    return dict(zip(_names(copy.param_groups), values, strict=True))


class _Copy(Optimizer):
    """The groups of another optimizer, without its parameters."""

    def __init__(self, optimizer: Optimizer) -> None:
        groups = [
            {name: _cloned(value) for name, value in group.items() if name not in ("params", "param_names")}
            for group in optimizer.param_groups
        ]
        super().__init__([{**group, "params": [nn.Parameter()]} for group in groups], {})


def _cloned(value: Any) -> Any:
    """Return a copy of what a scheduler would fill in place."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_cloned, value))
    return value.clone() if isinstance(value, Tensor) else value


def _names(groups: list[dict[str, Any]]) -> list[str | int]:
    names: list[str | int] = []
    for index, group in enumerate(groups):
        name = group.get("name", index)
        names.append(index if name in names else name)
    return names
