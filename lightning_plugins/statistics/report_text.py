"""scikit-learn's classification report, as text, dict and CSV, from three counts per class.

NumPy, because a report that is identical to scikit-learn's to the last bit must add in NumPy's order. Nothing here
knows a Trainer.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_plugins.statistics.class_counts import ClassTotals

Floats = NDArray[np.float64]

HEADERS = ("precision", "recall", "f1-score", "support")


@dataclass(frozen=True)
class Report:
    """A classification report: the text and the dict that scikit-learn returns, and the same as CSV.

    Args:
        totals: The counts of every class.
        labels: The classes to report, in order; ``None`` for those present in labels or predictions.
        target_names: Names for ``labels``; with ``labels=None`` one per class of the matrix, or per class present.
        digits: Digits after the point.
        zero_division: What 0 / 0 is: 0, 1 or NaN; averages leave NaN out.

    Raises:
        ValueError: If the number of ``target_names`` fits neither.

    Example:
        >>> totals = ClassTotals(np.array([1, 1, 3]), np.array([2, 1, 2]), np.array([1, 0, 2]))
        >>> print(Report(totals, target_names=["class 0", "class 1", "class 2"]).text())
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

    totals: ClassTotals
    labels: Sequence[int] | None = None
    target_names: Sequence[str] | None = None
    digits: int = 2
    zero_division: float = 0.0

    def text(self) -> str:
        """Return what scikit-learn prints."""
        names = self.names()
        width = max(*[len(name) for name in names], len("weighted avg"), self.digits)
        row = "{:>{width}s} " + " {:>9.{digits}f}" * 3 + " {:>9}\n"
        lines = [("{:>{width}s} " + " {:>9}" * 4).format("", *HEADERS, width=width) + "\n\n"]
        for name, *numbers in zip(names, *self._by_class(), strict=True):
            lines.append(row.format(name, *numbers, width=width, digits=self.digits))
        lines.append("\n")
        averages = self._averages()
        # shows F1 only, which equals it
        if "accuracy" in averages:
            short = "{:>{width}s} " + " {:>9}" * 2 + " {:>9.{digits}f} {:>9}\n"
            *_, f1, support = averages.pop("accuracy")
            lines.append(short.format("accuracy", "", "", f1, support, width=width, digits=self.digits))
        for name, numbers in averages.items():
            lines.append(row.format(name, *numbers, width=width, digits=self.digits))
        return "".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return what scikit-learn returns with ``output_dict=True``."""
        report: dict[str, Any] = {
            name: dict(zip(HEADERS, [float(number) for number in numbers], strict=True))
            for name, numbers in (*self._rows_by_class(), *self._averages().items())
        }
        if "accuracy" in report:
            report["accuracy"] = report["accuracy"]["precision"]
        return report

    def csv(self) -> str:
        """Return the report as CSV: ``class`` and the four columns, with all digits; blank where it has none."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("class", *HEADERS))
        averages = self._averages()
        if "accuracy" in averages:
            averages["accuracy"] = ["", "", averages["accuracy"][2], averages["accuracy"][3]]
        # two classes of one name have a row each
        for name, (*scores, support) in (*self._rows_by_class(), *averages.items()):
            writer.writerow((name, *(score if score == "" else float(score) for score in scores), int(support)))
        return text.getvalue()

    def _rows_by_class(self) -> list[tuple[str, list[Any]]]:
        return [(name, numbers) for name, *numbers in zip(self.names(), *self._by_class(), strict=True)]

    def shown_labels(self) -> list[int]:
        """Return the classes that the report has rows for."""
        if self.labels is not None:
            return list(self.labels)
        if self.totals.samples is not None:
            return list(range(len(self.totals.true)))
        return [int(label) for label in np.flatnonzero(self.totals.true + self.totals.predicted)]

    def names(self) -> list[str]:
        """Return the names of the rows of classes."""
        labels = self.shown_labels()
        names = self.target_names
        if names is None:
            return [str(label) for label in labels]
        if self.labels is None and len(names) == len(self.totals.true):
            return [names[label] for label in labels]
        if len(names) != len(labels):
            raise ValueError(
                f"`target_names` must have one name for each of {len(labels)} classes in the report or of all "
                f"{len(self.totals.true)}, got {len(names)}; `labels` chooses the classes."
            )
        return list(names)

    def _support(self) -> NDArray[Any]:
        support: NDArray[Any] = self.totals.true[self.shown_labels()]
        # scikit-learn counts in floats when not a single prediction is right, and prints the support so
        whole = self.totals.samples is not None or self.totals.hits.any()
        return support if whole else support.astype(np.float64)

    def _by_class(self) -> tuple[Floats, Floats, Floats, NDArray[Any]]:
        labels = self.shown_labels()
        true, predicted, hits = (part[labels] for part in (self.totals.true, self.totals.predicted, self.totals.hits))
        return (*self._scores(hits, predicted, true), self._support())

    def _averages(self) -> dict[str, list[Any]]:
        labels = self.shown_labels()
        *scores, support = self._by_class()
        pooled = [np.array([part.sum()]) for part in (self.totals.hits[labels], self.totals.predicted[labels], support)]
        total = support.sum()
        present = set(np.flatnonzero(self.totals.true + self.totals.predicted).tolist())
        one_label = self.totals.samples is None
        micro = "accuracy" if one_label and (self.labels is None or set(labels) >= present) else "micro avg"
        averages = {
            micro: [*(_average(score) for score in self._scores(*pooled)), total],
            "macro avg": [*(_average(score) for score in scores), total],
            "weighted avg": [*(_average(score, support) for score in scores), total],
        }
        if self.totals.samples is not None:
            averages["samples avg"] = [*self._over_samples(self.totals.samples), total]
        return averages

    def _over_samples(self, samples: Floats) -> list[float]:
        """Return the means over samples; a sample where one is not defined counts as ``zero_division`` says."""
        sums, undefined = samples[:3], samples[3:]
        if math.isnan(self.zero_division):
            with np.errstate(invalid="ignore"):
                means = sums / (self.totals.rows - undefined)
        else:
            means = (sums + undefined * self.zero_division) / self.totals.rows
        return [float(mean) for mean in means]

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
