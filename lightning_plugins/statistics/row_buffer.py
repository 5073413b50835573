"""Rows of statistics: kept on the device while nobody reads them, turned into numbers together, then handed out.

Nothing here knows a Trainer or a file.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_plugins.statistics.running import Columns, Snapshot, StatisticSet

Reduce = Callable[[Tensor], Tensor]
"""Adds a tensor up over all ranks; every rank must call it at the same moment."""

TRAIN, VALIDATION = "train", "validation"

_MOST_ROWS = 512  # a small tensor holds 512 bytes of a GPU's memory: half a megabyte for loss and counts


@dataclass(slots=True)
class Row:
    """What is known after one batch.

    Args:
        phase: ``"train"`` or ``"validation"``.
        epoch: The epoch's number, from 1.
        epochs: How many epochs the run has, ``None`` when it has no end.
        batch: The batch's number in its phase, from 1.
        batches: How many batches the phase has, ``None`` when nobody knows.
        step: Optimizer steps taken so far.
        samples: Training samples seen so far, by all ranks once the row is evaluated.
        lr: Learning rate that the batch was trained with, ``None`` for validation; a tensor stays on its device.
        seconds: Since the run began, without the time between a kill and the resume.
        wall_time: The same moment in seconds since 1970.
        snapshot: The phase's sums after the batch.
        values: Name -> number, once somebody has read the row. A statistic that is missing was not there to compute.
    """

    phase: str
    epoch: int
    epochs: int | None
    batch: int
    batches: int | None
    step: int
    samples: float
    lr: float | Tensor | None
    seconds: float
    wall_time: float
    snapshot: Snapshot
    values: dict[str, float] | None = field(default=None)


class Reader(Protocol):
    """Whoever wants the rows."""

    flush_seconds: float

    def write(self, rows: Sequence[Row]) -> None:
        """Take rows, in order, all of them evaluated."""

    def phase_end(self, row: Row) -> None:
        """Learn that a phase ended with ``row``, which has been written."""


def evaluate(statistics: StatisticSet, rows: Sequence[Row], reduce: Reduce | None = None) -> None:
    """Give every row that has none its values, with one transfer from the device for all of them.

    Args:
        statistics: What to compute.
        rows: Any rows of phases that were recorded with ``statistics``.
        reduce: Adds sums up over the ranks; ``None`` for one process, or for what this process alone has seen.
    """
    rows = [row for row in rows if row.values is None]
    if not rows:
        return
    extras = [value for row in rows for value in row.snapshot.extras.values()]
    rates = [row.lr for row in rows if isinstance(row.lr, Tensor)]
    table, others = _fetch(rows, [*extras, *rates], reduce)
    columns = dict(zip(("batches", "samples", "loss", *statistics.terms), table.unbind(1), strict=True))
    _fill(statistics, rows, columns, iter(others))


def _fetch(rows: Sequence[Row], others: list[Tensor], reduce: Reduce | None) -> tuple[Tensor, list[float]]:
    """Bring everything to the host: a table of batches, samples and sums by row, and the numbers that are no sums."""
    known = torch.tensor([(row.snapshot.batches, row.samples) for row in rows], dtype=torch.float64)
    losses = [row.snapshot.loss for row in rows]
    counts = [row.snapshot.counts for row in rows if row.snapshot.counts is not None]
    # a loss that is a plain number, or is not there, lies on the host
    lead = counts[-1] if counts else next((loss for loss in reversed(losses) if loss.device.type != "cpu"), losses[-1])
    device, dtype = lead.device, lead.dtype
    sums = _joined(losses, device, dtype)[0].unsqueeze(1)
    if counts:
        sums = torch.cat([sums, torch.stack(counts)], 1)
    if reduce is None:
        moved = torch.cat([sums.reshape(-1), *_joined(others, device, dtype)]).to("cpu", torch.float64)
        return torch.cat([known, moved[: sums.numel()].reshape(sums.shape)], 1), moved[sums.numel() :].tolist()
    table = reduce(torch.cat([known.to(device, dtype), sums], 1))
    rest = [part for column in _joined(others, device, dtype) for part in column.tolist()]
    return table.to("cpu", torch.float64), rest


def _joined(values: list[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [torch.stack([value.detach().reshape(()).to(device, dtype) for value in values])] if values else []


def _fill(statistics: StatisticSet, rows: Sequence[Row], columns: Columns, others: Any) -> None:
    by_name = {name: values.tolist() for name, values in statistics.values(columns).items()}
    samples, batches_so_far = columns["samples"].tolist(), columns["batches"].tolist()
    for row, counted, batches, numbers in zip(
        rows, samples, batches_so_far, zip(*by_name.values(), strict=True), strict=True
    ):
        row.values = dict(zip(by_name, numbers, strict=True))
        row.samples = int(counted)
        if not batches:
            for statistic in statistics.statistics:
                if not statistic.terms:
                    del row.values[statistic.name]
        if row.snapshot.extras:
            found = row.values | {name: next(others) for name in row.snapshot.extras}
            row.values = {name: found[name] for name in statistics.names if name in found} | found
    for row in rows:
        if isinstance(row.lr, Tensor):
            row.lr = next(others)


class Ledger:
    """Holds rows back until they are due, then evaluates them together and hands them to the readers.

    The newest row stays until its phase goes on or ends. Rows are due when the readers' ``flush_seconds`` have passed
    or 512 wait. With several ranks they are due after a number of rows, because all ranks must add up at the same
    moment; rank 0 fits that number to ``flush_seconds``, and tells it to the others in the sum that is taken anyway.

    Args:
        statistics: What the rows are evaluated to.
    """

    def __init__(self, statistics: StatisticSet) -> None:
        self.statistics = statistics
        self.readers: list[Reader] = []
        self.reduce: Reduce | None = None
        self.chief = True
        self._waiting: list[Row] = []
        self._last_flush = time.monotonic()
        self._due_rows = 1  # only with several ranks

    def add(self, row: Row) -> None:
        """Take a row, and hand out those before it if they are due."""
        if not self.readers:
            self._waiting = [row]
            return
        due = self._is_due()
        self._waiting.append(row)  # first: a reader may fail
        if due:
            self.flush(keep=1)

    def end_phase(self, row: Row) -> None:
        """Tell the readers that a phase ended with ``row``; everything has been handed out."""
        for reader in self.readers:
            reader.phase_end(row)

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
        evaluate(self.statistics, rows, reduce)
        del self._waiting[:end]
        self._last_flush = time.monotonic()
        with contextlib.ExitStack() as all_of_them:
            for reader in reversed(self.readers):
                all_of_them.callback(reader.write, rows)

    def _is_due(self) -> bool:
        if self.reduce is not None:
            return len(self._waiting) >= self._due_rows
        patience = min(reader.flush_seconds for reader in self.readers)
        return len(self._waiting) >= _MOST_ROWS or time.monotonic() - self._last_flush >= patience

    def _reduce_and_agree(self, reduce: Reduce, table: Tensor) -> Tensor:
        proposal = self._proposal() if self.chief else 0
        summed = reduce(torch.cat([table.reshape(-1), table.new_tensor([proposal])]))
        self._due_rows = max(1, int(summed[-1]))
        return summed[:-1].reshape(table.shape)

    def _proposal(self) -> int:
        patience = min((reader.flush_seconds for reader in self.readers), default=0.0)
        per_row = (time.monotonic() - self._last_flush) / max(1, len(self._waiting))
        fitting = int(patience / per_row) if per_row > 0 else _MOST_ROWS
        return max(1, min(fitting, 2 * self._due_rows, _MOST_ROWS))
