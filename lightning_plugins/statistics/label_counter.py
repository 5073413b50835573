"""Counts of a phase's labels: the vector that every batch adds to, and the short way for the plainest batches.

Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import torch
from torch import Tensor

from lightning_plugins.statistics.labels import (
    IGNORED,
    NO_TOP_5,
    LabelledBatch,
    count_by_class,
    is_one_hot,
    read_batch,
    scores_up_to,
    widest,
)

# classes that are told apart where only their numbers are known
_MOST_NUMBERS = 1024
# of a batch that goes the short way, on which a label takes 48 bytes and more
_MOST_PLAIN_LABELS = 1 << 12


class LabelCounter:
    """Counts the batches of one phase, each as one vector that lies on the device.

    Args:
        wanted: Which counts: ``labels``, ``right``, ``right_of_5``, and ``by_label`` and ``by_prediction``, which have
            an element for every class.
        task: What the user said that the targets are.
        ignore_index: The target that does not count.

    Attributes:
        reading: How the phase's batches are read; empty before the first.
        layout: Name and number of elements of each count, in the vector's order.
        names: Their names alone.
        is_plain: Whether they are scores of classes, counted by a number each, and further ones may go the short way.

    Example:
        >>> counter = LabelCounter(["labels", "right"], "auto", -100)
        >>> counter.add(None, torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])), counter.layout
        (tensor([2., 1.], dtype=torch.float64), (('labels', 1), ('right', 1)))
    """

    def __init__(self, wanted: Collection[str], task: str, ignore_index: int | None) -> None:
        self.wanted, self.task, self.ignore_index = wanted, task, ignore_index
        self._plain = PlainLabels(IGNORED if ignore_index is None else ignore_index, top_5="right_of_5" in wanted)
        self.begin()

    def begin(self) -> None:
        """Begin a phase, whose batches may be of another kind."""
        self.reading = ""
        self.layout: tuple[tuple[str, int], ...] = ()
        self.names: tuple[str, ...] = ()
        self.is_plain = False

    def add(self, counts: Tensor | None, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the phase's counts so far with those of a batch; ``counts`` itself is left as it is.

        Raises:
            ValueError: If the batch cannot be read, or is of another kind than those before it.
        """
        if self.is_plain and counts is not None and self._plain.fits(predictions, targets):
            return self._plain.add(counts, predictions, targets)
        found = self._count(predictions, targets)
        return found if counts is None else counts + found

    def _count(self, predictions: Tensor, targets: Tensor) -> Tensor:
        batch = read_batch(predictions, targets, self.task, self.ignore_index)
        if batch.reading in ("score per label", "rows"):
            groups, vectors = self._two_readings(batch)
        elif batch.reading == "rows of numbers":
            groups, vectors = self._rows_of_numbers(batch)
        else:
            groups, vectors = [self._labels(batch)], self._by_class(batch)
        parts = [torch.stack(list(masks.values())).sum(1, dtype=widest(predictions.device)) for masks in groups]
        self._lay_out(batch, groups, vectors)
        parts += vectors.values()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _lay_out(self, batch: LabelledBatch, groups: list[dict[str, Tensor]], vectors: dict[str, Tensor]) -> None:
        sizes = [(name, 1) for masks in groups for name in masks] + [(name, len(v)) for name, v in vectors.items()]
        if self.reading and (self.reading != batch.reading or self.layout != tuple(sizes)):
            raise ValueError(
                f"The batches of a phase must be alike, but predictions and targets were read as {self.reading} before "
                f"and as {batch.reading} now, of {batch.predictions.shape[-1]} classes."
            )
        self.reading, self.layout = batch.reading, tuple(sizes)
        self.names = tuple(name for name, _ in sizes)
        ignored = self.ignore_index
        self.is_plain = batch.reading == "scores of classes" and not vectors and ignored is not None and ignored < 0

    def _labels(self, batch: LabelledBatch) -> dict[str, Tensor]:
        masks = {"labels": batch.counted, "right": batch.right}
        if "right_of_5" in self.wanted:
            masks["right_of_5"] = batch.right_of(5)
        return masks

    def _by_class(self, batch: LabelledBatch) -> dict[str, Tensor]:
        if "by_label" not in self.wanted:
            return {}
        size = batch.predictions.shape[1] if batch.predictions.dim() == 2 else _MOST_NUMBERS
        pairs = (("by_label", batch.labels), ("by_prediction", batch.classes))
        return {name: count_by_class(numbers, batch.counted, size) for name, numbers in pairs}

    def _two_readings(self, batch: LabelledBatch) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        entries = self._entries(batch)
        if batch.reading == "score per label" or self.task == "multilabel":
            if "right_of_5" in self.wanted:
                raise ValueError(NO_TOP_5)
            return [entries], {}
        kinds = dict(zip(("soft", "multi_hot", "other"), batch.row_kinds, strict=True))
        return [self._labels(batch) | kinds, entries], self._by_class(batch)

    def _rows_of_numbers(self, batch: LabelledBatch) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        flat = LabelledBatch(
            "class numbers", batch.predictions.reshape(-1), batch.targets.reshape(-1), self.ignore_index
        )
        whole = (batch.predictions == batch.targets).all(1)
        one_hot = is_one_hot(batch.predictions) & is_one_hot(batch.targets)
        rows = {"rows": torch.ones_like(whole), "rows_right": whole, "one_hot": one_hot}
        vectors = self._by_class(flat)
        if vectors:
            for name, numbers in (("rows_by_label", batch.targets), ("rows_by_prediction", batch.predictions)):
                vectors[name] = (numbers == 1).sum(0, dtype=widest(numbers.device))
        return [self._labels(flat), rows], vectors

    def _entries(self, batch: LabelledBatch) -> dict[str, Tensor]:
        masks = {
            "entries": batch.counted_entries,
            "right_by_logits": batch.right_entries(logits=True),
            "right_by_probabilities": batch.right_entries(logits=False),
            "outside": batch.outside,
            "not_binary": batch.not_binary,
        }
        if "by_label" in self.wanted:
            masks["positive"] = batch.positive
            masks["predicted_by_logits"] = batch.predicted(logits=True)
            masks["predicted_by_probabilities"] = batch.predicted(logits=False)
        return {name: mask.reshape(-1) for name, mask in masks.items()}


