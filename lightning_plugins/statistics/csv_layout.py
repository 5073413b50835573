"""How a row of statistics reads as the cells of a CSV file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lightning_plugins.statistics.row_buffer import TRAIN, Row
from lightning_plugins.statistics.running import S4TF_NAMES

Cells = dict[str, str]


def number_cells(row: Row) -> Cells:
    """Return the cells of the default layout: whole numbers from 1, and every digit of the statistics."""
    cells = {
        "epoch": str(row.epoch),
        "batch": str(row.batch),
        "phase": row.phase,
        "step": str(row.step),
        "lr": "" if row.lr is None else repr(row.lr),
    }
    for name, value in (row.values or {}).items():
        cells[name] = repr(value)
    cells["time"] = f"{row.seconds:.3f}"
    return cells


def s4tf_cells(row: Row) -> Cells:
    """Return the cells of Swift for TensorFlow's layout: ``1/12``, ``3/468``, its names, float32 at its shortest."""
    cells = {"epoch": _of(row.epoch, row.epochs), "batch": _of(row.batch, row.batches)}
    for name, value in (row.values or {}).items():
        cells[S4TF_NAMES.get(name, name)] = shortest_float32(value)
    return cells


LAYOUTS: Mapping[str, Callable[[Row], Cells]] = {"numbers": number_cells, "s4tf": s4tf_cells}
SEPARATORS = {"numbers": ",", "s4tf": ", "}
BASE_COLUMNS = {"numbers": ("epoch", "batch", "phase", "step", "lr"), "s4tf": ("epoch", "batch")}


def epoch_cells(layout: str, train: Row | None, validation: Row | None) -> Cells:
    """Return one row for a whole epoch: ``train_<name>`` and ``val_<name>``, blank where nothing was measured.

    Args:
        layout: ``"numbers"`` or ``"s4tf"``.
        train: The training phase's last row.
        validation: The last row of the epoch's last validation.
    """
    make = LAYOUTS[layout]
    lead = train or validation
    base = {} if lead is None else make(lead)
    cells = {name: base[name] for name in BASE_COLUMNS[layout] if name in base and name != "phase"}
    for prefix, row in (("train", train), ("val", validation)):
        names = [] if row is None else [S4TF_NAMES.get(n, n) if layout == "s4tf" else n for n in row.values or {}]
        made = {} if row is None else make(row)
        cells |= {f"{prefix}_{name}": made[name] for name in names}
    if "time" in base:
        cells["time"] = f"{max(row.seconds for row in (train, validation) if row is not None):.3f}"
    return cells


def epoch_columns(names: tuple[str, ...], layout: str) -> tuple[str, ...]:
    """Return every column that :func:`epoch_cells` can have for statistics called ``names``."""
    shown = [S4TF_NAMES.get(name, name) if layout == "s4tf" else name for name in names]
    base = tuple(name for name in BASE_COLUMNS[layout] if name != "phase")
    clock = ("time",) if layout == "numbers" else ()
    return (*base, *(f"{TRAIN}_{name}" for name in shown), *(f"val_{name}" for name in shown), *clock)


def batch_columns(names: tuple[str, ...], layout: str) -> tuple[str, ...]:
    """Return every column that a row of a batch has for statistics called ``names``."""
    if layout == "s4tf":
        return (*BASE_COLUMNS[layout], *(S4TF_NAMES.get(name, name) for name in names))
    return (*BASE_COLUMNS[layout], *names, "time")


def shortest_float32(value: float) -> str:
    """Return the shortest decimal that is this number in float32.

    Example:
        >>> [shortest_float32(value) for value in (0.1, 1.0, 1e-5, float("nan"), float("-inf"), 1e300)]
        ['0.1', '1.0', '1e-05', 'nan', '-inf', 'inf']
    """
    with np.errstate(over="ignore"):
        return str(np.float32(value))


def _of(number: int, total: int | None) -> str:
    return f"{number}/{'?' if total is None else total}"
