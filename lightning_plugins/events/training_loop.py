"""What a function of events sees of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from lightning_plugins.core.lightning import LightningModule, Trainer, torch_optimizers
from lightning_plugins.core.step_outputs import loss_of, predictions_of


class TrainingLoop:
    """The state of a fit, which functions of events are given.

    Args:
        trainer: The Trainer, in a fit.

    Attributes:
        trainer: The Trainer.
        batch_index: The batch's index in its phase, from 0, with several validation loaders in its loader; ``None``
            in a phase before its first batch.
        batch_count: How many batches the phase has, or the loader with several; ``None`` where that is unknown.
        last_input: The batch's first item, or the whole batch if it is no tuple or list.
        last_target: What the step returned as ``"target"``, else the batch's second item, else its ``"target"`` if it
            is a dict; ``None`` if there is none.
        last_output: What the step returned as ``"logits"`` or ``"preds"``, else what the module's ``forward`` returned
            last; without a graph. ``None`` until the batch has one.
        last_loss: The batch's loss as the module computed it, not divided by ``accumulate_grad_batches``: a tensor on
            the device, without a graph. ``None`` until the batch has one; in manual optimization that is at its end.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.batch_index: int | None = None
        self.batch_count: int | None = None
        self.last_input: Any = None
        self.last_target: Any = None
        self.last_output: Any = None
        self.last_loss: Tensor | None = None
        self._recorder = next((found for found in trainer.callbacks if hasattr(found, "last_statistics")), None)  # type: ignore[attr-defined]

    @property
    def model(self) -> LightningModule:
        """The module that is trained."""
        return self.trainer.lightning_module

    @property
    def optimizers(self) -> list[Optimizer]:
        """The run's optimizers, without Lightning's wrappers."""
        return torch_optimizers(self.trainer)

    @property
    def epoch_index(self) -> int:
        """The epoch, from 0."""
        return self.trainer.current_epoch

    @property
    def epoch_count(self) -> int | None:
        """How many epochs the fit has; ``None`` without such a limit."""
        epochs = self.trainer.max_epochs
        return None if epochs is None or epochs < 0 else epochs

    @property
    def last_statistics(self) -> dict[str, float]:
        """The phase's running statistics, from a ``StatisticsRecorder`` in the Trainer, else what the module logged.

        Each access waits for the device. With several processes the values of a phase that runs are this one's.
        """
        if self._recorder is not None:
            return dict(self._recorder.last_statistics)
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def begin_phase(self, counts: Sequence[float]) -> None:
        """Begin a phase whose loaders have ``counts`` batches."""
        self.batch_index = None
        self.batch_count = _whole(counts[0]) if len(counts) == 1 else None

    def begin_batch(self, batch: Any, index: int, count: float) -> None:
        """Begin a batch; what the one before has left is not this one's."""
        self.batch_index, self.batch_count = index, _whole(count)
        self.last_output = self.last_loss = None
        if isinstance(batch, (tuple, list)):
            self.last_input = batch[0] if batch else None
            self.last_target = batch[1] if len(batch) > 1 else None
        else:
            self.last_input = batch
            self.last_target = batch.get("target") if isinstance(batch, Mapping) else None

    def forward_done(self, output: Any) -> bool:
        """Take what ``forward`` returned, and tell whether it was a prediction.

        Under DistributedDataParallel the step itself runs as the module's forward: a loss is no prediction.
        """
        a_loss = output.dim() == 0 if isinstance(output, Tensor) else isinstance(output, Mapping) and "loss" in output
        found = predictions_of(output, None if a_loss else output)
        if found is None:
            return False
        self.last_output = _detached(found)
        return True

    def step_done(self, outputs: Any, undivide: int = 1) -> None:
        """Take what a step returned.

        Args:
            outputs: Its result.
            undivide: What Lightning has divided the loss by.
        """
        loss = loss_of(outputs)
        if loss is not None:
            self.last_loss = loss * undivide if undivide > 1 else loss
        if isinstance(outputs, Mapping):
            self.last_target = outputs.get("target", self.last_target)
        self.last_output = _detached(predictions_of(outputs, self.last_output))


def _detached(value: Any) -> Any:
    return apply_to_collection(value, Tensor, Tensor.detach)


def _whole(number: float) -> int | None:
    return None if math.isinf(number) else int(number)
