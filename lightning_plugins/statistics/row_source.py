"""What the callbacks that write statistics have in common: where the rows come from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from lightning_plugins.core.lightning import Callback, LightningModule, Trainer, rank_zero_info
from lightning_plugins.statistics.logged_values import LoggedMetricsRecorder
from lightning_plugins.statistics.recorder import StatisticsRecorder, find_recorder
from lightning_plugins.statistics.row_buffer import Row


class StatisticsReader(Callback):
    """Gets the rows of the Trainer's :class:`StatisticsRecorder`, wherever either stands in the list of callbacks.

    Without one it brings a recorder of its own, of the loss and of what the module logs, for the time of the fit.
    """

    flush_seconds = 5.0

    def __init__(self) -> None:
        self._recorder: StatisticsRecorder | None = None
        self._own: StatisticsRecorder | None = None
        self._brought: StatisticsRecorder | None = None  # our own, while it is in the Trainer
        self._writes = False  # this rank, in this fit
        self._restored: dict[str, Any] | None = None

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Take rows."""

    @abstractmethod
    def phase_end(self, row: Row) -> None:
        """Learn that a phase ended with ``row``."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left and let go of the files."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the recorder."""
        if stage != "fit":
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._recorder = find_recorder(trainer)
        if self._recorder is None:
            self._own = self._own or LoggedMetricsRecorder()
            self._recorder = self._brought = self._own
            callbacks.insert(callbacks.index(self) + 1, self._brought)  # before those that must stay last
        self._recorder.subscribe(self)
        self._writes = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left."""
        if self._recorder is not None:
            self._recorder.flush()
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what is left, whatever happened."""
        if self._recorder is not None:
            self._recorder.on_exception(trainer, pl_module, exception)
        self._detach(trainer)
        self.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the recorder, and take the one that was brought out of the Trainer again."""
        if self._brought is not None:
            self._brought.teardown(trainer, pl_module, stage)
        self._detach(trainer)

    def _detach(self, trainer: Trainer) -> None:
        if self._recorder is not None:
            self._recorder.unsubscribe(self)
            self._recorder = None
        if self._brought is not None:
            trainer.callbacks.remove(self._brought)  # type: ignore[attr-defined]
            self._brought = None

    def _tell_late_start(self, trainer: Trainer, *, begun: bool) -> None:
        """Say so in one line when a resumed run's checkpoint knows nothing of this callback."""
        if trainer.global_step and self._restored is None and not begun:
            rank_zero_info(
                f"{type(self).__name__}: the checkpoint has no state of it, so it begins at step {trainer.global_step}."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the place until the fit begins."""
        self._restored = state_dict
