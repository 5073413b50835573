"""Rows of statistics, one for each batch: kept as sums on the device, and turned into numbers together.

Nothing here knows a Trainer or a file.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lightning_plugins.core.counting import Count
from lightning_plugins.statistics.label_evidence import EVIDENCE, contradiction, decided
from lightning_plugins.statistics.labels import WIDEST, Columns
from lightning_plugins.statistics.running import COUNTED_ONCE, PhaseState, Reduce, StatisticSet, named

TRAIN, VALIDATION = "train", "validation"

# a small tensor holds 512 bytes of a GPU's memory: half a megabyte for loss and counts
_MOST_ROWS = 512
# of the counts of rows that wait: they are large where every class is counted
_MOST_BYTES = 8 << 20

_FLUSH_SECONDS = operator.attrgetter("flush_seconds")
_LEADING = ("batches", "samples", "fresh", "loss", "newest", "weight", "counted")


@dataclass(slots=True)
class StatisticsRow:
    """What is known after one batch.

    Args:
        phase: ``"train"`` or ``"validation"``.
        epoch: The epoch's number, from 1.
        epochs: How many epochs the run has, ``None`` when it has no end.
        batch: The batch's number in its phase, from 1.
        batches: How many batches the phase has, ``None`` when that is unknown.
        step: Optimizer steps taken so far.
        samples: Training samples seen so far, by all ranks once the row is evaluated; 0 where nothing asks for them.
        lr: Learning rate that the batch was trained with, ``None`` for validation; a tensor stays on its device.
        seconds: Since the run began, without the time between a kill and the resume.
        wall_time: The same moment in seconds since 1970.
        sums: The phase's sums after the batch.
        values: Name -> number, once the row has been evaluated. A statistic that is missing was not there to compute.
        more: Further names and numbers, which are on the host already.
        loss_step: The batch's own loss, once the row has been evaluated; ``None`` without one.
    """

    phase: str
    epoch: int
    epochs: int | None
    batch: int
    batches: int | None
    step: int
    samples: Count
    lr: float | Tensor | None
    seconds: float
    wall_time: float
    sums: PhaseState
    values: dict[str, float] | None = None
    loss_step: float | None = None
    more: dict[str, float] = field(default_factory=dict)


def evaluate(
    statistics: StatisticSet, rows: Sequence[StatisticsRow], reduce: Reduce | None = None, task: str = "auto"
) -> None:
    """Give every row that has none its values, with one transfer from the device for those that are laid out alike.

    Args:
        statistics: What to compute.
        rows: Any rows of phases that were recorded with ``statistics``.
        reduce: Adds sums up over the ranks; ``None`` for one process, or for what this process alone has seen.
        task: What the user said that the targets are.

    Raises:
        ValueError: If what a phase has shown does not say how its targets are to be read.
    """
    group: list[StatisticsRow] = []
    for row in rows:
        if row.values is None:
            if group and (row.sums.layout != group[0].sums.layout or row.sums.reading != group[0].sums.reading):
                _evaluate_alike(statistics, group, reduce, task)
                group = []
            group.append(row)
    if group:
        _evaluate_alike(statistics, group, reduce, task)


def _evaluate_alike(statistics: StatisticSet, rows: Sequence[StatisticsRow], reduce: Reduce | None, task: str) -> None:
    layout, reading = rows[0].sums.layout, rows[0].sums.reading
    table, others = _fetch(rows, reduce)
    columns = dict(zip(_LEADING, table.unbind(1)[: len(_LEADING)], strict=True))
    columns |= named(table[:, len(_LEADING) :], layout)
    columns["batches"] = columns["batches"] + columns["weight"]
    columns["samples"] = columns["samples"] + columns["counted"]
    if reading not in COUNTED_ONCE and reading:
        shown = {name: float(columns[name][-1]) for name in (*EVIDENCE, "right_of_5") if name in columns}
        why = contradiction(shown, reading, task)
        if why:
            raise ValueError(why)
        columns = decided(columns, reading, task)
    numbers: dict[str, list[float]] = {}
    for statistic in statistics.statistics:
        if layout or not statistic.counts:
            formula = statistic.formula
            values = columns[formula[0]] / columns[formula[1]] if isinstance(formula, tuple) else formula(columns)
            numbers[statistic.name] = values.tolist()
    _fill(statistics, rows, columns, numbers, others)


def _fill(
    statistics: StatisticSet,
    rows: Sequence[StatisticsRow],
    columns: Columns,
    numbers: dict[str, list[float]],
    others: list[float],
) -> None:
    host = columns["batches"], columns["samples"], columns["fresh"], columns["newest"]
    rest = iter(others)
    for row, (batches, samples, fresh, newest), *mine in zip(
        rows, torch.stack(host, 1).tolist(), *numbers.values(), strict=True
    ):
        found = dict(zip(numbers, mine, strict=True))
        if not batches:
            for name in found.keys() - statistics.of_labels:
                del found[name]
        more = dict(zip(row.sums.others, rest, strict=False))
        if more:
            found |= more
            found = {name: found[name] for name in statistics.names if name in found} | found
        row.values = found | row.more
        row.samples = int(samples)
        row.loss_step = newest / fresh if fresh else None
        row.lr = next(rest) if isinstance(row.lr, Tensor) else row.lr


def _fetch(rows: Sequence[StatisticsRow], reduce: Reduce | None) -> tuple[Tensor, list[float]]:
    """Bring everything to the host: a table of sums with a row for each, and the numbers that are no sums."""
    states = [row.sums for row in rows]
    counts = [state.counts for state in states if state.counts is not None]
    # a loss that is a plain number, or is not there, lies on the host
    sums = [*counts, *[state.loss for state in states]]
    device = next((tensor.device for tensor in sums if not tensor.is_cpu), sums[0].device)
    dtype = WIDEST.get(device.type, torch.float64)
    waiting = [row.samples if isinstance(row.samples, Tensor) else None for row in rows]
    known = [
        (state.batches, 0 if isinstance(row.samples, Tensor) else row.samples, state.newest is not None)
        for row, state in zip(rows, states, strict=True)
    ]
    parts = [[getattr(state, name) for state in states] for name in ("loss", "newest", "weight")]
    table = torch.stack([_column(values, device, dtype) for values in (*parts, waiting)], 1)
    if counts:
        table = torch.cat([table, torch.stack(counts).to(device, dtype)], 1)
    others = [value for row in rows for value in _others(row)]
    rest = _column(others, device, dtype)
    if reduce is not None:
        table = reduce(torch.cat([torch.tensor(known, dtype=dtype).to(device), table], 1))
        return table.to("cpu", torch.float64), rest.tolist()
    moved = torch.cat([table.reshape(-1), rest]).to("cpu", torch.float64)
    host = torch.tensor(known, dtype=torch.float64)
    return torch.cat([host, moved[: table.numel()].reshape(table.shape)], 1), moved[table.numel() :].tolist()


def _others(row: StatisticsRow) -> list[Tensor]:
    """Return the numbers of a row that are no sums."""
    others = list(row.sums.others.values())
    return [*others, row.lr] if isinstance(row.lr, Tensor) else others


def _column(values: Sequence[Tensor | None], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers that may lie anywhere as one tensor, with 0 for those that are not there."""
    if all(value is None for value in values):
        return torch.zeros(len(values), device=device, dtype=dtype)
    zero = torch.zeros((), device=device, dtype=dtype)
    place, numbers = zero.get_device(), []
    for value in values:
        number = zero if value is None else value
        if number.dtype is not dtype or number.get_device() != place or number.dim() or number.requires_grad:
            number = number.detach().reshape(()).to(device, dtype)
        numbers.append(number)
    return torch.stack(numbers)


