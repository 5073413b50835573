"""Where a Trainer shows statistics: its callback metrics, its progress bar, its own loggers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from lightning_plugins.core.lightning import Trainer
from lightning_plugins.statistics.row_buffer import TRAIN, Ledger, Row, evaluate
from lightning_plugins.statistics.running import PhaseSums


class Publisher:
    """Shows a recorder's rows where the Trainer looks.

    Args:
        ledger: Knows how rows are evaluated, and whether there are other ranks.
        log: Whether the Trainer's own loggers get the values.
    """

    def __init__(self, ledger: Ledger, *, log: bool) -> None:
        self._ledger = ledger
        self._log = log
        self._names = {name: f"train_{name}" for name in ledger.statistics.names}
        self._metrics: dict[str, Any] | None = None
        self._bar: Any = None
        self._next_redraw = 0.0
        self._logged_step = -1

    def start(self, trainer: Trainer) -> None:
        """Look up what is written to after every batch; asking the Trainer each time would compute all it has."""
        self._metrics = trainer.callback_metrics
        self._bar = trainer.progress_bar_callback
        self._next_redraw = 0.0

    def stop(self) -> None:
        """Let go of it."""
        self._metrics = self._bar = None

    def running(self, trainer: Trainer, row: Row, sums: PhaseSums) -> None:
        """Publish the training phase so far: tensors that stay on the device, and numbers where somebody looks."""
        alone = self._ledger.reduce is None
        if alone and self._metrics is not None:
            for name, value in sums.running_values().items():
                self._metrics[self._names[name]] = value
            for name, value in row.snapshot.extras.items():
                self._metrics[f"train_{name}"] = value
        if self._bar is not None and self._redraws(row):
            seen = row if alone else dataclasses.replace(row)  # of several ranks, this one's own
            evaluate(self._ledger.statistics, [seen])
            _show(trainer, "train", seen.values or {})
        if self._log and row.step != self._logged_step:
            self._logged_step = row.step
            every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the logger connector
            if row.step % every == 0:
                evaluate(self._ledger.statistics, [row], self._ledger.reduce)
                _hand_to_loggers(trainer, "train", row)

    def finished(self, trainer: Trainer, row: Row) -> None:
        """Publish a phase that has ended with ``row``."""
        prefix = "train" if row.phase == TRAIN else "test" if trainer.testing else "val"
        values = row.values or {}
        tensors = {f"{prefix}_{name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
        trainer.callback_metrics.update(tensors)
        _show(trainer, prefix, values)
        if self._log:
            _hand_to_loggers(trainer, prefix, row)

    def _redraws(self, row: Row) -> bool:
        """Whether the progress bar shows new numbers after this batch."""
        rate = getattr(self._bar, "refresh_rate", 0)
        if not rate or not getattr(self._bar, "is_enabled", False):
            return False
        if isinstance(rate, int) and hasattr(self._bar, "_should_update"):  # TQDM, and Rich in Lightning 2.6.0: batches
            return row.batch % rate == 0 or row.batch == row.batches
        if row.seconds < self._next_redraw:  # Rich's is a number of times per second
            return False
        self._next_redraw = row.seconds + 1 / rate
        return True


def _show(trainer: Trainer, prefix: str, values: Mapping[str, float]) -> None:
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_metrics.update({f"{prefix}_{name}": value for name, value in values.items()})


def _hand_to_loggers(trainer: Trainer, prefix: str, row: Row) -> None:
    metrics = {f"{prefix}_{name}": value for name, value in (row.values or {}).items()}
    for logger in trainer.loggers:
        logger.log_metrics({**metrics, "epoch": float(row.epoch - 1)}, step=row.step)
        logger.save()
