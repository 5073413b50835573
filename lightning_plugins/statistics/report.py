"""The callback that prints and saves scikit-learn's classification report after every validation and test."""

from __future__ import annotations

import contextlib
import json
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_plugins.core.callback import Callback, Stage
from lightning_plugins.core.files import replace_file
from lightning_plugins.core.lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    cancelling_callbacks,
    sum_over_ranks,
)
from lightning_plugins.core.step_outputs import StepSources
from lightning_plugins.core.user_warning import warn
from lightning_plugins.core.validation import (
    a_list,
    a_path,
    one_of,
    real_number,
    shown,
    whole_number,
)
from lightning_plugins.core.writable import check_writable, leaves_files
from lightning_plugins.statistics.class_counts import ClassCounts
from lightning_plugins.statistics.labels import IGNORED, TASKS
from lightning_plugins.statistics.metric_names import checked_ignore_index
from lightning_plugins.statistics.report_text import Report

_SUFFIXES = (".txt", ".json", ".csv", ".png")
# classes of a confusion matrix: a million cells
_MOST_PICTURED = 1000


class ClassificationReport(Callback):
    """Precision, recall, F1 and support of every class: scikit-learn's report, from streamed counts.

    After every validation (not the sanity check's) and every test the report is printed, above the progress bar, and
    saved; with ``fast_dev_run`` it is only printed. Text and dict are identical to
    ``sklearn.metrics.classification_report``, which need not be installed.

    When:
        Counts in ``on_validation_batch_end`` and ``on_test_batch_end``; reports in ``on_validation_epoch_end`` and
        ``on_test_epoch_end``. By hand: :meth:`update`, :meth:`compute`, :meth:`reset`.
    Checkpoint:
        Nothing.
    Distributed:
        The counts of all ranks are added up; rank 0 prints and saves. A sampler that repeats samples to give every
        rank the same number is counted as it samples.
    Cost:
        A few numbers per class, and one per pair of classes only where a picture is asked for; a few small kernels per
        batch, no synchronization.
    Does not compose with:
        Several loaders of one phase, if each is to have its report: they are counted together.
        :class:`StatisticsRecorder` has the accuracy of each.
        Another one with the same labels and paths in one Trainer, which Lightning refuses.

    Args:
        num_classes: Number of classes; labels and predictions are 0 to ``num_classes - 1``.
        labels: The classes to report, in order; ``None`` for those present in labels or predictions.
        target_names: A name for each of ``labels``; with ``labels=None`` one for each class.
        digits: Digits after the point, in the text.
        zero_division: What 0 / 0 is: 0, 1 or NaN; averages leave NaN out.
        predictions: Where predictions come from: a key of what the step returns or of the batch, the name of a
            submodule whose last output is meant, or ``f(outputs, batch)`` or its import path. By default
            ``outputs["logits"]`` or ``outputs["preds"]``, else what the module's ``forward`` returned last.
        targets: A key of what the step returns or of the batch, or ``f(outputs, batch)`` or its import path. By
            default ``outputs["target"]``, else ``batch[1]``, else the batch's ``target``, ``targets``, ``label`` or
            ``labels``.
        task: What the targets are. ``"auto"`` decides by types, shapes and what was counted, and refuses where two
            readings remain. ``"multiclass"``: class numbers, or rows whose largest entry is the class. ``"binary"``: 0
            and 1. ``"multilabel"``: rows of 0 and 1, for scikit-learn's report of several labels at once.
        ignore_index: The target that does not count; NaN never does. ``None``: all others count.
        path: Where to save: one path or several; the suffix chooses the form: ``.txt``, ``.json``, ``.csv``, or
            ``.png`` for a picture of the confusion matrix (needs matplotlib; up to 1000 classes). ``{phase}`` and
            ``{epoch}`` in it are filled in; without ``{phase}`` a test's file has ``-test`` before its suffix. The
            epoch is that in which the weights were last trained, from 1: that of the fit, before and after its end, or
            of the file given as ``ckpt_path``; 0 for a module that the Trainer has not trained.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range, a label is no class, the names do not fit, or a suffix is unknown.

    Example:
        >>> import torch
        >>> report = ClassificationReport(2, target_names=["cat", "dog"])
        >>> report.update(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 0]))
        >>> report.compute(output_dict=True)["accuracy"]
        0.75

    References:
        scikit-learn 1.9, ``sklearn.metrics.classification_report``. Differs: predictions come first, as everywhere in
        torch, and absent classes of a full list of names are left out instead of refused.
    """

    stage: ClassVar[Stage] = Stage.OUTPUT

    def __init__(
        self,
        num_classes: int,
        *,
        labels: Sequence[int] | None = None,
        target_names: Sequence[str] | None = None,
        digits: int = 2,
        zero_division: float = 0,
        predictions: str | Callable[[Any, Any], Any] | None = None,
        targets: str | Callable[[Any, Any], Any] | None = None,
        task: Literal["auto", "multiclass", "binary", "multilabel"] = "auto",
        ignore_index: int | None = IGNORED,
        path: Sequence[str | Path] | str | Path | None = None,
    ) -> None:
        self.num_classes = whole_number("num_classes", num_classes, at_least=2)
        self.labels = _checked_labels(labels, self.num_classes)
        self.target_names = _checked_names(target_names, self.labels, self.num_classes)
        self.digits = whole_number("digits", digits)
        self.zero_division = _checked_zero_division(zero_division)
        self.paths = _checked_paths(path)
        # what relative paths are relative to
        self._folder = Path()
        # the module that was trained, and the epoch of weights that were loaded for an evaluation
        self._trained: weakref.ref[LightningModule] | None = None
        self._epoch_of_file: int | None = None
        super().__init__(labels=self.labels, path=self.paths)
        self._sources = StepSources(predictions, targets, type(self).__name__)
        self.task = one_of("task", task, TASKS)
        self.ignore_index = checked_ignore_index(ignore_index)
        pictured = any(one.endswith(".png") for one in self.paths)
        if pictured and self.num_classes > _MOST_PICTURED:
            raise ValueError(
                f"`path` must not end in '.png' with more than {_MOST_PICTURED} classes, whose confusion matrix no "
                f"picture can show, got {self.num_classes} classes."
            )
        self._counts = ClassCounts(
            self.num_classes, task=self.task, ignore_index=self.ignore_index, chosen=self.labels, matrix=pictured
        )
        self._complained: set[str] = set()

    # by hand

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count a batch.

        Args:
            predictions: Class numbers, or scores (logits or probabilities).
            targets: Class numbers, 0 and 1, or rows with an entry per class.

        Raises:
            ValueError: If the shapes do not belong together.
        """
        self._counts.update(predictions, targets)

    # scikit-learn's way
    def compute(self, output_dict: bool = False) -> str | dict[str, Any]:  # noqa: FBT001, FBT002
        """Return the report of what this process has counted, as text or as a dict.

        Raises:
            ValueError: If nothing was counted, or something that is not a class.
        """
        report = self._report(self._counts.vector)
        if not report.totals.true.any() and not report.totals.rows:
            raise ValueError("There is nothing to report: no label has been counted.")
        return report.to_dict() if output_dict else report.text()

    def reset(self) -> None:
        """Count from zero."""
        self._counts.reset()

    # hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start to listen for predictions."""
        super().setup(trainer, pl_module, stage)
        self._folder, self._epoch_of_file = Path.cwd(), None
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by the callback connector
        reports = [found for found in callbacks if isinstance(found, ClassificationReport)]
        written = [Path(path).resolve() for report in reports for path in {*report.paths}]
        for path in self.paths:
            if written.count(Path(path).resolve()) > 1:
                raise MisconfigurationException(
                    f"Two ClassificationReport callbacks write to {shown(path)}; give each its own `path`."
                )
        if stage in {"validate", "test"}:
            # no hook is called for a file of weights alone
            self.patches.wrap(trainer.strategy, "load_checkpoint", self._load_checkpoint)
        if trainer.is_global_zero and leaves_files(trainer) and stage != "predict":
            for path in self.paths:
                check_writable("path", _filled(path, "test" if stage == "test" else "validation", 1))
        if stage != "predict":
            self._sources.listen(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note whose weights the epochs are of."""
        self._trained = weakref.ref(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let go of the training batch's output."""
        self._sources.forget()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from zero."""
        self.reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch."""
        counts = outputs is not None or (batch is not None and (self._sources.heard or not self._sources.listens))
        cancelled = any(callback.batch_cancelled for callback in cancelling_callbacks(trainer))
        if trainer.sanity_checking or cancelled or not counts:
            self._sources.forget()
            return
        self.update(*self._sources.find(outputs, batch))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and save the report."""
        if trainer.sanity_checking:
            return
        add_up = sum_over_ranks(trainer)
        vector = self._counts.vector
        report = self._report(vector if add_up is None else add_up(vector))
        if trainer.is_global_zero and (report.totals.true.any() or report.totals.rows):
            _print(pl_module, report.text())
            phase, epoch = "test" if trainer.testing else "validation", self._epoch(trainer, pl_module)
            for path in self.paths if leaves_files(trainer) else ():
                self._save(report, _filled(path, phase, epoch))

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hook off the module."""
        self._sources.close()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a process."""
        return {**vars(self), "_trained": None}

    def _load_checkpoint(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        checkpoint = original(*args, **kwargs)
        self._epoch_of_file = _epoch_of(checkpoint)
        return checkpoint

    def _epoch(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """Return the epoch, from 1, in which the weights were last trained."""
        if trainer.state.fn == "fit":
            return trainer.current_epoch + 1
        if self._epoch_of_file is not None:
            return self._epoch_of_file
        is_trained = self._trained is not None and self._trained() is pl_module
        # the Trainer's own number is that of the next epoch once the last has ended
        epochs: Any = trainer.fit_loop.epoch_progress.current
        return int(epochs.started) if is_trained else 0

    def _report(self, vector: Tensor) -> Report:
        totals = self._counts.totals(vector)
        return Report(totals, self.labels, self.target_names, self.digits, self.zero_division)

    def _save(self, report: Report, path: Path) -> None:
        try:
            _save(report, self._folder / path)
        except OSError as error:
            reason = error.strerror or str(error)
            if str(path) not in self._complained:
                self._complained.add(str(path))
                warn(
                    f"ClassificationReport: {path} could not be written ({reason}). That report is lost; training "
                    "goes on."
                )


def _print(pl_module: LightningModule, text: str) -> None:
    try:
        pl_module.print(text)
    except UnicodeEncodeError:
        # a terminal without the letters of a class's name
        pl_module.print(text.encode("ascii", "backslashreplace").decode())


def _save(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        # matplotlib on use
        from lightning_plugins.statistics.plot import plot_confusion_matrix  # noqa: PLC0415

        plot_confusion_matrix(report, path)
        return
    forms = {".txt": report.text, ".csv": report.csv}
    text = json.dumps(report.to_dict(), indent=2) + "\n" if path.suffix == ".json" else forms[path.suffix]()
    replace_file(path, text.encode())


def _epoch_of(checkpoint: Any) -> int | None:
    """Return the epoch, from 1, in which a file's weights were last trained, ``None`` if it does not say."""
    if not isinstance(checkpoint, Mapping):
        return None
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return whole_number("epoch", checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["started"])
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return whole_number("epoch", checkpoint["epoch"]) + 1
    return None


def _filled(path: str, phase: str, epoch: int) -> Path:
    filled = Path(path.replace("{phase}", phase).replace("{epoch}", str(epoch)))
    if phase == "test" and "{phase}" not in path:
        return filled.with_name(f"{filled.stem}-test{filled.suffix}")
    return filled


def _checked_labels(labels: Sequence[int] | None, num_classes: int) -> tuple[int, ...] | None:
    if labels is None:
        return None
    checked = tuple(whole_number("labels", label) for label in a_list("labels", labels, "a list of classes"))
    if not checked or len(set(checked)) != len(checked) or max(checked) >= num_classes:
        raise ValueError(f"`labels` must be distinct classes from 0 to {num_classes - 1}, got {shown(list(checked))}.")
    return checked


def _checked_names(
    given: Sequence[str] | None, labels: tuple[int, ...] | None, num_classes: int
) -> tuple[str, ...] | None:
    if given is None:
        return None
    names = a_list("target_names", given, "a list of names")
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"`target_names` must be a list of names, got {shown(given)}.")
    wanted = num_classes if labels is None else len(labels)
    if len(names) != wanted:
        what = "classes" if labels is None else "`labels`"
        raise ValueError(f"`target_names` must have one name for each of the {wanted} {what}, got {len(names)}.")
    return tuple(names)


def _checked_zero_division(value: float) -> float:
    if isinstance(value, float) and math.isnan(value):
        return value
    if real_number("zero_division", value) not in (0, 1):
        raise ValueError(f"`zero_division` must be 0, 1 or NaN, got {shown(value)}.")
    return float(value)


def _checked_paths(path: Sequence[str | Path] | str | Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    given = [path] if isinstance(path, (str, Path)) else a_list("path", path, "a path or several")
    paths = tuple(a_path("path", one) for one in given)
    for one in paths:
        if Path(one).suffix not in _SUFFIXES:
            raise ValueError(f"`path` must end in one of {', '.join(map(repr, _SUFFIXES))}, got {shown(one)}.")
    return paths
