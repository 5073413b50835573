"""The base of the callbacks that record a run: it hands the Trainer's hooks to a recording."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_plugins.core.callback import Callback
from lightning_plugins.core.lightning import LightningModule, Trainer
from lightning_plugins.statistics.recording import Recording
from lightning_plugins.statistics.rows import TRAIN, VALIDATION


class RecordingCallback(Callback):
    """Hands the Trainer's hooks to a :class:`Recording`, where it is this callback's to record."""

    def __init__(self, **identity: Any) -> None:
        super().__init__(**identity)
        told = ", ".join(f"{name}={value!r}" for name, value in identity.items())
        self._key_of_0_1 = f"{type(self).__qualname__}{{{told}}}"
        self._records: Recording | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the state of release 0.1.0, which has another key."""
        states = checkpoint.get("callbacks") or {}
        if self._key_of_0_1 in states and self.state_key not in states:
            self.load_state_dict(states[self._key_of_0_1])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the validation's statistics."""
        if self._records is not None:
            self._records.validation_start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the run's clock and take up what a checkpoint brought."""
        if self._records is not None:
            self._records.train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's statistics; a resume in mid-epoch does not come here and goes on."""
        if self._records is not None:
            self._records.train_epoch_start()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Read the rate that this batch is trained with, before schedulers move it, and the loss's divisor."""
        if self._records is not None:
            self._records.before_backward(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch, and end the phase with the epoch's last one."""
        if self._records is not None:
            self._records.train_batch(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch."""
        if self._records is not None:
            self._records.validation_batch(trainer, outputs, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the validation's statistics, before anything that monitors them looks."""
        if self._records is not None and not trainer.sanity_checking:
            self._records.end_phase(trainer, VALIDATION)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the training phase, if its last batch did not show itself as such."""
        if self._records is not None:
            self._records.end_phase(trainer, TRAIN)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand out what is left and stop the run's clock."""
        if self._records is not None:
            self._records.train_end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the sums of all ranks in one, and undo everything."""
        if self._records is not None and stage == "fit":
            self._records.gather()
        super().teardown(trainer, pl_module, stage)

    def release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand out what is left, and take the hook off the module."""
        if self._records is not None:
            self._records.release()
