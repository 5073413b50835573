"""Pictures of what was recorded: the curves of a CSV file, and a confusion matrix. matplotlib is imported on use."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_plugins.core.files import free_name, is_special, open_regular, replace_file
from lightning_plugins.core.validation import shortened
from lightning_plugins.statistics.report_text import Report
from lightning_plugins.statistics.rows import TRAIN, VALIDATION

_NOT_CURVES = {"epoch", "batch", "phase", "step", "lr", "time"}
_OWN_LOSS = "loss_step"
# and lines in one
_MOST_PANELS = 40
# what a later run has moved there
_ASIDE = re.compile(r".*\.[0-9]+\.csv")

Line = tuple[list[float], list[float]]
"""x and y values."""


@dataclass
class Curves:
    """The curves in a file written by :class:`CSVStatisticsLogger`.

    Args:
        axis: What the x axis counts.
        lines: Statistic -> name of a line -> its values. The name is the phase, or the column's where the phase has
            two columns of that statistic.
        rates: x values and learning rates.
    """

    axis: str
    lines: dict[str, dict[str, Line]] = field(default_factory=dict)
    rates: Line = field(default_factory=lambda: ([], []))
    _column_of: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, column: str, phase: str, x: float, y: float) -> None:
        """Add a point of a column.

        Raises:
            ValueError: If there are more statistics, or lines of one, than a picture can show.
        """
        statistic, line = _place_of(column, phase)
        if self._column_of.setdefault((statistic, line), column) != column:
            # two columns never are one line
            line = column
        lines = self.lines.setdefault(statistic, {})
        xs, ys = lines.setdefault(line, ([], []))
        xs.append(x)
        ys.append(y)
        if len(self.lines) > _MOST_PANELS or len(lines) > _MOST_PANELS:
            raise ValueError(f"more than {_MOST_PANELS} statistics or lines of one, which do not fit a picture")


def _place_of(column: str, phase: str) -> tuple[str, str]:
    """Return which statistic a column shows, and the name of its line."""
    column, _, loader = column.partition("/dataloader_idx_")
    statistic, shown = column, phase or TRAIN
    for prefix, of in (("train_", TRAIN), ("val_", VALIDATION)):
        if column.startswith(prefix) and (not phase or phase == of):
            statistic, shown = column.removeprefix(prefix), of
    if statistic == _OWN_LOSS:
        return "loss", "each batch"
    return statistic, f"{shown}, loader {loader}" if loader else shown


def read_curves(path: str | Path) -> Curves:
    """Return the curves in a CSV file of any layout of :class:`CSVStatisticsLogger`.

    A training curve has a point per row; a validation is one point, its last row. S4TF's layout has no phase column:
    there a second stretch of batches in an epoch is its validation.

    Args:
        path: The file.

    Raises:
        ValueError: If it is not such a file, has no rows, or more statistics than fit a picture.
        OSError: If it cannot be read.
    """
    with io.TextIOWrapper(open_regular(Path(path)), encoding="utf-8-sig", errors="replace", newline="") as handle:
        try:
            found = list(csv.DictReader(handle, skipinitialspace=True))
        except csv.Error as error:
            raise ValueError(f"{str(path)!r} is no CSV file: {error}.") from error
    # cells beyond the header have no name, and those of a row that was cut off no value
    rows = [{name: cell or "" for name, cell in row.items() if name} for row in found]
    if not rows:
        raise ValueError(f"{str(path)!r} has no rows to plot.")
    if "epoch" not in rows[0] or "batch" not in rows[0]:
        raise ValueError(f"{str(path)!r} must have the columns 'epoch' and 'batch' that CSVStatisticsLogger writes.")
    per_epoch = not any(name not in _NOT_CURVES and not name.startswith(("train_", "val_")) for name in rows[0])
    curves = Curves("epoch" if per_epoch else "optimizer step" if rows[0].get("step") else "training batch")
    try:
        for x, phase, row in _epochs(rows) if per_epoch else _batches(rows):
            _add_row(curves, x, phase, row)
    except (ValueError, OverflowError) as error:
        what = str(error) if "do not fit" in str(error) else f"a cell that is no number: {shortened(str(error))}"
        raise ValueError(f"{str(path)!r} has {what}.") from error
    if not curves.lines:
        raise ValueError(f"{str(path)!r} has no statistics to plot.")
    return curves


def plot_log(path: str | Path | Sequence[str | Path], output: str | Path | None = None, *, log: bool = False) -> Path:
    """Draw loss and metrics, training and validation, with the learning rate below.

    Args:
        path: A file written by :class:`CSVStatisticsLogger`, a folder with such files in it, or several of either;
            each run has lines of its own.
        output: The picture; its suffix chooses the format. ``None`` puts a ``.png`` beside the first file, under a name
            that is not taken.
        log: Whether the y axes are logarithmic, where all values are above zero.

    Returns:
        Where the picture is.

    Raises:
        ValueError: If there is nothing to plot in ``path``, the format is unknown, or ``output`` is one of the logs.
        OSError: If the one cannot be read or the other not be written.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    paths = [file for given in ([path] if isinstance(path, (str, Path)) else path) for file in _logs_in(Path(given))]
    names = _run_names(paths)
    runs = [(name, read_curves(file)) for name, file in zip(names, paths, strict=True)]
    if output is None:
        target = paths[0].with_suffix(".png")
        target = free_name(target) if os.path.lexists(target) else target
    else:
        target = Path(output)
    if any(target.resolve() == file.resolve() for file in paths):
        raise ValueError(f"`output` must be another file than the log, got {str(target)!r}.")
    figure = _drawn(runs, log=log)
    figure.suptitle(_literally(", ".join(names) if len(names) < 4 else f"{len(names)} runs"))
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, format=target.suffix.removeprefix(".") or None)
    replace_file(target, picture.getvalue())
    return target


