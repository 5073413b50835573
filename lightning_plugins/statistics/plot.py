"""Pictures of what was recorded: the curves of a CSV file, and a confusion matrix. matplotlib is imported on use."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_plugins.core.files import open_regular
from lightning_plugins.core.validation import shortened
from lightning_plugins.statistics.report_text import Report
from lightning_plugins.statistics.rows import TRAIN, VALIDATION

_NOT_CURVES = {"epoch", "batch", "phase", "step", "lr", "time"}


@dataclass
class Curves:
    """The curves in a file written by :class:`CSVStatisticsLogger`.

    Args:
        axis: What the x axis counts.
        lines: Statistic -> phase -> (x values, y values).
        rates: x values and learning rates.
    """

    axis: str
    lines: dict[str, dict[str, tuple[list[float], list[float]]]] = field(default_factory=dict)
    rates: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def add(self, statistic: str, phase: str, x: float, y: float) -> None:
        """Add a point."""
        xs, ys = self.lines.setdefault(statistic, {}).setdefault(phase, ([], []))
        xs.append(x)
        ys.append(y)


def read_curves(path: str | Path) -> Curves:
    """Return the curves in a CSV file of any layout of :class:`CSVStatisticsLogger`.

    A training curve has a point per row; a validation is one point, its last row. S4TF's layout has no phase column:
    there a second stretch of batches in an epoch is its validation.

    Args:
        path: The file.

    Raises:
        ValueError: If it is not such a file, or has no rows.
        OSError: If it cannot be read.
    """
    with io.TextIOWrapper(open_regular(Path(path)), encoding="utf-8", errors="replace", newline="") as handle:
        try:
            found = list(csv.DictReader(handle, skipinitialspace=True))
        except csv.Error as error:
            raise ValueError(f"'{path}' is no CSV file: {error}.") from error
    # cells beyond the header have no name, and those of a row that was cut off no value
    rows = [{name: cell or "" for name, cell in row.items() if name} for row in found]
    if not rows:
        raise ValueError(f"'{path}' has no rows to plot.")
    if "epoch" not in rows[0] or "batch" not in rows[0]:
        raise ValueError(f"'{path}' must have the columns 'epoch' and 'batch' that CSVStatisticsLogger writes.")
    per_epoch = not any(name not in _NOT_CURVES and not name.startswith(("train_", "val_")) for name in rows[0])
    curves = Curves("epoch" if per_epoch else "optimizer step" if rows[0].get("step") else "training batch")
    try:
        for x, phase, row in _epochs(rows) if per_epoch else _batches(rows):
            _add_row(curves, x, phase, row)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"'{path}' has a cell that is no number: {shortened(str(error))}.") from error
    if not curves.lines:
        raise ValueError(f"'{path}' has no statistics to plot.")
    return curves


def plot_log(path: str | Path, output: str | Path | None = None) -> Path:
    """Draw loss and metrics, training and validation, with the learning rate below.

    Args:
        path: A file written by :class:`CSVStatisticsLogger`.
        output: The picture; its suffix chooses the format. ``None`` puts a ``.png`` beside the file.

    Returns:
        Where the picture is.

    Raises:
        ValueError: If there is nothing to plot in ``path``, or the format is unknown.
        OSError: If the one cannot be read or the other not be written.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    curves = read_curves(path)
    output = Path(path).with_suffix(".png") if output is None else Path(output)
    panels = len(curves.lines) + bool(curves.rates[0])
    figure = _figure(8, 2 + 2 * panels)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for axis, (statistic, phases) in zip(axes, curves.lines.items(), strict=False):
        for phase, (xs, ys) in sorted(phases.items()):
            marker = "o" if len(xs) < 50 else None
            axis.plot(xs, ys, label=phase, marker=marker, markersize=3, linewidth=1.2)
        axis.set_ylabel(statistic)
        axis.legend()
    if curves.rates[0]:
        axes[-1].plot(*curves.rates, color="tab:gray", linewidth=1.2)
        axes[-1].set_ylabel("lr")
    axes[-1].set_xlabel(curves.axis)
    figure.suptitle(Path(path).name)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return output


def plot_confusion_matrix(report: Report, path: Path) -> None:
    """Draw the confusion matrix of the classes in a report, each row as shares of its label's samples."""
    labels = report.shown_labels()
    if report.totals.matrix is None:
        raise OSError("several labels at once have no confusion matrix")
    counts = report.totals.matrix[np.ix_(labels, labels)]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(4.0, 1.5 + 0.45 * len(labels))
    figure = _figure(side + 1, side)
    axis = figure.subplots()
    figure.colorbar(axis.imshow(shares, cmap="Blues", vmin=0, vmax=1), label="share of the label's samples")
    names = report.names()
    axis.set_xticks(range(len(labels)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(labels)), names)
    axis.set_xlabel("prediction")
    axis.set_ylabel("label")
    if len(labels) <= 20:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # noqa: PLC0415  # without pyplot: no display, no global state

    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def _add_row(curves: Curves, x: float, phase: str, row: Mapping[str, str]) -> None:
    for name, cell in row.items():
        if name in _NOT_CURVES or not cell:
            continue
        statistic, shown = name, phase
        for prefix, of in (("train_", TRAIN), ("val_", VALIDATION)):
            if name.startswith(prefix) and (not phase or phase == of):
                statistic, shown = name.removeprefix(prefix), of
        curves.add(statistic, shown or TRAIN, x, float(cell))
    if row.get("lr") and phase in ("", TRAIN):
        curves.rates[0].append(x)
        curves.rates[1].append(float(row["lr"]))


def _epochs(rows: Sequence[dict[str, str]]) -> Iterator[tuple[float, str, dict[str, str]]]:
    for row in rows:
        yield float(_number(row["epoch"])), "", row


def _batches(rows: Sequence[dict[str, str]]) -> Iterator[tuple[float, str, dict[str, str]]]:
    """Yield every training row, and the last row of each validation, with their places."""
    phase, place = TRAIN, 0
    for index, row in enumerate(rows):
        previous = rows[index - 1] if index else None
        phase = row.get("phase") or _phase(previous, row, phase)
        place = int(row["step"]) if row.get("step") else place + (phase == TRAIN)
        following = rows[index + 1] if index + 1 < len(rows) else None
        if phase == TRAIN or following is None or _ends(row, following):
            yield float(place), phase, row


def _phase(previous: Mapping[str, str] | None, row: Mapping[str, str], before: str) -> str:
    if previous is None or _number(row["epoch"]) != _number(previous["epoch"]):
        return TRAIN
    return VALIDATION if _ends(previous, row) else before


def _ends(row: Mapping[str, str], following: Mapping[str, str]) -> bool:
    """Whether a stretch of batches ends between two rows."""
    same_phase = row.get("phase") == following.get("phase")
    return not same_phase or _number(following["batch"]) <= _number(row["batch"])


def _number(cell: str) -> int:
    return int(cell.partition("/")[0])
