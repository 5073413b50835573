"""Predictions beside their labels: what a batch's types and shapes say about them, and what a phase's values decide.

Some pairs have two readings. A number per label may be a logit or a probability; a row of numbers beside each row of
scores may be one-hot, soft or multi-hot. Then both readings are counted, and so is the evidence, all on the device;
:func:`decided` chooses when the counts are read. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Columns = Mapping[str, Tensor]
"""Name -> sums, with one element (or one row of elements) per row of statistics."""

TASKS = ("auto", "multiclass", "binary", "multilabel")

IGNORED = -100
"""The label that torch's cross-entropy leaves out; so do all counts here by default."""


Reading = Literal["scores of classes", "class numbers", "score per label", "rows", "rows of numbers"]

WIDEST = {"mps": torch.float32}
"""The widest type that a device adds in, where it is not float64."""

NO_TOP_5 = "`top5_accuracy` needs a score for every class, and one class for every label."
# types that torch only stores: it neither compares them with others nor adds them
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
# of a row's sum: half precision, label smoothing and mixing round
_TOLERANCE = 0.01


@dataclass
class LabelledBatch:
    """One batch of predictions and labels, flattened.

    Args:
        reading: What they are. ``"scores of classes"``: ``predictions`` is ``[labels, classes]``, ``targets`` one
            class number per label, or a row like the predictions'. ``"class numbers"``: one class number per label in
            both. ``"score per label"``: one logit or probability per label, and targets of 0 and 1. ``"rows"``: both
            are ``[rows, classes]``, and the targets may be one-hot, soft or multi-hot. ``"rows of numbers"``: both are
            ``[rows, columns]`` of whole numbers, which may be class numbers, one-hot or multi-hot.
        predictions: See above.
        targets: See above.
        ignore_index: The target that does not count; NaN never does. ``None``: all others count.
    """

    reading: Reading
    predictions: Tensor
    targets: Tensor
    ignore_index: int | None

    @cached_property
    def labels(self) -> Tensor:
        """The class number of every label; for rows the first of the largest entries."""
        targets = self.targets.byte() if self.targets.dtype == torch.bool else self.targets
        return targets.argmax(1) if targets.dim() == 2 else targets

    @cached_property
    def classes(self) -> Tensor:
        """The predicted class of every label: the first of the largest scores."""
        return self.predictions.argmax(1) if self.predictions.dim() == 2 else self.predictions

    @cached_property
    def counted(self) -> Tensor:
        """Which labels count; a row with an entry that does not count does not either."""
        counted = self.counted_entries
        return counted.all(1) if counted.dim() == 2 else counted

    @cached_property
    def right(self) -> Tensor:
        """Which labels that count equal the predicted class."""
        right = self.classes == self.labels
        if self.targets.dim() == 1 and not self._could_be_predicted:
            # what does not count is no class, and equals none
            return right
        return right & self.counted

    def right_of(self, k: int) -> Tensor:
        """Return which labels that count are among the ``k`` largest scores: see :func:`right_of`."""
        if self.predictions.dim() != 2:
            raise ValueError(NO_TOP_5)
        right = right_of(k, self.predictions, self.labels)
        return right & self.counted if self.targets.dim() == 2 or self._could_be_predicted else right

    @cached_property
    def counted_entries(self) -> Tensor:
        """Which entries of the targets count."""
        targets, ignored = self.targets, self.ignore_index
        if ignored is not None and not _holds(targets.dtype, ignored):
            ignored = None
        counted = torch.ones_like(targets, dtype=torch.bool) if ignored is None else targets != ignored
        # not NaN
        return counted & (targets == targets) if targets.is_floating_point() else counted  # noqa: PLR0124

    @cached_property
    def positive(self) -> Tensor:
        """Which entries that count are 1, or nearer to 1 than to 0."""
        return (self.targets >= 0.5) & self.counted_entries

    def predicted(self, *, logits: bool) -> Tensor:
        """Return which entries that count are predicted to be 1: from 0 on for logits, from 0.5 on otherwise."""
        return (self.predictions >= (0.0 if logits else 0.5)) & self.counted_entries

    def right_entries(self, *, logits: bool) -> Tensor:
        """Return which entries that count are predicted right."""
        return (self.predicted(logits=logits) == self.positive) & self.counted_entries

    def flattened(self) -> LabelledBatch:
        """Return rows of numbers as what they are if they are class numbers."""
        predictions, targets = self.predictions.reshape(-1), self.targets.reshape(-1)
        return LabelledBatch("class numbers", predictions, targets, self.ignore_index)

    @cached_property
    def outside(self) -> Tensor:
        """Which entries that count have a score that is no probability: then all are logits."""
        return ((self.predictions < 0) | (self.predictions > 1)) & self.counted_entries

    @cached_property
    def not_binary(self) -> Tensor:
        """Which entries that count are neither 0 nor 1 nor between them."""
        return ((self.targets < 0) | (self.targets > 1)) & self.counted_entries

    @cached_property
    def row_kinds(self) -> tuple[Tensor, Tensor, Tensor]:
        """Which rows that count are soft, which are multi-hot, and which are neither of these nor one-hot."""
        targets = self.targets if self.targets.is_floating_point() else self.targets.float()
        total, squares = targets.sum(1, dtype=torch.float32), targets.square().sum(1, dtype=torch.float32)
        one = (total - 1).abs() < _TOLERANCE
        # entries between 0 and 1 have a sum of squares of at most their sum, and the same one where all are 0 or 1
        whole = (total - squares).abs() < _TOLERANCE
        inside = ~self.not_binary.any(1)
        soft, multi_hot = one & ~whole & inside, ~one & whole & inside
        other = ~(soft | multi_hot | (one & whole & inside))
        return soft & self.counted, multi_hot & self.counted, other & self.counted

    @property
    def _could_be_predicted(self) -> bool:
        """Whether a label that does not count could equal a predicted class."""
        return self.ignore_index is not None and self.ignore_index >= 0