class RowReader(Protocol):
    """What rows are handed to."""

    flush_seconds: float

    def write(self, rows: Sequence[StatisticsRow]) -> None:
        """Take rows, in order, all of them evaluated."""

    def phase_end(self, row: StatisticsRow) -> None:
        """Learn that a phase ended with ``row``, which has been written."""


class RowBuffer:
    """Holds rows back until they are due, then evaluates them together and hands them to the readers.

    The newest row stays until its phase goes on or ends. Rows are due when the readers' ``flush_seconds`` have passed
    or 512 wait. With several ranks they are due after a number of rows, because all ranks must add up at the same
    moment; rank 0 fits that number to ``flush_seconds``, and tells it to the others in the sum that is taken anyway.

    Args:
        statistics: What the rows are evaluated to.
        task: What the targets are.
    """

    def __init__(self, statistics: StatisticSet, task: str = "auto") -> None:
        self.statistics, self.task = statistics, task
        self.readers: list[RowReader] = []
        self.reduce: Reduce | None = None
        self.chief = True
        self._waiting: list[StatisticsRow] = []
        self._last_flush = time.monotonic()
        self._most_rows = _MOST_ROWS
        # only with several ranks
        self._due_rows = 1

    def add(self, row: StatisticsRow) -> None:
        """Take a row, and hand out those before it if they are due."""
        waiting = self._waiting
        if not self.readers:
            self._waiting = [row]
            return
        if self.reduce is not None:
            due = len(waiting) >= self._due_rows
        else:
            due = len(waiting) >= self._most_rows or time.monotonic() - self._last_flush >= self._patience()
        # first: a reader may fail
        waiting.append(row)
        if due:
            self.flush(keep=1)

    def flush(self, *, keep: int = 0, together: bool = True) -> None:
        """Evaluate and hand out rows; to every reader, also when one of them fails.

        Args:
            keep: How many of the newest stay.
            together: Whether all ranks do so now. After an exception they do not, and the last rows hold what rank 0
                has seen.
        """
        end = len(self._waiting) - keep
        if end <= 0:
            return
        rows = self._waiting[:end]
        reduce = functools.partial(self._reduce_and_agree, self.reduce) if together and self.reduce else None
        evaluate(self.statistics, rows, reduce, self.task)
        counts = rows[-1].sums.counts
        self._most_rows = _MOST_ROWS if counts is None else min(_MOST_ROWS, max(1, _MOST_BYTES // counts.nbytes))
        del self._waiting[:end]
        self._last_flush = time.monotonic()
        with contextlib.ExitStack() as all_of_them:
            for reader in reversed(self.readers):
                all_of_them.callback(reader.write, rows)

    def evaluate(self, rows: Sequence[StatisticsRow], reduce: Reduce | None) -> None:
        """Give rows their values."""
        evaluate(self.statistics, rows, reduce, self.task)

    def _patience(self) -> float:
        return min(map(_FLUSH_SECONDS, self.readers), default=0.0)

    def _reduce_and_agree(self, reduce: Reduce, table: Tensor) -> Tensor:
        proposal = self._proposal() if self.chief else 0
        summed = reduce(torch.cat([table.reshape(-1), table.new_tensor([proposal])]))
        self._due_rows = max(1, int(summed[-1]))
        return summed[:-1].reshape(table.shape)

    def _proposal(self) -> int:
        patience = self._patience()
        per_row = (time.monotonic() - self._last_flush) / max(1, len(self._waiting))
        fitting = int(patience / per_row) if per_row > 0 else self._most_rows
        return max(1, min(fitting, 2 * self._due_rows, self._most_rows))
