"""Counts of every class, streamed: how often it is the label, how often it is predicted, and how often both.

Three numbers per class are a sufficient statistic of a classification report. Everything stays on the device; nothing
here waits for it before the counts are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_plugins.statistics.label_evidence import contradiction, is_multilabel
from lightning_plugins.statistics.labels import IGNORED, LabelledBatch, count_by_class, is_one_hot, read_batch, widest

_EVIDENCE = ("outside", "not_binary", "soft", "multi_hot", "other", "rows", "one_hot", "not_binary_predictions")
_READINGS = ("scores of classes", "class numbers", "score per label", "rows", "rows of numbers")


@dataclass(frozen=True)
class ClassTotals:
    """What a report is made of.

    Args:
        true: How often each class is the label.
        predicted: How often it is predicted.
        hits: How often it is both.
        samples: For several labels at once, precision, recall and F1 of the samples: the sum of each where it is
            defined, and the number of samples where it is not; ``None`` for one label each.
        rows: How many samples there are.
        matrix: Label against prediction, if that was asked for.
    """

    true: NDArray[np.int64]
    predicted: NDArray[np.int64]
    hits: NDArray[np.int64]
    samples: NDArray[np.float64] | None = None
    rows: int = 0
    matrix: NDArray[np.int64] | None = None


class ClassCounts:
    """Counts batches of predictions and labels.

    Args:
        num_classes: Number of classes.
        task: What the targets are.
        ignore_index: The target that does not count.
        chosen: The labels that a report is made of, which matters to the mean over samples; ``None`` for all.
        matrix: Whether every pair of label and prediction is counted too.

    Example:
        >>> counts = ClassCounts(2)
        >>> counts.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
        >>> counts.totals().true, counts.totals().predicted, counts.totals().hits
        (array([2, 1]), array([1, 2]), array([1, 1]))
    """

    def __init__(
        self,
        num_classes: int,
        *,
        task: str = "auto",
        ignore_index: int | None = IGNORED,
        chosen: tuple[int, ...] | None = None,
        matrix: bool = False,
    ) -> None:
        self.num_classes, self.task, self.ignore_index = num_classes, task, ignore_index
        self._chosen = list(chosen) if chosen is not None else None
        # one more, for numbers that are no classes
        beyond = num_classes + 1
        # always all of them, so that ranks can add up although one has seen nothing
        self._sizes = {
            **dict.fromkeys(("true", "predicted", "hits"), beyond),
            **dict.fromkeys(
                ("row_true", "row_predicted_0", "row_predicted_1", "row_hits_0", "row_hits_1"), num_classes
            ),
            **dict.fromkeys(("samples_0", "samples_1"), 6),
            "single": 6,
            "evidence": len(_EVIDENCE),
            "readings": len(_READINGS),
            "cells": beyond**2 if matrix else 0,
        }
        self._sums: dict[str, Tensor] | None = None

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count a batch. Does not wait for the device.

        Raises:
            ValueError: If the batch cannot be read.
        """
        batch = read_batch(predictions.detach(), targets, self.task, self.ignore_index)
        if self._sums is None:
            self._sums = self._zeros(targets.device)
        self._sums["readings"][_READINGS.index(batch.reading)] += 1
        if batch.reading == "score per label":
            self._count_single(batch)
            return
        if batch.reading in ("rows", "rows of numbers") and batch.predictions.shape[1] == self.num_classes:
            self._count_rows(batch)
            if self.task == "multilabel":
                return
        elif batch.reading == "rows":
            found = batch.predictions.shape[1]
            masks = "; masks of one score for each label need task='binary'" if self.num_classes == 2 else ""
            raise ValueError(
                f"`num_classes` {self.num_classes} must be the number of scores in a row, got {found}{masks}."
            )
        self._count_classes(batch)

    def totals(self, vector: Tensor | None = None) -> ClassTotals:
        """Return the counts.

        Args:
            vector: :attr:`vector` of all ranks, added up; ``None`` for this process's own.

        Raises:
            ValueError: If a label or a prediction is no class, or what was counted has two readings.
        """
        host = (self.vector if vector is None else vector).to("cpu", torch.float64).numpy()
        sums = dict(zip(self._sizes, np.split(host, np.cumsum(list(self._sizes.values()))[:-1]), strict=True))
        evidence = dict(zip(_EVIDENCE, sums["evidence"].tolist(), strict=True))
        seen = [name for name, count in zip(_READINGS, sums["readings"], strict=True) if count]
        if len(seen) > 1 and set(seen) != {"scores of classes", "class numbers"}:
            raise ValueError(f"The batches of a report must be alike, but were read as {' and as '.join(seen)}.")
        reading = seen[0] if seen else ""
        why = contradiction(evidence, reading, self.task)
        if why:
            raise ValueError(why)
        # 1: probabilities
        kind = int(evidence["outside"] == 0)
        if reading == "score per label":
            return self._single(sums["single"], kind)
        if reading == "rows of numbers" and self._are_rows_of_numbers(evidence):
            one_hot = evidence["one_hot"] == evidence["rows"]
            return self._of_rows(sums, 1, evidence, one_label=one_hot)
        if is_multilabel(evidence, reading, self.task):
            return self._of_rows(sums, kind, evidence, one_label=False)
        return self._of_classes(sums)

    @property
    def vector(self) -> Tensor:
        """All counts in one row."""
        sums = self._zeros(torch.device("cpu")) if self._sums is None else self._sums
        return torch.cat(list(sums.values()))

    def reset(self) -> None:
        """Count from zero."""
        self._sums = None

    # -- one batch

    def _zeros(self, device: torch.device) -> dict[str, Tensor]:
        return {name: torch.zeros(size, dtype=widest(device), device=device) for name, size in self._sizes.items()}

    def _add(self, name: str, value: Tensor) -> None:
        # made by `update`
        assert self._sums is not None  # noqa: S101
        self._sums[name] += value.to(self._sums[name])

    def _count_classes(self, batch: LabelledBatch) -> None:
        if batch.reading == "rows of numbers":
            batch = LabelledBatch(
                "class numbers", batch.predictions.reshape(-1), batch.targets.reshape(-1), self.ignore_index
            )
        size, counted = self.num_classes, batch.counted
        self._add("true", count_by_class(batch.labels, counted, size))
        self._add("predicted", count_by_class(batch.classes, counted, size))
        self._add("hits", count_by_class(batch.labels, batch.right, size))
        if self._sizes["cells"]:
            rows, columns = (n.long() for n in (batch.labels, batch.classes))
            rows, columns = (torch.where((n >= 0) & (n < size), n, size) for n in (rows, columns))
            self._add("cells", count_by_class(rows * (size + 1) + columns, counted, (size + 1) ** 2)[:-1])

    def _count_single(self, batch: LabelledBatch) -> None:
        positive, counted = batch.positive, batch.counted_entries
        parts = [counted, positive]
        for logits in (True, False):
            predicted = batch.predicted(logits=logits)
            parts += [predicted, predicted & positive]
        self._add("single", torch.stack(parts).sum(1))
        self._note({"outside": batch.outside, "not_binary": batch.not_binary})

    def _count_rows(self, batch: LabelledBatch) -> None:
        positive = batch.positive
        self._add("row_true", positive.sum(0))
        for kind, logits in enumerate((True, False)):
            predicted = batch.predicted(logits=logits)
            hits = predicted & positive
            self._add(f"row_predicted_{kind}", predicted.sum(0))
            self._add(f"row_hits_{kind}", hits.sum(0))
            self._add(f"samples_{kind}", self._by_sample(predicted, positive, hits))
        soft, multi_hot, other = batch.row_kinds
        self._note(
            {
                "outside": batch.outside,
                "not_binary": batch.not_binary,
                "soft": soft,
                "multi_hot": multi_hot,
                "other": other,
                "rows": torch.ones_like(soft),
                "one_hot": is_one_hot(batch.predictions) & is_one_hot(batch.targets),
                "not_binary_predictions": (batch.predictions != 0) & (batch.predictions != 1),
            }
        )

    def _by_sample(self, predicted: Tensor, positive: Tensor, hits: Tensor) -> Tensor:
        """Return the sums over samples of precision, recall and F1 where defined, and where they are not, how often."""
        if self._chosen is not None:
            predicted, positive, hits = (part[:, self._chosen] for part in (predicted, positive, hits))
        kind = widest(predicted.device)
        both, made, true = (part.sum(1, dtype=kind) for part in (hits, predicted, positive))
        pairs = ((both, made), (both, true), (2 * both, made + true))
        ratios = torch.stack([numerator / denominator for numerator, denominator in pairs])
        return torch.cat([ratios.nansum(1), ratios.isnan().sum(1)])

    def _note(self, evidence: dict[str, Tensor]) -> None:
        counts = [evidence[name].sum() if name in evidence else None for name in _EVIDENCE]
        zero = torch.zeros_like(next(count for count in counts if count is not None))
        self._add("evidence", torch.stack([zero if count is None else count for count in counts]))

    # -- what was counted

    def _are_rows_of_numbers(self, evidence: dict[str, float]) -> bool:
        """Whether whole numbers with a column per class are rows of 0 and 1, and no class numbers."""
        if not evidence["rows"] or evidence["not_binary"] or evidence["not_binary_predictions"]:
            return False
        if self.task == "auto" and self.num_classes == 2 and evidence["one_hot"] != evidence["rows"]:
            raise ValueError(
                "Predictions and targets of two columns of 0 and 1 can be class numbers or two labels at once: give "
                "task='multiclass' or task='multilabel'."
            )
        return self.task == "auto" or evidence["one_hot"] == evidence["rows"]

    def _single(self, sums: NDArray[Any], kind: int) -> ClassTotals:
        if self.num_classes != 2:
            raise ValueError(
                f"`num_classes` {self.num_classes} needs a score for every class, but the predictions have one score "
                "for each label, which is for two classes."
            )
        counted, positive, predicted, hits = (int(sums[place]) for place in (0, 1, 2 + 2 * kind, 3 + 2 * kind))
        neither = counted - positive - predicted + hits
        table = np.array([[neither, predicted - hits], [positive - hits, hits]])
        return ClassTotals(table.sum(1), table.sum(0), np.diag(table), matrix=table if self._sizes["cells"] else None)

    def _of_rows(
        self, sums: dict[str, NDArray[Any]], kind: int, evidence: dict[str, float], *, one_label: bool
    ) -> ClassTotals:
        names = ("row_true", f"row_predicted_{kind}", f"row_hits_{kind}")
        true, predicted, hits = (sums[name].astype(np.int64) for name in names)
        samples = None if one_label else sums[f"samples_{kind}"]
        return ClassTotals(true, predicted, hits, samples, int(evidence["rows"]))

    def _of_classes(self, sums: dict[str, NDArray[Any]]) -> ClassTotals:
        true, predicted, hits = (sums[name].astype(np.int64) for name in ("true", "predicted", "hits"))
        for name, wrong in (("targets", true[-1]), ("predictions", predicted[-1])):
            if wrong:
                raise ValueError(
                    f"All {name} must be from 0 to {self.num_classes - 1} with `num_classes` {self.num_classes}, got "
                    f"{wrong} others."
                )
        side = self.num_classes + 1
        matrix = sums["cells"].astype(np.int64).reshape(side, side)[:-1, :-1] if self._sizes["cells"] else None
        return ClassTotals(true[:-1], predicted[:-1], hits[:-1], matrix=matrix)
