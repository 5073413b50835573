"""Shows statistics where a Trainer looks: its callback metrics, its progress bar, its own loggers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch

from lightning_plugins.core.lightning import Trainer
from lightning_plugins.statistics.rows import TRAIN, RowBuffer, StatisticsRow


class Display(Protocol):
    """Where a Trainer shows statistics."""

    @property
    def is_drawn(self) -> bool:
        """Whether anything is drawn or logged while a phase runs."""

    def start(self, trainer: Trainer) -> None:
        """Begin a fit."""

    def stop(self) -> None:
        """End it."""

    def running(self, trainer: Trainer, row: StatisticsRow) -> None:
        """Show the training phase so far."""

    def finished(self, trainer: Trainer, row: StatisticsRow) -> None:
        """Show what a phase has ended with."""


class TrainerMetrics:
    """Shows a recorder's rows.

    Args:
        rows: Knows how rows are evaluated, and whether there are other ranks.
        progress_bar: The names that the progress bar shows.
        log: Whether the Trainer's own loggers get the values.
    """

    def __init__(self, rows: RowBuffer, *, progress_bar: Collection[str], log: bool) -> None:
        self._rows = rows
        self._on_bar = progress_bar
        self._log = log
        self._names = frozenset(rows.statistics.names)
        self._bar: Any = None
        self._next_redraw = 0.0
        self._logged_step = -1

    def start(self, trainer: Trainer) -> None:
        """Look up the progress bar."""
        self._bar = trainer.progress_bar_callback if self._on_bar else None
        self._next_redraw = 0.0

    def stop(self) -> None:
        """Let go of it."""
        self._bar = None

    @property
    def is_drawn(self) -> bool:
        """Whether anything is drawn or logged while a phase runs."""
        return self._log or self._bar is not None

    def running(self, trainer: Trainer, row: StatisticsRow) -> None:
        """Show the training phase so far, where it is drawn."""
        if self._bar is not None and self._redraws(row):
            # of several ranks, this one's own
            seen = row if self._rows.reduce is None else dataclasses.replace(row)
            self._rows.evaluate([seen], None)
            self._show(trainer, "", seen.values or {})
        if self._log and row.step != self._logged_step:
            self._logged_step = row.step
            # set by the logger connector
            every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
            if row.step % every == 0:
                self._rows.evaluate([row], self._rows.reduce)
                self._hand_to_loggers(trainer, "train_", row)

    def finished(self, trainer: Trainer, row: StatisticsRow) -> None:
        """Show a phase that has ended with ``row``."""
        prefix = "train_" if row.phase == TRAIN else "test_" if trainer.testing else "val_"
        values = self._own(row)
        tensors = {f"{prefix}{name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
        trainer.callback_metrics.update(tensors)
        self._show(trainer, "" if row.phase == TRAIN else prefix, values)
        if self._log:
            self._hand_to_loggers(trainer, prefix, row)

    def _own(self, row: StatisticsRow) -> dict[str, float]:
        """Return the statistics of a row, of each validation loader too, without what the module has logged."""
        names = self._names
        return {name: value for name, value in (row.values or {}).items() if name in names or name in row.more}

    def _redraws(self, row: StatisticsRow) -> bool:
        """Whether the progress bar shows new numbers after this batch."""
        rate = getattr(self._bar, "refresh_rate", 0)
        if not rate or not getattr(self._bar, "is_enabled", False):
            return False
        # TQDM, and Rich in Lightning 2.6.0: batches
        if isinstance(rate, int) and hasattr(self._bar, "_should_update"):
            return row.batch % rate == 0 or row.batch == row.batches
        # Rich's is a number of times per second
        if row.seconds < self._next_redraw:
            return False
        self._next_redraw = row.seconds + 1 / rate
        return True

    def _show(self, trainer: Trainer, prefix: str, values: Mapping[str, float]) -> None:
        if trainer.progress_bar_callback is not None:
            shown = {f"{prefix}{name}": values[name] for name in self._on_bar if name in values}
            trainer.progress_bar_metrics.update(shown)

    def _hand_to_loggers(self, trainer: Trainer, prefix: str, row: StatisticsRow) -> None:
        metrics = {f"{prefix}{name}": value for name, value in self._own(row).items()}
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "epoch": float(row.epoch - 1)}, step=row.step)
            logger.save()