class PlainLabels:
    """Adds batches of ``[labels, classes]`` scores and int64 labels, as nearly every module has, by three operations.

    The predicted class and the label that does not count stand below one another, and are compared with the labels at
    once. One product with fixed weights then adds up what came out: 1 for each label that is right, and for the labels
    that count their number less 1 for each that does not. A label that does not count is no class, so none is both.

    Args:
        ignore_index: The label that does not count; below 0.
        top_5: Whether labels among the five largest scores are counted too.

    Example:
        >>> plain, counts = PlainLabels(-100, top_5=False), torch.zeros(2, dtype=torch.float64)
        >>> plain.add(counts, torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, -100]))
        tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(self, ignore_index: int, *, top_5: bool) -> None:
        self.ignore_index, self.top_5 = ignore_index, top_5
        self._room: tuple[int, torch.device] | None = None

    def __reduce__(self) -> tuple[object, ...]:
        """Leave the room behind: a copy makes its own."""
        return functools.partial(PlainLabels, self.ignore_index, top_5=self.top_5), ()

    @staticmethod
    def fits(predictions: Tensor, targets: Tensor) -> bool:
        """Return whether a batch is of this kind."""
        return (
            targets.dtype is torch.int64
            and targets.dim() == 1
            and predictions.dim() == 2
            and predictions.shape[1] > 1
            and 0 < targets.shape[0] == predictions.shape[0] <= _MOST_PLAIN_LABELS
        )

    def add(self, counts: Tensor, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return ``counts`` and the batch's: its labels, those that are right, those among the five largest."""
        if self._room != (targets.shape[0], targets.device):
            self._make_room(targets.shape[0], targets.device)
        torch.argmax(predictions, 1, out=self._classes)
        if self.top_5:
            classes = predictions.shape[1]
            torch.clamp(targets, 0, classes - 1, out=self._nearest)
            torch.eq(self._numbers, targets, out=self._equal)
            # 0 where the label is no class
            torch.mul(scores_up_to(predictions, self._nearest.unsqueeze(1)), self._is_class, out=self._right_of_5)
            torch.gt(self._right_of_5, max(classes - 5, 0), out=self._right_of_5)
        else:
            torch.eq(self._numbers, targets, out=self._equal)
        return torch.addmv(counts, self._weights, self._marks)

    def _make_room(self, labels: int, device: torch.device) -> None:
        self._room = labels, device
        # as many counts as comparisons; one more row for the five largest
        kinds = 2 + self.top_5
        rows = kinds + self.top_5
        # a tensor that is made in inference mode could not be written into outside of it
        with torch.inference_mode(mode=False):
            self._numbers = torch.full((kinds, labels), self.ignore_index, device=device)
            self._classes, self._nearest = self._numbers[0], self._numbers[-1]
            # a mark for each comparison, row by row, those of the five largest, and one that is always 1
            self._marks = torch.ones(rows * labels + 1, dtype=widest(device), device=device)
            marks = self._marks[:-1].view(rows, labels)
            self._equal, self._is_class, self._right_of_5 = marks[:kinds], marks[kinds - 1], marks[-1]
            weights = self._marks.new_zeros(kinds, rows * labels + 1)
            by_row = weights[:, :-1].view(kinds, rows, labels)
            by_row[0, 1], weights[0, -1], by_row[1, 0] = -1, labels, 1
            if self.top_5:
                by_row[2, -1] = 1
            self._weights = weights