def right_of(k: int, scores: Tensor, labels: Tensor) -> Tensor:
    """Return which labels have fewer than ``k`` scores strictly above their own: ties count as right.

    A row with a score that is not finite is wrong, and so is a label without a score.
    """
    classes = scores.shape[1]
    labels = labels.long()
    nearest = labels.clamp(0, classes - 1)
    return (scores_up_to(scores, nearest.unsqueeze(1)) > max(classes - k, 0)) & (nearest == labels)


def scores_up_to(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how many scores of each row are at most that of its label; none if a score of the row is not finite.

    Args:
        scores: ``[labels, classes]``.
        labels: ``[labels, 1]``, each the number of a class.
    """
    own = scores.gather(1, labels)
    if scores.is_floating_point():
        # 0 times the row's largest magnitude: NaN if a score is not finite, and no score is at most NaN
        own = torch.add(own, torch.linalg.vector_norm(scores, torch.inf, 1, keepdim=True), alpha=0)
    return (scores <= own).sum(1)


def read_batch(
    predictions: Tensor, targets: Tensor, task: str = "auto", ignore_index: int | None = IGNORED
) -> LabelledBatch:
    """Return a batch as its types and shapes, or the task, say that it is to be read.

    Args:
        predictions: One of: class numbers of the targets' shape; scores (logits or probabilities) with one more
            dimension than class numbers, the classes, last or, as in torch's cross-entropy, second (where both fit:
            last, from four dimensions on second); one score per label, of the targets' shape or ``(..., 1)``, for
            class 1 against class 0; or rows of scores of the targets' shape.
        targets: Class numbers, 0 and 1, or rows with an entry per class: one-hot, soft or multi-hot.
        task: ``"auto"``, or what the targets are.
        ignore_index: The target that does not count; NaN never does.

    Raises:
        ValueError: If the shapes do not belong together, or do not fit the task.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
        >>> batch = read_batch(logits, torch.tensor([0, 1, 1]))
        >>> batch.reading, batch.right.tolist()
        ('scores of classes', [True, True, False])
    """
    predictions, targets = (part.long() if part.dtype in _UNSIGNED else part for part in (predictions, targets))
    if predictions.dim() == 2 and targets.dim() == 1 and predictions.shape[1] > 1 and len(predictions) == len(targets):
        _check_task(task, "scores of classes", predictions.shape[1])
        return LabelledBatch("scores of classes", predictions, targets, ignore_index)
    predictions, targets = _of_one_shape(predictions, targets)
    if predictions.shape == targets.shape:
        return _same_shape(predictions, targets, task, ignore_index)
    scores = _class_last(predictions, targets)
    _check_task(task, "scores of classes", scores.shape[1])
    return LabelledBatch("scores of classes", scores, targets.reshape(-1), ignore_index)


def _same_shape(predictions: Tensor, targets: Tensor, task: str, ignore_index: int | None) -> LabelledBatch:
    if not predictions.is_floating_point() and task in ("auto", "multiclass"):
        if predictions.dim() == 2 and predictions.shape[1] > 1 and not targets.is_floating_point():
            return LabelledBatch("rows of numbers", predictions, targets, ignore_index)
        return LabelledBatch("class numbers", predictions.reshape(-1), targets.reshape(-1), ignore_index)
    axis = -1 if predictions.dim() < 4 else 1
    if predictions.dim() < 2 or predictions.shape[axis] == 1 or task == "binary":
        _check_task(task, "score per label", 1)
        return LabelledBatch("score per label", predictions.reshape(-1), targets.reshape(-1), ignore_index)
    classes = predictions.shape[axis]
    rows = [part.movedim(axis, -1).reshape(-1, classes) for part in (predictions, targets)]
    reading: Reading = "scores of classes" if task == "multiclass" else "rows"
    return LabelledBatch(reading, rows[0], rows[1], ignore_index)


def _of_one_shape(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Take away a dimension of size 1 that one of the two has and the other has not."""
    more, less = predictions.dim(), targets.dim()
    if predictions.numel() == targets.numel() == 1:
        return predictions.reshape(1), targets.reshape(1)
    if more == less + 1:
        for axis in (-1, min(1, less)):
            if predictions.squeeze(axis).shape == targets.shape:
                return predictions.squeeze(axis), targets
    axis = -1 if less < 4 else 1
    if less > 1 and targets.shape[axis] == 1 and (more == less - 1 or (more == less and predictions.shape[axis] != 1)):
        return _of_one_shape(predictions, targets.squeeze(axis))
    return predictions, targets


