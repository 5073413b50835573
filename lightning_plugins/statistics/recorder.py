"""The callback that keeps the running statistics of a run."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_plugins.core.lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    cancelling_callbacks,
    rank_zero_info,
    sum_over_ranks,
)
from lightning_plugins.core.step_outputs import StepSources, batch_size
from lightning_plugins.core.validation import one_of, true_or_false
from lightning_plugins.statistics.publishing import Publisher
from lightning_plugins.statistics.row_buffer import TRAIN, VALIDATION, Ledger, Reader, Row, evaluate
from lightning_plugins.statistics.running import PhaseSums, statistic_set

_VERSION = 1


class StatisticsRecorder(Callback):
    """Running loss and metrics of every phase, exact and without waiting for the device.

    ``loss`` is the mean of the batches' losses since the phase began (training since the epoch began, validation
    since it started), as the module computed them, not divided by ``accumulate_grad_batches``. The metrics run over
    the same stretch: ``accuracy`` and ``top5_accuracy`` are shares of labels, ``matthews_correlation_coefficient`` is
    for two classes, ``perplexity`` is exp(loss). Batches of the sanity check and batches without a result (the step
    returned ``None``) do not count. The card has the definitions, ties and degenerate cases.

    When: sums grow in ``on_train_batch_end`` and ``on_validation_batch_end`` and begin anew in
    ``on_train_epoch_start`` and ``on_validation_start``.

    Published: ``trainer.callback_metrics`` has ``train_<name>`` after every training batch and ``val_<name>`` from
    ``on_validation_epoch_end`` on (``test_<name>`` after a test), for ModelCheckpoint and EarlyStopping; what the
    module itself logs under such a name stays the module's. The progress bar shows them when it redraws.
    :class:`CSVStatisticsLogger` and :class:`TensorBoardStatisticsLogger` in the same Trainer write them.

    Checkpoint: the sums, so that a run resumed in mid-epoch goes on counting; the run's samples and seconds.

    Distributed: sums are added up over the ranks (not means of means) at phase ends, checkpoints and when rows are
    written. Until a phase ends its running values are published on one process only.

    Cost: a few small kernels per batch, no synchronisation; one transfer of a few numbers when somebody reads them.

    Args:
        metrics: Names (``accuracy``, ``top5_accuracy``, ``matthews_correlation_coefficient``, ``perplexity``) and
            torchmetrics objects in any order, or a mapping from names to torchmetrics objects. An object's column is
            its class name in snake case; it is cloned, and computes once per batch with ``every="batch"``.
        predictions: Where predictions come from: a key of what the step returns, the name of a submodule whose last
            output is meant, or ``f(outputs, batch)`` or its import path. By default ``outputs["logits"]`` or
            ``outputs["preds"]``, else what the module's ``forward`` returned last.
        targets: A key of what the step returns, or ``f(outputs, batch)`` or its import path. By default
            ``outputs["target"]``, else ``batch[1]``.
        every: ``"batch"``: a row after each batch. ``"epoch"``: one at the end of each phase, and nothing before.
        log: Whether the Trainer's own loggers get the statistics too, every ``log_every_n_steps`` and at phase ends.

    Raises:
        TypeError: If ``metrics``, ``predictions`` or ``targets`` hold something else.
        ValueError: If a metric's name is unknown or comes twice.

    Example:
        >>> StatisticsRecorder(["accuracy", "perplexity"]).names
        ('loss', 'accuracy', 'perplexity')

    References:
        Swift for TensorFlow, swift-models, TrainingLoop statistics. Differs: the sums stay on the device, the MCC
        needs no memory of all predictions, and a cancelled batch is not counted twice.
    """

    def __init__(
        self,
        metrics: Sequence[str | Metric | MetricCollection] | Mapping[str, Metric] | MetricCollection = (),
        *,
        predictions: str | Callable[[Any, Any], Any] | None = None,
        targets: str | Callable[[Any, Any], Any] | None = None,
        every: Literal["batch", "epoch"] = "batch",
        log: bool = False,
    ) -> None:
        self.every = one_of("every", every, ("batch", "epoch"))
        self._statistics = statistic_set(metrics)
        self._sources = StepSources(predictions, targets, type(self).__name__)
        self._sums = {phase: PhaseSums(self._statistics) for phase in (TRAIN, VALIDATION)}
        # kept, because Lightning asks for it at every hook
        self._key = f"{type(self).__qualname__}{{names={list(self.names)!r}, every={self.every!r}}}"
        self._ledger = Ledger(self._statistics)
        # not `self.log`: Lightning hangs the module's function of that name on every callback
        self._publisher = Publisher(self._ledger, log=true_or_false("log", log))
        self._latest: dict[str, Row] = {}
        self._newest: Row | None = None  # of the phase that runs, or has run last
        self._cancelling: list[Any] = []
        self._restored: dict[str, Any] | None = None
        self._told: set[str] = set()
        self._samples = 0
        self._seconds_before = 0.0
        self._started = 0.0
        self._running = False
        self._fits = False
        self._batch = 0  # of the validation that is under way; over all its loaders
        self._lr: float | Tensor | None = None
        self._undivide = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The statistics' names in order, ``loss`` first."""
        return self._statistics.names

    @property
    def last_statistics(self) -> dict[str, float]:
        """The statistics of the phase that runs or has run last, by name; nothing before its first batch.

        Waits for the device. With several ranks the values are this one's until the phase ends, then those of all.
        """
        row = self._newest
        if row is None:
            return {}
        if row.values is None:
            row = dataclasses.replace(row, snapshot=self._sums[row.phase].snapshot(with_metrics=True))
            evaluate(self._statistics, [row])
        return dict(row.values or {})

    @property
    def state_key(self) -> str:
        """Tells recorders apart by what they record."""
        return self._key

    def subscribe(self, reader: Reader) -> None:
        """Hand every row to ``reader`` from now on."""
        if reader not in self._ledger.readers:
            self._ledger.readers.append(reader)

    def unsubscribe(self, reader: Reader) -> None:
        """Hand ``reader`` no more rows."""
        if reader in self._ledger.readers:
            self._ledger.readers.remove(reader)

    def flush(self) -> None:
        """Hand out every row there is; with several ranks all of them must call it."""
        self._ledger.flush()

    # hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second recorder, and start to listen for predictions."""
        others = [other for other in trainer.callbacks if isinstance(other, StatisticsRecorder)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise MisconfigurationException(
                f"A Trainer takes one StatisticsRecorder, got {len(others)}: give all metrics to one."
            )
        self._ledger.reduce = sum_over_ranks(trainer)
        self._ledger.chief = trainer.is_global_zero
        self._fits = stage == "fit"
        if self._statistics.needs_predictions and stage != "predict":
            self._sources.listen(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the validation's statistics."""
        self._sums[VALIDATION].reset()
        self._latest.pop(VALIDATION, None)
        self._newest = None
        self._batch = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the run's clock and take up what a checkpoint brought."""
        self._started, self._running = time.monotonic(), True
        self._publisher.start(trainer)
        self._cancelling = cancelling_callbacks(trainer)
        if self._restored is not None:
            self._restore(self._restored, pl_module.device, chief=trainer.is_global_zero)
            self._restored = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's statistics; a resume in mid-epoch does not come here and goes on."""
        self._sums[TRAIN].reset()
        self._latest.pop(TRAIN, None)
        self._newest = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Read the rate that this batch is trained with, before schedulers move it, and the loss's divisor."""
        self._lr = _learning_rate(trainer)
        self._undivide = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch, and end the phase with the epoch's last one."""
        batches = trainer.num_training_batches
        if self._counts(outputs, pl_module) and not self._was_cancelled():
            self._samples += batch_size(batch)
            self._add(self._sums[TRAIN], outputs, batch, self._undivide)
            self._note(trainer, TRAIN, batch_idx + 1, _whole(batches))
            if self.every == "batch":
                self._publisher.running(trainer, self._latest[TRAIN], self._sums[TRAIN])
        else:
            self._sources.forget()
        if trainer.is_last_batch or batch_idx + 1 == batches:
            self._end_phase(trainer, TRAIN)

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
        if trainer.sanity_checking:
            self._sources.forget()
            return
        self._batch += 1
        if _loss_of(outputs) is None:
            self._tell_once("StatisticsRecorder: the step returns no loss, so validation has none either.")
        if self._was_cancelled() or not self._can_use(outputs):
            self._sources.forget()
            return
        self._add(self._sums[VALIDATION], outputs, batch, 1)
        loaders = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        self._note(trainer, VALIDATION, self._batch, _whole(sum(loaders)))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the validation's statistics, before anything that monitors them looks."""
        if not trainer.sanity_checking:
            self._end_phase(trainer, VALIDATION)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the training phase, if its last batch did not show itself as such."""
        self._end_phase(trainer, TRAIN)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand out what is left and stop the run's clock."""
        self.flush()
        self._stop_clock()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hand out what is left. The other ranks may not get here: the last rows are this rank's own."""
        self._ledger.flush(together=False)
        self._stop_clock()
        self._sources.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hook off the module, and keep the sums of all ranks in one."""
        self._sources.close()
        if self._ledger.reduce is not None and stage == "fit":
            self._restored = self.state_dict()
        self._ledger.reduce = None
        self._publisher.stop()
        self._cancelling = []

    # state

    def state_dict(self) -> dict[str, Any]:
        """Return the training phase's sums over all ranks, the samples and seconds of the run, and a version."""
        if self._restored is not None:
            return self._restored
        samples = torch.tensor(float(self._samples), dtype=torch.float64)
        reduce = self._ledger.reduce
        return {
            "version": _VERSION,
            "train": self._sums[TRAIN].state(reduce),
            "samples": int(samples if reduce is None else reduce(samples)),
            "seconds": self._elapsed(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the model is on its device."""
        self._restored = state_dict

    def _restore(self, state: Mapping[str, Any], device: torch.device, *, chief: bool) -> None:
        if chief:  # one rank holds what all have seen; the sum over the ranks is then right
            self._sums[TRAIN].load(state["train"], device)
            self._samples = state["samples"]
        else:
            self._sums[TRAIN].reset()
            self._samples = 0
        self._seconds_before = state["seconds"]

    # one batch

    def _counts(self, outputs: Any, pl_module: LightningModule) -> bool:
        """Whether a training batch took place: only in manual optimisation a step that returned nothing has."""
        return bool(outputs) or (not pl_module.automatic_optimization and self._can_use(outputs))

    def _can_use(self, outputs: Any) -> bool:
        """Whether there is anything to compute from what a step returned."""
        return self._statistics.needs_predictions or _loss_of(outputs) is not None

    def _was_cancelled(self) -> bool:
        """Ask the callbacks that can cancel a batch; such a batch counts nowhere."""
        return bool(self._cancelling) and any(callback.batch_cancelled for callback in self._cancelling)

    def _add(self, sums: PhaseSums, outputs: Any, batch: Any, undivide: int) -> None:
        loss = _loss_of(outputs)
        if loss is not None and undivide > 1:
            loss = loss * undivide
        if self._statistics.needs_predictions:
            sums.update(loss, self._sources.predictions(outputs, batch), self._sources.targets(outputs, batch))
        else:
            sums.update(loss, None, None)

    def _note(self, trainer: Trainer, phase: str, batch: int, batches: int | None) -> None:
        """Keep the row that the batch makes; hand it to the ledger if rows are wanted for every batch."""
        max_epochs = trainer.max_epochs
        row = Row(
            phase=phase,
            epoch=trainer.current_epoch + 1,
            epochs=None if max_epochs is None or max_epochs < 0 else max_epochs,
            batch=batch,
            batches=batches,
            step=trainer.global_step,
            samples=self._samples,
            lr=self._lr if phase == TRAIN else None,
            seconds=self._elapsed(),
            wall_time=time.time(),
            snapshot=self._sums[phase].snapshot(with_metrics=self.every == "batch"),
        )
        self._latest[phase] = self._newest = row
        if self.every == "batch" and self._fits:
            self._ledger.add(row)

    def _end_phase(self, trainer: Trainer, phase: str) -> None:
        row = self._latest.pop(phase, None)
        if row is None:
            return
        if self.every == "epoch":
            row.snapshot = self._sums[phase].snapshot(with_metrics=True)
            if self._fits:
                self._ledger.add(row)
        finished = self._finished(trainer, row)
        if self._fits:
            self._ledger.flush()
        evaluate(self._statistics, [finished], self._ledger.reduce)
        self._newest = finished
        if self._fits:
            self._ledger.end_phase(finished)
        self._publisher.finished(trainer, finished)

    def _finished(self, trainer: Trainer, row: Row) -> Row:
        """Return what a phase ends with: its last row."""
        return row

    def _elapsed(self) -> float:
        return self._seconds_before + (time.monotonic() - self._started if self._running else 0.0)

    def _stop_clock(self) -> None:
        self._seconds_before, self._running = self._elapsed(), False

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            rank_zero_info(message)


def find_recorder(trainer: Trainer) -> StatisticsRecorder | None:
    """Return the Trainer's recorder, if it has one."""
    found = (callback for callback in trainer.callbacks if isinstance(callback, StatisticsRecorder))  # type: ignore[attr-defined]
    return next(found, None)


def _loss_of(outputs: Any) -> Tensor | None:
    """Return the loss in what a step returned: a number, or the entry ``"loss"`` of a dict."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if isinstance(loss, (int, float)):
        return torch.tensor(loss, dtype=torch.float64)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _whole(number: float) -> int | None:
    return None if math.isinf(number) else int(number)


def _learning_rate(trainer: Trainer) -> float | Tensor | None:
    optimizers = trainer.optimizers
    if not optimizers:
        return None
    rate: float | Tensor = optimizers[0].param_groups[0]["lr"]
    return rate.detach().clone() if isinstance(rate, Tensor) else rate
