"""Predictions beside their labels: the counts that accuracy and its relatives are made of.

Counting stays on the device; nothing here waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
"""The label that torch's cross-entropy leaves out; so do all counts here."""


class LabelledBatch:
    """One batch of predictions and labels, flattened.

    Args:
        predictions: One of: class numbers of the targets' shape; scores (logits or probabilities) with one more
            dimension, the classes, last or, as in torch's cross-entropy, second (where both fit, last is meant); or
            logits of the targets' shape or ``(..., 1)``, which are those of class 1 against class 0.
        targets: Class numbers; for two classes also 0.0 and 1.0. A label of -100 is not counted.

    Raises:
        ValueError: If the shapes do not belong together.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
        >>> batch = LabelledBatch(logits, torch.tensor([0, 1, 1]))
        >>> batch.correct(), batch.label_count()
        (tensor(2), tensor(3))
    """

    def __init__(self, predictions: Tensor, targets: Tensor) -> None:
        predictions = predictions.detach()
        self._scores: Tensor | None = None
        self._classes: Tensor | None = None
        self._binary: tuple[Tensor, Tensor, Tensor] | None = None
        self._label_count: Tensor | None = None
        if predictions.dim() == targets.dim() + 1 and predictions.shape[-1] == 1:
            predictions = predictions.squeeze(-1)
        if predictions.shape == targets.shape:
            flat = predictions.reshape(-1)
            self._classes = (flat >= 0).long() if flat.is_floating_point() else flat
        else:
            self._scores = _rows(predictions, targets)
        self.targets = targets if targets.dim() == 1 else targets.reshape(-1)

    @property
    def classes(self) -> Tensor:
        """The predicted class of every label: the first of the largest scores."""
        if self._classes is None:
            self._classes = self.scores.argmax(1)
        return self._classes

    @property
    def scores(self) -> Tensor:
        """One row of scores per label."""
        if self._scores is None:
            raise ValueError("`top5_accuracy` needs a score for every class, but the predictions are class numbers.")
        return self._scores

    def label_count(self) -> Tensor:
        """Return the number of labels that count."""
        if self._label_count is None:
            self._label_count = torch.count_nonzero(self.targets != IGNORED)
        return self._label_count

    def correct(self) -> Tensor:
        """Return the number of labels that equal the predicted class."""
        return torch.count_nonzero(self.classes == self.targets)

    def correct_of(self, k: int) -> Tensor:
        """Return the number of labels with fewer than ``k`` scores strictly above their own: ties count as correct.

        A row with a score that is not finite is wrong, and so is a label without a score.
        """
        scores, targets = self.scores, self.targets
        count = scores.shape[1]
        own = scores.gather(1, targets.long().clamp(0, count - 1)[:, None])
        right = ((scores > own).sum(1) < k) & scores.isfinite().all(1)
        return torch.count_nonzero(right & (targets >= 0) & (targets < count))

    def binary_counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return how many labels are 1 and predicted 1, predicted 1, and 1."""
        if self._binary is None:
            if self._scores is not None and self._scores.shape[1] > 2:
                raise ValueError(
                    "`matthews_correlation_coefficient` is for two classes, but the predictions have "
                    f"{self._scores.shape[1]}; for more, give torchmetrics.MatthewsCorrCoef('multiclass', "
                    "num_classes=...)."
                )
            predicted = (self.classes == 1) & (self.targets != IGNORED)
            actual = self.targets == 1
            self._binary = (
                torch.count_nonzero(predicted & actual),
                torch.count_nonzero(predicted),
                torch.count_nonzero(actual),
            )
        return self._binary


def _rows(predictions: Tensor, targets: Tensor) -> Tensor:
    if predictions.dim() == targets.dim() + 1:
        if predictions.shape[:-1] == targets.shape:
            return predictions if predictions.dim() == 2 else predictions.reshape(-1, predictions.shape[-1])
        if predictions.shape[:1] == targets.shape[:1] and predictions.shape[2:] == targets.shape[1:]:
            return predictions.movedim(1, -1).reshape(-1, predictions.shape[1])
    raise ValueError(
        f"Predictions of shape {tuple(predictions.shape)} do not belong to targets of shape {tuple(targets.shape)}: "
        "give class numbers of the targets' shape, or scores with one more dimension for the classes, last or second."
    )


def class_numbers(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the predicted classes and the labels that count, flattened, as whole numbers."""
    batch = LabelledBatch(predictions, targets)
    return batch.classes.long(), batch.targets.long()


__all__ = ["IGNORED", "LabelledBatch", "class_numbers"]
