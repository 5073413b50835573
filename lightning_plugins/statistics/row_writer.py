"""What the callbacks that write rows of statistics have in common: where the rows come from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from lightning_plugins.core.callback import Stage
from lightning_plugins.core.lightning import LightningModule, Trainer, rank_zero_info
from lightning_plugins.core.step_outputs import StepSources
from lightning_plugins.core.writable import leaves_files
from lightning_plugins.statistics.metric_names import statistic_set
from lightning_plugins.statistics.recorder import StatisticsRecorder
from lightning_plugins.statistics.recording import Recording
from lightning_plugins.statistics.recording_callback import RecordingCallback
from lightning_plugins.statistics.rows import StatisticsRow
from lightning_plugins.statistics.saved_states import checked_recording


class RowWriter(RecordingCallback):
    """Gets the rows of the Trainer's :class:`StatisticsRecorder`.

    Without one, the first of several such callbacks records for all of them: the loss, and what the module logs.
    """

    stage: ClassVar[Stage] = Stage.OUTPUT
    flush_seconds = 5.0
    needs_samples = False

    def __init__(self, **identity: Any) -> None:
        super().__init__(**identity)
        # whose rows are read
        self._recording: Recording | None = None
        # that of this callback, where it has had to record
        self._own: Recording | None = None
        # this rank, in this fit
        self._writes = False
        self._restored: dict[str, Any] | None = None

    @abstractmethod
    def write(self, rows: Sequence[StatisticsRow]) -> None:
        """Take rows, in order."""

    @abstractmethod
    def phase_end(self, row: StatisticsRow) -> None:
        """Learn that a phase ended with ``row``."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left and let go of the files."""

    # -- hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find what records the run."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        recorders = [found for found in callbacks if isinstance(found, StatisticsRecorder)]
        first = next(iter(recorders)) if recorders else next(c for c in callbacks if isinstance(c, RowWriter))
        self._recording = first.recording
        self._recording.subscribe(self)
        self._writes = trainer.is_global_zero and leaves_files(trainer)
        if first is self:
            self._records = self._own
            self._recording.setup(trainer, pl_module, stage)

    @property
    def recording(self) -> Recording:
        """What this callback records where the Trainer has no recorder: the loss, and what the module logs."""
        if self._own is None:
            self._own = Recording(statistic_set(()), StepSources(None, None, type(self).__name__))
        return self._own

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left."""
        super().on_train_end(trainer, pl_module)
        self.close()

    def release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left, and leave the recorder."""
        super().release(trainer, pl_module)
        if self._recording is not None:
            self._recording.unsubscribe(self)
        self._recording = self._records = None
        self.close()

    # -- state

    def get_state(self) -> dict[str, Any]:
        """Return the place in the files, and the sums of what this callback itself records."""
        if self._restored is not None:
            return self._restored
        if self._recording is not None:
            self._recording.rows.flush()
        state = self.place()
        return state if self._own is None else {**state, **self._own.state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Keep the place until the fit begins."""
        self._restored = state
        if "train" in state:
            self.recording.load(checked_recording(type(self).__name__, state))

    @abstractmethod
    def place(self) -> dict[str, Any]:
        """Return what is to be found again in the files."""

    def _tell_late_start(self, trainer: Trainer, *, begun: bool) -> None:
        """Say so in one line when a resumed run's checkpoint knows nothing of this callback."""
        if trainer.global_step and self._restored is None and not begun:
            rank_zero_info(
                f"{type(self).__name__}: the checkpoint has no state of it, so it begins at step {trainer.global_step}."
            )