def _drawn(runs: Sequence[tuple[str, Curves]], *, log: bool) -> Any:
    statistics = list(dict.fromkeys(name for _, curves in runs for name in curves.lines))
    with_rates = any(curves.rates[0] for _, curves in runs)
    panels = len(statistics) + with_rates
    figure = _figure(8, 2 + 2 * panels)
    axes = figure.subplots(panels, sharex=True, squeeze=False).ravel()
    for axis, statistic in zip(axes, statistics, strict=False):
        for run, curves in runs:
            for line, (xs, ys) in sorted(curves.lines.get(statistic, {}).items()):
                # behind the mean that runs
                own = line == "each batch"
                axis.plot(
                    xs,
                    ys,
                    label=_literally(line if len(runs) == 1 else f"{run}: {line}"),
                    marker="o" if len(xs) < 50 and not own else None,
                    markersize=3,
                    linewidth=0.6 if own else 1.2,
                    alpha=0.5 if own else 1.0,
                )
        axis.set_ylabel(_literally(statistic))
        axis.legend(fontsize="small")
        if log:
            _make_logarithmic(axis)
    if with_rates:
        for run, curves in runs:
            axes[-1].plot(
                *curves.rates, label=_literally(run), linewidth=1.2, **({} if len(runs) > 1 else {"color": "tab:gray"})
            )
        axes[-1].set_ylabel("lr")
    axes[-1].set_xlabel(", ".join(dict.fromkeys(curves.axis for _, curves in runs)))
    return figure


def _make_logarithmic(axis: Any) -> None:
    values = np.concatenate([line.get_ydata() for line in axis.get_lines()])
    if (values[np.isfinite(values)] > 0).all() and np.isfinite(values).any():
        axis.set_yscale("log")


def _logs_in(path: Path) -> list[Path]:
    """Return a file as it is, and of a folder all logs in it, without those that were moved aside."""
    if not path.is_dir():
        return [path]
    found = [file for file in sorted(path.rglob("*.csv")) if not _ASIDE.fullmatch(file.name) and _is_log(file)]
    if not found:
        raise ValueError(f"There is no log of CSVStatisticsLogger in the folder {str(path)!r}.")
    return found


def _is_log(path: Path) -> bool:
    if is_special(path):
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as handle:
        return re.match(r"epoch, ?batch[,\n]", handle.readline(1000)) is not None


def _run_names(paths: Sequence[Path]) -> list[str]:
    """Return what each run is called: its file, or its folder where files have one name; with more where they clash."""
    names = [path.parent.name if path.stem == "log" and path.parent.name else path.stem for path in paths]
    return [
        name if names.count(name) == 1 else str(path.with_suffix("")) for name, path in zip(names, paths, strict=True)
    ]


def _literally(text: str) -> str:
    """Return a text as matplotlib shows it, and not what it would make of its dollars; too long ones shortened."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return (text if len(text) <= 60 else f"{text[:57]}...").replace("$", r"\$")


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
    names = [_literally(name) for name in report.names()]
    axis.set_xticks(range(len(labels)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(labels)), names)
    axis.set_xlabel("prediction")
    axis.set_ylabel("label")
    if len(labels) <= 20:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())


def _figure(width: float, height: float) -> Any:
    # without pyplot: no display, no global state
    from matplotlib.figure import Figure  # noqa: PLC0415

    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def _add_row(curves: Curves, x: float, phase: str, row: Mapping[str, str]) -> None:
    for name, cell in row.items():
        if name in _NOT_CURVES or not cell or (name == _OWN_LOSS and phase == VALIDATION):
            continue
        curves.add(name, phase, x, float(cell))
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
