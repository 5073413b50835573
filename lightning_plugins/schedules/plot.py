"""Schedules as pictures and as text: look before you train."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_plugins.core.validation import real_number, whole_number

if TYPE_CHECKING:
    from lightning_plugins.schedules.schedule import Schedule

_POINTS = 2000  # more would lie on one pixel
_MOST_STEPS = 1_000_000  # that a sketch looks at
_LABEL_WIDTH = 95  # characters across the picture


def plot_schedules(
    schedules: Mapping[str, Schedule | Mapping[str, Schedule]],
    total_steps: int,
    path: str | Path,
    *,
    base_lr: float | None = None,
    steps_per_epoch: float | None = None,
    size: tuple[float, float] | None = None,
) -> Path:
    """Draw several schedules into one picture; needs matplotlib (``pip install lightning-plugins[plot]``).

    Args:
        schedules: Schedules by label; open ones are resolved for ``total_steps``. A mapping in place of a schedule is a
            panel of its own, for one of several parameters: ``{"lr": {"backbone": ..., "head": ...}}``.
        total_steps: Optimizer steps to draw, at least 1.
        path: Where to write; the suffix chooses the format. Parent directories are made.
        base_lr: Base learning rate; the axis then shows rates instead of factors. Of panels, ``"lr"`` alone takes it.
        steps_per_epoch: Optimizer steps of an epoch, for durations in epochs.
        size: Width and height in inches; by default 7 wide, and as high as the labels need.

    Returns:
        The path written.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw, or matplotlib cannot write such a file.
    """
    if not schedules or not all(schedules.values()):
        raise ValueError("`schedules` must hold at least one schedule, got none.")
    steps = drawn_steps(whole_number("total_steps", total_steps, at_least=1, unit="steps"))
    scale = 1.0 if base_lr is None else real_number("base_lr", base_lr, above=0)
    rates = "factor of the base learning rate" if base_lr is None else "learning rate"
    panels: dict[str, dict[str, list[float]]] = {}
    for name, part in schedules.items():
        several = isinstance(part, Mapping)
        for label, schedule in part.items() if isinstance(part, Mapping) else [(name, part)]:
            known = schedule.resolve(total_steps, steps_per_epoch) if schedule.is_open else schedule
            factor = scale if name == "lr" or not several else 1.0
            panels.setdefault(name if several else rates, {})[label] = _values(known, steps, factor)
    return draw_panels(panels, steps, path, size=size)


def draw_panels(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    steps: Sequence[int],
    path: str | Path,
    *,
    size: tuple[float, float] | None = None,
) -> Path:
    """Draw lines into one picture, a panel above the other.

    Args:
        panels: Lines by label, by what their axis shows; each has a value for each step.
        steps: The steps that are drawn, in ascending order.
        path: Where to write; the suffix chooses the format. Parent directories are made.
        size: Width and height in inches; by default 7 wide, and as high as panels and labels need.

    Returns:
        The path written.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If matplotlib cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  # optional, and slow to import
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: `pip install lightning-plugins[plot]`.") from error
    lines = sum(map(len, panels.values()))
    width, height = (7, 3.2 * len(panels) + 0.2 * lines) if size is None else size
    inches = (real_number("size", width, above=0), real_number("size", height, above=0))
    figure = Figure(figsize=inches, layout="constrained")  # no pyplot: nothing global
    every = figure.subplots(len(panels), sharex=True, squeeze=False).ravel()
    for axes, (title, curves) in zip(every, panels.items(), strict=True):
        for label, values in curves.items():
            axes.plot(steps, values, label=textwrap.fill(label, int(_LABEL_WIDTH * inches[0] / 7) + 1))
        axes.set_ylabel(title)
        axes.set_xlim(0, steps[-1] + 1)
        lowest, highest = min(map(min, curves.values())), max(map(max, curves.values()))
        if len(panels) == 1 or not highest / 2 < lowest < highest:
            # an average's decay from 0.996 to 1 would be a flat line
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if len(panels) > 1:
            axes.legend(fontsize="small", frameon=False)
    every[-1].set_xlabel("optimizer step")
    if len(panels) == 1:
        figure.legend(loc="outside upper left", fontsize="small", frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def sketch(
    schedule: Schedule,
    total_steps: int,
    *,
    base_lr: float | None = None,
    steps_per_epoch: float | None = None,
    width: int = 64,
    height: int = 12,
) -> str:
    """Return the schedule as a picture made of text, with its values at the points that matter below.

    Args:
        schedule: The schedule; an open one is resolved for ``total_steps``.
        total_steps: Optimizer steps to show, at least 1; beyond a million, evenly chosen ones are looked at.
        base_lr: Base learning rate; ``None`` shows factors.
        steps_per_epoch: Optimizer steps of an epoch, for durations in epochs.
        width: Characters across, at least 8.
        height: Lines of the picture, at least 2.

    Raises:
        ValueError: If a number is out of range, or a value not finite.
    """
    total_steps = whole_number("total_steps", total_steps, at_least=1, unit="steps")
    whole_number("width", width, at_least=8, unit="characters")
    whole_number("height", height, at_least=2, unit="lines")
    scale = 1.0 if base_lr is None else real_number("base_lr", base_lr, above=0)
    known = schedule.resolve(total_steps, steps_per_epoch) if schedule.is_open else schedule
    steps = range(0, total_steps, -(-total_steps // _MOST_STEPS))
    values = _values(known, steps, scale)
    columns = [_peak_of(values, column, width) for column in range(width)]
    top = max(values) or 1.0
    rows = [min(round(value / top * (height - 1)), height - 1) for value in columns]
    lines = []
    for row in reversed(range(height)):
        axis = f"{top if row else 0:9.3g} |" if row in (0, height - 1) else " " * 9 + " |"
        lines.append((axis + "".join("*" if level == row else " " for level in rows)).rstrip())
    lines.append(" " * 9 + " +" + "-" * width)
    lines.append(" " * 11 + f"0{'step ' + str(total_steps - 1):>{width - 1}}")
    peak = steps[values.index(top)] if top in values else 0
    marks = [step for step in sorted({0, 1, peak, total_steps // 2, total_steps - 1}) if step < total_steps]
    for step, value in zip(marks, _values(known, marks, scale), strict=True):
        lines.append(f"{'step ' + str(step):>20}  {value:.6g}")
    return "\n".join(lines)


def _values(schedule: Schedule, steps: Sequence[int], scale: float) -> list[float]:
    """Return the factors or rates of some steps.

    Raises:
        ValueError: If one is beyond what can be drawn.
    """
    values = [scale * schedule(step) for step in steps]
    for step, value in zip(steps, values, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"`schedule` must have finite values, got {value} at step {step}.")
    return values


def drawn_steps(total_steps: int) -> list[int]:
    """Return the steps of so many that a picture shows: evenly chosen ones, and the last."""
    stride = max(total_steps // _POINTS, 1)
    return sorted({*range(0, total_steps, stride), total_steps - 1})


def _peak_of(values: list[float], column: int, width: int) -> float:
    """Return the highest value of the steps that one character stands for: a peak is never lost between two."""
    begin = column * len(values) // width
    end = max((column + 1) * len(values) // width, begin + 1)
    return max(values[begin:end])
