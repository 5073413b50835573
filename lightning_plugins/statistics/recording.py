"""Records a run: adds batches to the sums of their phase and makes a row of each.

The recorder holds a recording; a logger without a recorder in its Trainer holds one of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.core.counting import Count, counter, wide
from lightning_plugins.core.lightning import (
    LightningModule,
    Trainer,
    cancelling_callbacks,
    rank_zero_info,
    sum_over_ranks,
)
from lightning_plugins.core.loaders import loader_batch_size
from lightning_plugins.core.step_outputs import StepSources, loss_of
from lightning_plugins.statistics.module_log import logged_loss, logged_values, logs_anything
from lightning_plugins.statistics.rows import TRAIN, VALIDATION, RowBuffer, RowReader, StatisticsRow
from lightning_plugins.statistics.running import PhaseSums, StatisticSet
from lightning_plugins.statistics.trainer_metrics import Display


class Recording:
    """What is recorded of a run. The hooks of the callback that holds it call its methods of nearly the same names.

    Args:
        statistics: What is recorded.
        sources: Where predictions and targets come from.
        every: ``"batch"``: a row after each batch. ``"epoch"``: one at the end of each phase.
        task: What the targets are.
        ignore_index: The target that does not count.
        display: Where the Trainer shows the statistics; ``None`` where nothing asked for that.

    Attributes:
        rows: The rows that wait, and those that read them.
    """

    def __init__(
        self,
        statistics: StatisticSet,
        sources: StepSources,
        *,
        every: str = "batch",
        task: str = "auto",
        ignore_index: int | None = -100,
        display: Callable[[RowBuffer], Display] | None = None,
    ) -> None:
        self.statistics, self.sources, self.every = statistics, sources, every
        self.rows = RowBuffer(statistics, task)
        self._display = None if display is None else display(self.rows)
        self._new_sums = functools.partial(PhaseSums, statistics, task, ignore_index, self._tell_once)
        self._sums = {phase: self._new_sums() for phase in (TRAIN, VALIDATION)}
        # of a validation that has several
        self._by_loader: list[PhaseSums] = []
        self._latest: dict[str, StatisticsRow] = {}
        # of the phase that runs, or has run last
        self._newest: StatisticsRow | None = None
        self._cancelling: list[Any] = []
        self._restored: dict[str, Any] | None = None
        self._told: set[str] = set()
        self._samples: Count = 0
        self._counter: Callable[[Any], Count] | None = None
        self._must_count = self._drawn = False
        self._seconds_before = self._started = 0.0
        self._running = self._fits = False
        # of the validation that is under way; over all its loaders
        self._batch = 0
        self._lr: float | Tensor | None = None
        self._undivide = 1
        # where running values are looked for
        self._published: dict[str, Any] | None = None
        self._needs_predictions = statistics.needs_predictions
        self._published_as = {name: f"train_{name}" for name in statistics.names}

    @property
    def last_statistics(self) -> dict[str, float]:
        """The statistics of the phase that runs or has run last, by name; nothing before its first batch."""
        row = self._newest
        if row is None:
            return {}
        if row.values is None:
            row = dataclasses.replace(row, sums=self._sums[row.phase].state_now())
            self.rows.evaluate([row], None)
        return {name: value for name, value in (row.values or {}).items() if name in self.statistics.names}

    def subscribe(self, reader: RowReader) -> None:
        """Hand every row to ``reader`` from now on."""
        if reader not in self.rows.readers:
            self.rows.readers.append(reader)

    def unsubscribe(self, reader: RowReader) -> None:
        """Hand ``reader`` no more rows."""
        if reader in self.rows.readers:
            self.rows.readers.remove(reader)

    # -- hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start to listen for predictions."""
        self.rows.reduce = sum_over_ranks(trainer)
        self.rows.chief = trainer.is_global_zero
        self._fits = stage == "fit"
        if self._needs_predictions and stage != "predict":
            self.sources.listen(pl_module)

    def validation_start(self) -> None:
        """Begin the validation's statistics."""
        self._sums[VALIDATION].reset()
        self._latest.pop(VALIDATION, None)
        self._by_loader.clear()
        self._newest = None
        self._batch = 0

    def train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the run's clock and take up what a checkpoint brought."""
        self._started, self._running = time.monotonic(), True
        self._cancelling = cancelling_callbacks(trainer)
        self._choose_counter(trainer, pl_module)
        if self._display is not None:
            self._display.start(trainer)
            self._drawn = self.every == "batch" and self._display.is_drawn
            # of several ranks none knows the values of all; asking the Trainer each time would compute all it has
            if self.every == "batch" and self.rows.reduce is None:
                self._published = trainer.callback_metrics
        restored, self._restored = self._restored, None
        if restored is not None:
            self.restore(restored, pl_module.device, chief=trainer.is_global_zero)

    def train_epoch_start(self) -> None:
        """Begin the epoch's statistics; a resume in mid-epoch does not come here and goes on."""
        self._sums[TRAIN].reset()
        self._latest.pop(TRAIN, None)
        self._newest = None

    def before_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the rate that this batch is trained with, before schedulers move it, and the loss's divisor."""
        optimizers = trainer.optimizers
        rate = optimizers[0].param_groups[0]["lr"] if optimizers else None
        self._lr = rate.detach().clone() if isinstance(rate, Tensor) else rate
        self._undivide = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1

    def train_batch(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch, and end the phase with the epoch's last one."""
        batches = trainer.num_training_batches
        if (outputs or self._took_place_by_hand(trainer, pl_module)) and not (
            self._cancelling and self._was_cancelled()
        ):
            loss = loss_of(outputs)
            if loss is None:
                self._tell_once("StatisticsRecorder: the training step returns no loss, so training has none.")
            elif self._undivide > 1:
                loss = loss * self._undivide
            if self._counter is not None:
                self._count_samples(self._counter, batch)
            predictions, targets = self.sources.find(outputs, batch) if self._needs_predictions else (None, None)
            self._sums[TRAIN].update(loss, predictions, targets)
            row = self._note(trainer, TRAIN, batch_idx + 1, batches)
            if self._published is not None:
                self._publish(row, self._published)
            if self._drawn and self._display is not None:
                self._display.running(trainer, row)
        else:
            self.sources.forget()
        if batch_idx + 1 == batches or trainer.is_last_batch:
            self.end_phase(trainer, TRAIN)

    def validation_batch(self, trainer: Trainer, outputs: Any, batch: Any, loader: int) -> None:
        """Add the batch."""
        if trainer.sanity_checking:
            self.sources.forget()
            return
        self._batch += 1
        if self._was_cancelled() or not self._took_place(outputs, batch):
            self.sources.forget()
            return
        loaders = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        if len(loaders) > 1 and not self._by_loader:
            self._by_loader = [self._new_sums() for _ in loaders]
        loss = loss_of(outputs)
        found = self.sources.find(outputs, batch) if self._needs_predictions else (None, None)
        for sums in (self._sums[VALIDATION], *self._by_loader[loader : loader + 1]):
            sums.update(loss, *found)
        if loss is None and not self._take_logged_loss(trainer):
            self._tell_once(
                "StatisticsRecorder: the step returns no loss and logs none, so validation has none either."
            )
            if not self._needs_predictions and not logs_anything(trainer):
                return
        self._note(trainer, VALIDATION, self._batch, sum(loaders))

    def end_phase(self, trainer: Trainer, phase: str) -> None:
        """Evaluate and show what a phase has ended with; harmless when it has ended."""
        row = self._latest.pop(phase, None)
        if row is None:
            return
        if self.every == "epoch":
            row.sums = self._sums[phase].state_now()
            if self._fits:
                self.rows.add(row)
        finished = self._finished(trainer, row)
        if self._fits:
            self.rows.flush()
        self.rows.evaluate([finished], self.rows.reduce)
        self._newest = finished
        if self._fits:
            for reader in self.rows.readers:
                reader.phase_end(finished)
        if self._display is not None:
            self._display.finished(trainer, finished)

    def train_end(self) -> None:
        """Hand out what is left and stop the run's clock."""
        self.rows.flush()
        self._stop_clock()

    def gather(self) -> None:
        """Keep the sums of all ranks in one; every rank must call it."""
        if self.rows.reduce is not None:
            self._restored = self.state()

    def release(self) -> None:
        """Hand out what is left. The other ranks may not get here: the last rows are this rank's own."""
        self._stop_clock()
        self.sources.close()
        self._cancelling, self._published = [], None
        if self._display is not None:
            self._display.stop()
        self.rows.flush(together=False)
        self.rows.reduce = None

    # -- state

    def state(self) -> dict[str, Any]:
        """Return the training phase's sums over all ranks, and the samples and seconds of the run."""
        if self._restored is not None:
            return self._restored
        reduce = self.rows.reduce
        samples = wide(self._samples, "cpu")
        return {
            "train": self._sums[TRAIN].state(reduce),
            "samples": int(samples if reduce is None else reduce(samples)),
            "seconds": self._elapsed(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Keep the state until the model is on its device."""
        self._restored = state

    def restore(self, state: Mapping[str, Any], device: torch.device, *, chief: bool) -> None:
        """Go on from a state; of several ranks one holds what all have seen, so that their sum is right."""
        if chief:
            self._sums[TRAIN].load(state["train"], device)
            self._samples = state["samples"]
        else:
            self._sums[TRAIN].reset()
            self._samples = 0
        self._seconds_before = state["seconds"]

    # -- one batch

    def _took_place_by_hand(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether a step that returned nothing has taken place: in manual optimization alone."""
        return not pl_module.automatic_optimization and (self._needs_predictions or logs_anything(trainer))

    def _took_place(self, outputs: Any, batch: Any) -> bool:
        """Whether a validation step did anything with its batch."""
        if outputs is not None:
            return True
        if batch is not None and self.sources.listens and not self.sources.heard:
            self._tell_once(
                "StatisticsRecorder: a validation batch whose step returns nothing and does not call the module "
                "counts nowhere."
            )
            return False
        return batch is not None

    def _publish(self, row: StatisticsRow, published: dict[str, Any]) -> None:
        """Let callbacks monitor the training phase so far, by tensors that stay on the device."""
        names = self._published_as
        for name, value in self._sums[TRAIN].values_now().items():
            published[names[name]] = value
        for name, value in row.sums.others.items():
            if name in names:
                published[names[name]] = value

    def _was_cancelled(self) -> bool:
        """Ask the callbacks that can cancel a batch; such a batch counts nowhere."""
        return any(callback.batch_cancelled for callback in self._cancelling)

    def _take_logged_loss(self, trainer: Trainer) -> bool:
        """Let the loss that the module logs stand for those that it does not return; tell whether there is one."""
        found = logged_loss(trainer)
        if found:
            totals, weights = zip(*found.values(), strict=True)
            self._sums[VALIDATION].take_logged_loss(sum(totals), sum(weights))
            for loader, sums in enumerate(self._by_loader):
                if loader in found:
                    sums.take_logged_loss(*found[loader])
        return bool(found)

    def _count_samples(self, count: Callable[[Any], Count], batch: Any) -> None:
        try:
            self._samples = self._samples + count(batch)
        except (ValueError, TypeError, AttributeError):
            if self._must_count:
                raise
            self._counter = None

    def _choose_counter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count samples where a reader asks for them, or nothing says that it does not."""
        readers: list[Any] = self.rows.readers
        asking = [reader for reader in readers if getattr(reader, "needs_samples", False)]
        self._must_count = bool(asking)
        self._counter = None
        if asking or not readers or any(not hasattr(reader, "needs_samples") for reader in readers):
            count = getattr(asking[0], "count", "samples") if asking else "samples"
            self._counter = counter(count, module=pl_module, full=loader_batch_size(trainer))

    def _note(self, trainer: Trainer, phase: str, batch: int, batches: float) -> StatisticsRow:
        """Keep the row that the batch makes, among those that wait if rows are wanted for every batch."""
        max_epochs, every_batch = trainer.max_epochs, self.every == "batch"
        # by place: this is done for every batch
        row = StatisticsRow(
            phase,
            trainer.current_epoch + 1,
            None if max_epochs is None or max_epochs < 0 else max_epochs,
            batch,
            None if batches == math.inf else int(batches),
            trainer.global_step,
            self._samples,
            self._lr if phase == TRAIN else None,
            self._elapsed(),
            time.time(),
            self._sums[phase].state_now(with_metrics=every_batch),
        )
        self._latest[phase] = self._newest = row
        if every_batch and self._fits:
            results = trainer.fit_loop.epoch_loop._results if phase == TRAIN else trainer._results
            if results and self.rows.readers:
                self._take_logged(row, logged_values(trainer, on_step=True))
            self.rows.add(row)
        return row

    def _finished(self, trainer: Trainer, row: StatisticsRow) -> StatisticsRow:
        """Return what a phase ends with: its last row, and what the module has logged per epoch."""
        logged = logged_values(trainer, on_step=False) if self._fits and self.rows.readers else {}
        # what is logged per epoch stands in the validation's last row
        if row.phase == VALIDATION:
            self._take_logged(row, logged)
            self._take_loaders(row)
            return row
        if not logged:
            return row
        finished = dataclasses.replace(row, sums=dataclasses.replace(row.sums, others=dict(row.sums.others)))
        self._take_logged(finished, logged)
        return finished

    def _take_logged(self, row: StatisticsRow, logged: Mapping[str, Tensor]) -> None:
        for name, value in logged.items():
            row.sums.others[f"logged_{name}" if name in self.statistics.names else name] = value
            row.values = None

    def _take_loaders(self, row: StatisticsRow) -> None:
        """Add the statistics of each validation loader, where there are several."""
        for loader, sums in enumerate(self._by_loader):
            own = dataclasses.replace(row, sums=sums.state_now(), values=None, more={})
            self.rows.evaluate([own], self.rows.reduce)
            row.more |= {f"{name}/dataloader_idx_{loader}": value for name, value in (own.values or {}).items()}
            row.values = None

    def _elapsed(self) -> float:
        return self._seconds_before + (time.monotonic() - self._started if self._running else 0.0)

    def _stop_clock(self) -> None:
        self._seconds_before, self._running = self._elapsed(), False

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            rank_zero_info(message)
