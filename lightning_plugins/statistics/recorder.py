"""The callback that keeps the running statistics of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from torchmetrics import Metric, MetricCollection

from lightning_plugins.core.callback import Stage
from lightning_plugins.core.lightning import LightningModule, MisconfigurationException, Trainer, rank_zero_info
from lightning_plugins.core.step_outputs import StepSources
from lightning_plugins.core.validation import a_list, one_of, shown, true_or_false
from lightning_plugins.statistics.labels import IGNORED, TASKS
from lightning_plugins.statistics.metric_names import checked_ignore_index, statistic_set
from lightning_plugins.statistics.recording import Recording
from lightning_plugins.statistics.recording_callback import RecordingCallback
from lightning_plugins.statistics.rows import RowReader
from lightning_plugins.statistics.saved_states import checked_recording, without_counts_of_0_1
from lightning_plugins.statistics.trainer_metrics import TrainerMetrics


class StatisticsRecorder(RecordingCallback):
    """Running loss and metrics of every phase, exact and without waiting for the device.

    ``loss`` is the mean of the batches' losses since the phase began (training since the epoch began, validation
    since it started), as the module computed them, not divided by ``accumulate_grad_batches``; ``loss_step`` in every
    row is the batch's own. The metrics run over the same stretch: ``accuracy`` and ``top5_accuracy`` are shares of
    labels, ``matthews_correlation_coefficient`` is for any number of classes, ``perplexity`` is exp(loss). Batches of
    the sanity check and batches without a result (the step returned ``None``) do not count. The card has the
    definitions, ties and degenerate cases, and how predictions and targets are read.

    ``trainer.callback_metrics`` has ``train_<name>`` after every training batch and ``val_<name>`` from
    ``on_validation_epoch_end`` on (``test_<name>`` after a test), for ModelCheckpoint and EarlyStopping; with several
    validation loaders also ``val_<name>/dataloader_idx_<number>`` for each. What the module itself logs under such a
    name stays the module's. :class:`CSVStatisticsLogger` and :class:`TensorBoardStatisticsLogger` in the same Trainer
    write the rows.

    When:
        Sums grow in ``on_train_batch_end`` and ``on_validation_batch_end`` and begin anew in ``on_train_epoch_start``
        and ``on_validation_start``.
    Checkpoint:
        The sums, so that a run resumed in mid-epoch goes on counting; the run's samples and seconds.
    Distributed:
        Sums are added up over the ranks (not means of means) at phase ends, checkpoints and when rows are written.
        Until a phase ends its running values are published on one process only.
    Cost:
        A few small kernels per batch, no synchronization; one transfer of a few numbers when values are read.
    Does not compose with:
        A second recorder in the same Trainer, which is refused: give all metrics to one.

    Args:
        metrics: Names (``accuracy``, ``top5_accuracy``, ``matthews_correlation_coefficient``, ``perplexity``) and
            torchmetrics objects in any order, or a mapping from names to torchmetrics objects. An object's column is
            its class name in snake case; it is cloned, and computes once per batch with ``every="batch"``.
        predictions: Where predictions come from: a key of what the step returns or of the batch, the name of a
            submodule whose last output is meant, or ``f(outputs, batch)`` or its import path. By default
            ``outputs["logits"]`` or ``outputs["preds"]``, else what the module's ``forward`` returned last.
        targets: A key of what the step returns or of the batch, or ``f(outputs, batch)`` or its import path. By
            default ``outputs["target"]``, else ``batch[1]``, else the batch's ``target``, ``targets``, ``label`` or
            ``labels``.
        task: What the targets are. ``"auto"`` decides by types, shapes and what a phase has shown, and refuses where
            two readings remain. ``"multiclass"``: class numbers, or rows whose largest entry is the class.
            ``"binary"``: 0 and 1. ``"multilabel"``: rows of 0 and 1.
        ignore_index: The target that does not count; NaN never does. ``None``: all others count.
        progress_bar: The names that the progress bar shows, as they are in training and with ``val_`` of validation.
        every: ``"batch"``: a row after each batch. ``"epoch"``: one at the end of each phase, and nothing before.
        log: Whether the Trainer's own loggers get the statistics too, every ``log_every_n_steps`` and at phase ends.

    Raises:
        TypeError: If ``metrics``, ``predictions`` or ``targets`` hold something else.
        ValueError: If a metric's name is unknown or comes twice, or another argument is not one of its choices.

    Example:
        >>> StatisticsRecorder(["accuracy", "perplexity"]).names
        ('loss', 'accuracy', 'perplexity')

    References:
        Swift for TensorFlow, swift-models, TrainingLoop statistics. Differs: the sums stay on the device, the MCC
        needs no memory of all predictions, and a cancelled batch is not counted twice.
    """

    stage: ClassVar[Stage] = Stage.STATISTICS

    def __init__(
        self,
        metrics: Sequence[str | Metric | MetricCollection] | Mapping[str, Metric] | MetricCollection = (),
        *,
        predictions: str | Callable[[Any, Any], Any] | None = None,
        targets: str | Callable[[Any, Any], Any] | None = None,
        task: Literal["auto", "multiclass", "binary", "multilabel"] = "auto",
        ignore_index: int | None = IGNORED,
        progress_bar: Sequence[str] = ("loss",),
        every: Literal["batch", "epoch"] = "batch",
        log: bool = False,
    ) -> None:
        self.every = one_of("every", every, ("batch", "epoch"))
        self._statistics = statistic_set(metrics)
        super().__init__(names=list(self.names), every=self.every)
        # not `self.log`: Lightning hangs the module's function of that name on every callback
        self._logs = true_or_false("log", log)
        self.task = one_of("task", task, TASKS)
        self.ignore_index = checked_ignore_index(ignore_index)
        self.progress_bar = _checked_progress_bar(progress_bar, self.names)
        self._records = self.recording = Recording(
            self._statistics,
            StepSources(predictions, targets, type(self).__name__),
            every=self.every,
            task=self.task,
            ignore_index=self.ignore_index,
            display=lambda rows: TrainerMetrics(rows, progress_bar=self.progress_bar, log=self._logs),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The statistics' names in order, ``loss`` first."""
        return self._statistics.names

    @property
    def last_statistics(self) -> dict[str, float]:
        """The statistics of the phase that runs or has run last, by name; nothing before its first batch.

        Waits for the device. With several ranks the values are this one's until the phase ends, then those of all.
        """
        return self.recording.last_statistics

    def subscribe(self, reader: RowReader) -> None:
        """Hand every row to ``reader`` from now on."""
        self.recording.subscribe(reader)

    def unsubscribe(self, reader: RowReader) -> None:
        """Hand ``reader`` no more rows."""
        self.recording.unsubscribe(reader)

    def flush(self) -> None:
        """Hand out every row there is; with several ranks all of them must call it."""
        self.recording.rows.flush()

    # -- hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second recorder, and start to listen for predictions."""
        super().setup(trainer, pl_module, stage)
        others = [other for other in trainer.callbacks if isinstance(other, StatisticsRecorder)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise MisconfigurationException(
                f"A Trainer takes one StatisticsRecorder, got {len(others)}: give all metrics to one."
            )
        self.recording.setup(trainer, pl_module, stage)

    on_test_start = RecordingCallback.on_validation_start
    on_test_batch_end = RecordingCallback.on_validation_batch_end
    on_test_epoch_end = RecordingCallback.on_validation_epoch_end

    # -- state

    def get_state(self) -> dict[str, Any]:
        """Return the training phase's sums over all ranks, and the samples and seconds of the run."""
        return self.recording.state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Keep the state until the model is on its device."""
        known, left_out = without_counts_of_0_1(state)
        if left_out:
            rank_zero_info(
                "StatisticsRecorder: the checkpoint is of release 0.1.0, which counted labels in another way: in the "
                "epoch under way the loss goes on, and statistics of labels begin anew."
            )
        self.recording.load(checked_recording(type(self).__name__, known))


def _checked_progress_bar(given: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    shown_names = tuple(a_list("progress_bar", given, "a list of names"))
    for name in shown_names:
        if name not in names:
            raise ValueError(f"`progress_bar` must name some of {', '.join(map(repr, names))}, got {shown(name)}.")
    return shown_names
