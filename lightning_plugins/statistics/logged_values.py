"""The recorder of a Trainer that has none: the loss, and what the module logs."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from lightning_plugins.core.lightning import Trainer, logged_by_module
from lightning_plugins.statistics.publishing import Publisher
from lightning_plugins.statistics.recorder import StatisticsRecorder
from lightning_plugins.statistics.row_buffer import TRAIN, VALIDATION, Row
from lightning_plugins.statistics.running import PhaseSums


class _Silent(Publisher):
    """Publishes nothing."""

    def running(self, trainer: Trainer, row: Row, sums: PhaseSums) -> None:
        pass

    def finished(self, trainer: Trainer, row: Row) -> None:
        pass


class LoggedMetricsRecorder(StatisticsRecorder):
    """Stands in where a Trainer has loggers of ours and no recorder: the loss, and whatever the module logs.

    Nobody asked for it, so it publishes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._publisher = _Silent(self._ledger, log=False)

    def _can_use(self, outputs: Any) -> bool:
        return True

    def _note(self, trainer: Trainer, phase: str, batch: int, batches: int | None) -> None:
        super()._note(trainer, phase, batch, batches)
        if phase == TRAIN:
            self._take(self._latest[phase], logged_by_module(trainer, on_step=True))

    def _finished(self, trainer: Trainer, row: Row) -> Row:
        logged = logged_by_module(trainer, on_step=False)
        if row.phase == VALIDATION:  # what is logged per epoch stands in the validation's last row
            self._take(row, logged)
            return row
        snapshot = dataclasses.replace(row.snapshot, extras=dict(row.snapshot.extras))
        finished = dataclasses.replace(row, snapshot=snapshot)
        self._take(finished, logged)
        return finished

    @staticmethod
    def _take(row: Row, logged: dict[str, Tensor]) -> None:
        row.snapshot.extras.update({name: value for name, value in logged.items() if name != "loss"})
        row.values = None