def _class_last(predictions: Tensor, targets: Tensor) -> Tensor:
    if predictions.dim() == targets.dim() + 1:
        last = predictions.shape[:-1] == targets.shape
        second = predictions.shape[:1] == targets.shape[:1] and predictions.shape[2:] == targets.shape[1:]
        if second and (not last or predictions.dim() >= 4):
            return predictions.movedim(1, -1).reshape(-1, predictions.shape[1])
        if last:
            return predictions.reshape(-1, predictions.shape[-1])
    raise ValueError(
        f"Predictions of shape {tuple(predictions.shape)} do not belong to targets of shape {tuple(targets.shape)}: "
        "give class numbers of the targets' shape, or scores with one more dimension for the classes, last or second."
    )


def _check_task(task: str, reading: Reading, classes: int) -> None:
    fits = {
        "scores of classes": task in ("auto", "multiclass") or (task == "binary" and classes == 2),
        "score per label": task in ("auto", "binary", "multilabel"),
    }[reading]
    if not fits:
        found = f"{classes} scores for each" if classes > 1 else "one score for each"
        needs = {"multiclass": "a score per class", "binary": "one score or two", "multilabel": "rows of 0 and 1"}
        raise ValueError(f"`task` {task!r} needs {needs[task]} for each label, but the predictions have {found}.")


def _holds(kind: torch.dtype, number: int) -> bool:
    """Return whether a type has a number: comparing with one that it does not have would wrap around."""
    if kind.is_floating_point or kind == torch.bool:
        return kind.is_floating_point
    limits = torch.iinfo(kind)
    return limits.min <= number <= limits.max


def is_one_hot(rows: Tensor) -> Tensor:
    """Return which rows have a single 1 and otherwise 0."""
    return ((rows == 1).sum(1) == 1) & ((rows == 0).sum(1) == rows.shape[1] - 1)


def count_by_class(numbers: Tensor, counted: Tensor, size: int) -> Tensor:
    """Return how often each class number occurs, and last how often another number does."""
    numbers = numbers.long()
    places = torch.where((numbers >= 0) & (numbers < size), numbers, size)
    kind = widest(numbers.device)
    return torch.zeros(size + 1, dtype=kind, device=numbers.device).scatter_add_(0, places, counted.to(kind))


def widest(device: torch.device) -> torch.dtype:
    """Return the widest type that a device adds in: float64, on Apple's GPUs float32."""
    return WIDEST.get(device.type, torch.float64)
