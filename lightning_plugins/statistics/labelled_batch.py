"""Predictions beside their labels: which of them accuracy and its relatives count.

Everything stays on the device; nothing here waits for it. Batches may be small, so every operation counts: masks are
made here, and added up together by whoever wants several.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
"""The label that torch's cross-entropy leaves out; so do all counts here."""


class LabelledBatch:
    """One batch of predictions and labels, flattened. Every mask has one truth value per label.

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
        >>> batch.right(), batch.counted()
        (tensor([ True,  True, False]), tensor([True, True, True]))
    """

    def __init__(self, predictions: Tensor, targets: Tensor) -> None:
        predictions = predictions.detach()
        self._scores: Tensor | None = None
        self._classes: Tensor | None = None
        self._predicted: Tensor | None = None
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

    def counted(self) -> Tensor:
        """Return which labels count."""
        return self.targets != IGNORED

    def right(self) -> Tensor:
        """Return which labels equal the predicted class."""
        return self.classes == self.targets

    def right_of(self, k: int) -> Tensor:
        """Return which labels have fewer than ``k`` scores strictly above their own: ties count as right.

        A row with a score that is not finite is wrong, and so is a label without a score.
        """
        scores, targets = self.scores, self.targets.long()
        classes = scores.shape[1]
        nearest = targets.clamp(0, classes - 1)
        own = scores.gather(1, nearest.unsqueeze(1))
        if scores.is_floating_point():
            # 0 times the row's largest magnitude: NaN if a score is not finite, and no score is at most NaN
            own = torch.add(own, torch.linalg.vector_norm(scores, torch.inf, 1, keepdim=True), alpha=0)
        return ((scores <= own).sum(1) > max(classes - k, 0)) & (nearest == targets)

    def predicted(self) -> Tensor:
        """Return which labels that count are predicted to be 1, of two classes."""
        if self._predicted is None:
            if self._scores is not None and self._scores.shape[1] > 2:
                raise ValueError(
                    "`matthews_correlation_coefficient` is for two classes, but the predictions have "
                    f"{self._scores.shape[1]}; for more, give torchmetrics.MatthewsCorrCoef('multiclass', "
                    "num_classes=...)."
                )
            self._predicted = (self.classes == 1) & self.counted()
        return self._predicted

    def actual(self) -> Tensor:
        """Return which labels are 1."""
        return self.targets == 1


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
