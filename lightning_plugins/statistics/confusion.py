"""scikit-learn's classification report from a confusion matrix.

The matrix is a sufficient statistic of the report, so predictions need not be kept. NumPy, because a report that is
identical to scikit-learn's to the last bit must add in NumPy's order. Nothing here knows a Trainer.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_plugins.statistics.labels import IGNORED, read_batch

Floats = NDArray[np.float64]

HEADERS = ("precision", "recall", "f1-score", "support")


class ConfusionMatrix:
    """Counts of label and prediction, on the device; a row per label.

    Args:
        num_classes: Number of classes.

    Example:
        >>> matrix = ConfusionMatrix(2)
        >>> matrix.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
        >>> matrix.counts().tolist()
        [[1, 1], [0, 1]]
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._cells: Tensor | None = None  # one row and column more, for numbers that are no classes

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count a batch; a label of -100 is left out. Does not wait for the device."""
        batch = read_batch(predictions.detach(), targets)
        predicted, labels = batch.classes.long(), batch.labels.long()
        beyond = self.num_classes
        rows, columns = (torch.where((n >= 0) & (n < beyond), n, beyond) for n in (labels, predicted))
        weights = (labels != IGNORED).long()
        if self._cells is None:
            self._cells = torch.zeros((beyond + 1) ** 2, dtype=torch.int64, device=labels.device)
        self._cells = self._cells.to(labels.device)
        self._cells.scatter_add_(0, rows * (beyond + 1) + columns, weights)

    def counts(self, summed: Tensor | None = None) -> NDArray[np.int64]:
        """Return the matrix.

        Args:
            summed: :attr:`cells` of all ranks, added up; ``None`` for this process's own.

        Raises:
            ValueError: If a label or a prediction was not a class.
        """
        cells = self.cells if summed is None else summed
        table: NDArray[np.int64] = cells.reshape(self.num_classes + 1, -1).cpu().numpy()
        for name, wrong in (("targets", table[-1].sum()), ("predictions", table[:-1, -1].sum())):
            if wrong:
                raise ValueError(
                    f"All {name} must be from 0 to {self.num_classes - 1} with `num_classes` {self.num_classes}, got "
                    f"{wrong} others."
                )
        return table[:-1, :-1]

    @property
    def cells(self) -> Tensor:
        """All counts in one row, those of numbers that are no classes included."""
        return torch.zeros((self.num_classes + 1) ** 2, dtype=torch.int64) if self._cells is None else self._cells

    def reset(self) -> None:
        """Count from zero."""
        self._cells = None


@dataclass(frozen=True)
class Report:
    """A classification report: the text and the dict that scikit-learn returns, and the matrix as CSV.

    Args:
        counts: Confusion matrix, a row per label.
        labels: The classes to report, in order; ``None`` for those present in labels or predictions.
        target_names: Names for ``labels``; with ``labels=None`` one per class of the matrix, or per class present.
        digits: Digits after the point.
        zero_division: What 0 / 0 is: 0, 1 or NaN; averages leave NaN out.

    Raises:
        ValueError: If the number of ``target_names`` fits neither.

    Example:
        >>> counts = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 2]])
        >>> print(Report(counts, target_names=["class 0", "class 1", "class 2"]).text())
                      precision    recall  f1-score   support
        <BLANKLINE>
             class 0       0.50      1.00      0.67         1
             class 1       0.00      0.00      0.00         1
             class 2       1.00      0.67      0.80         3
        <BLANKLINE>
            accuracy                           0.60         5
           macro avg       0.50      0.56      0.49         5
        weighted avg       0.70      0.60      0.61         5
        <BLANKLINE>

    References:
        scikit-learn 1.9, ``sklearn.metrics.classification_report``. Differs: with ``labels=None`` and one name per
        class, absent classes are left out instead of refused.
    """

    counts: NDArray[np.int64]
    labels: Sequence[int] | None = None
    target_names: Sequence[str] | None = None
    digits: int = 2
    zero_division: float = 0.0

    def text(self) -> str:
        """Return what scikit-learn prints."""
        names = self.names()
        width = max(*[len(name) for name in names], len("weighted avg"), self.digits)
        row = "{:>{width}s} " + " {:>9.{digits}f}" * 3 + " {:>9}\n"
        text = ("{:>{width}s} " + " {:>9}" * 4).format("", *HEADERS, width=width) + "\n\n"
        for name, *numbers in zip(names, *self._by_class(), strict=True):
            text += row.format(name, *numbers, width=width, digits=self.digits)
        text += "\n"
        averages = self._averages()
        if "accuracy" in averages:  # shows F1 only, which equals it
            short = "{:>{width}s} " + " {:>9}" * 2 + " {:>9.{digits}f} {:>9}\n"
            *_, f1, support = averages.pop("accuracy")
            text += short.format("accuracy", "", "", f1, support, width=width, digits=self.digits)
        for name, numbers in averages.items():
            text += row.format(name, *numbers, width=width, digits=self.digits)
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return what scikit-learn returns with ``output_dict=True``."""
        by_class = zip(self.names(), *self._by_class(), strict=True)
        rows = [(name, numbers) for name, *numbers in by_class] + list(self._averages().items())
        report: dict[str, Any] = {
            name: dict(zip(HEADERS, [float(number) for number in numbers], strict=True)) for name, numbers in rows
        }
        if "accuracy" in report:
            report["accuracy"] = report["accuracy"]["precision"]
        return report

    def csv(self) -> str:
        """Return the report as CSV: ``class`` and the four columns, with all digits; blank where it has none."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("class", *HEADERS))
        support = int(self._support().sum())
        for name, values in self.to_dict().items():
            cells = list(values.values()) if isinstance(values, Mapping) else ["", "", values, support]
            writer.writerow((name, *cells[:3], int(cells[3])))
        return text.getvalue()

    def shown_labels(self) -> list[int]:
        """Return the classes that the report has rows for."""
        if self.labels is not None:
            return list(self.labels)
        return [int(label) for label in np.flatnonzero(self.counts.sum(0) + self.counts.sum(1))]

    def names(self) -> list[str]:
        """Return the names of the rows of classes."""
        labels = self.shown_labels()
        names = self.target_names
        if names is None:
            return [str(label) for label in labels]
        if self.labels is None and len(names) == len(self.counts):
            return [names[label] for label in labels]
        if len(names) != len(labels):
            raise ValueError(
                f"`target_names` must have one name for each of {len(labels)} classes in the report or of all "
                f"{len(self.counts)}, got {len(names)}; `labels` chooses the classes."
            )
        return list(names)

    def _support(self) -> NDArray[Any]:
        support: NDArray[Any] = self.counts.sum(1)[self.shown_labels()]
        # scikit-learn counts in floats when not a single prediction is right, and prints the support so
        return support if np.trace(self.counts) else support.astype(np.float64)

    def _by_class(self) -> tuple[Floats, Floats, Floats, NDArray[Any]]:
        labels = self.shown_labels()
        true, predicted = self.counts.sum(1)[labels], self.counts.sum(0)[labels]
        hits = np.diag(self.counts)[labels]
        return (*self._scores(hits, predicted, true), self._support())

    def _averages(self) -> dict[str, list[Any]]:
        labels = self.shown_labels()
        *scores, support = self._by_class()
        pooled = [
            np.array([part.sum()]) for part in (np.diag(self.counts)[labels], self.counts.sum(0)[labels], support)
        ]
        total = support.sum()
        present = set(np.flatnonzero(self.counts.sum(0) + self.counts.sum(1)).tolist())
        micro = "accuracy" if self.labels is None or set(labels) >= present else "micro avg"
        return {
            micro: [*(_average(score) for score in self._scores(*pooled)), total],
            "macro avg": [*(_average(score) for score in scores), total],
            "weighted avg": [*(_average(score, support) for score in scores), total],
        }

    def _scores(self, hits: NDArray[Any], predicted: NDArray[Any], true: NDArray[Any]) -> tuple[Floats, Floats, Floats]:
        """Return precision, recall and F1; the latter as 2 hits / (predicted + true), not from the other two."""
        return (
            self._ratio(hits, predicted),
            self._ratio(hits, true),
            self._ratio(2.0 * hits, true.astype(np.float64) + predicted),
        )

    def _ratio(self, numerator: NDArray[Any], denominator: NDArray[Any]) -> Floats:
        empty = denominator == 0
        ratio: Floats = numerator / np.where(empty, 1, denominator)
        ratio[empty] = self.zero_division
        return ratio


def _average(values: Floats, weights: NDArray[Any] | None = None) -> float:
    """Return the mean of what is not NaN; weights that are all zero count as none."""
    there = ~np.isnan(values)
    if not there.any():
        return float("nan")
    if weights is None:
        return float(np.nanmean(values))
    values, weights = values[there], weights[there]
    return float(np.average(values, weights=weights if weights.sum() else None))
