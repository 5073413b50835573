"""The twelve events of a fit, the five actions that cancel a part of it, and where each of them has a meaning."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from lightning_plugins.core.validation import did_you_mean, shown


class Event(str, Enum):
    """A moment of a fit. The values are Swift for TensorFlow's spellings.

    In a fit of one epoch with one training and one validation batch they come in this order:

    ``FIT_START``, ``EPOCH_START``, ``TRAINING_START``, ``BATCH_START``, ``UPDATE_START``, ``BATCH_END``,
    ``TRAINING_END``, ``VALIDATION_START``, ``BATCH_START``, ``INFERENCE_PREDICTION_END``, ``BATCH_END``,
    ``VALIDATION_END``, ``EPOCH_END``, ``FIT_END``

    Example:
        >>> Event("batchEnd") is Event.BATCH_END
        True

    References:
        Swift for TensorFlow, swift-models, ``TrainingLoopEvent``.
    """

    FIT_START = "fitStart"
    FIT_END = "fitEnd"
    EPOCH_START = "epochStart"
    EPOCH_END = "epochEnd"
    TRAINING_START = "trainingStart"
    TRAINING_END = "trainingEnd"
    VALIDATION_START = "validationStart"
    VALIDATION_END = "validationEnd"
    BATCH_START = "batchStart"
    BATCH_END = "batchEnd"
    UPDATE_START = "updateStart"
    INFERENCE_PREDICTION_END = "inferencePredictionEnd"

    @classmethod
    def named(cls, name: Event | str) -> Event:
        """Return the event of that value (``"batchEnd"``) or name (``"BATCH_END"``).

        Raises:
            ValueError: If there is none.
        """
        for event in cls if isinstance(name, str) else ():
            if name in (event.value, event.name):
                return event
        known = [event.name for event in cls]
        raise ValueError(f"`events` must be among {', '.join(known)}, got {shown(name)}{did_you_mean(name, known)}")


class CancelAction(Exception):
    """Base of the actions: an exception that a function of events raises to leave a part of the fit.

    An action's own end event still fires. Raised where it has no meaning, it is an error.

    References:
        Swift for TensorFlow, swift-models, ``TrainingLoopAction``.
    """


class CancelBatch(CancelAction):
    """Leave the batch: it changes no weight, no momentum, no average and no statistics, and ``BATCH_END`` follows."""


class CancelTraining(CancelAction):
    """Leave the training phase of the epoch: ``TRAINING_END`` and the validation follow."""


class CancelValidation(CancelAction):
    """Leave the validation: ``VALIDATION_END`` follows, with metrics of the batches that it has seen."""


class CancelEpoch(CancelAction):
    """Leave the epoch: ``EPOCH_END`` follows, with neither ``TRAINING_END`` nor a validation before it."""


class CancelFit(CancelAction):
    """Leave the fit, whatever ``min_epochs`` and ``min_steps`` say: ``FIT_END`` follows, without ``EPOCH_END``."""


ACTIONS: tuple[type[CancelAction], ...] = (CancelBatch, CancelTraining, CancelValidation, CancelEpoch, CancelFit)
"""From the weakest to the strongest: where several ranks cancel at once, the strongest counts."""

_TRAINING_BATCH = ("training batchStart", "updateStart", "training batchEnd")
_VALIDATION_BATCH = ("validation batchStart", "inferencePredictionEnd", "validation batchEnd")
_EPOCH = (
    "epochStart",
    "trainingStart",
    *_TRAINING_BATCH,
    "trainingEnd",
    "validationStart",
    *_VALIDATION_BATCH,
    "validationEnd",
)
_MEANINGFUL: dict[type[CancelAction], tuple[str, ...]] = {
    CancelBatch: (*_TRAINING_BATCH[:2], *_VALIDATION_BATCH[:2]),
    CancelTraining: ("trainingStart", *_TRAINING_BATCH),
    CancelValidation: ("validationStart", *_VALIDATION_BATCH),
    CancelEpoch: _EPOCH,
    CancelFit: ("fitStart", *_EPOCH, "epochEnd"),
}


def action_of(cancel: CancelAction) -> type[CancelAction]:
    """Return which of the five actions ``cancel`` is.

    Raises:
        TypeError: If it is none of them.
    """
    for action in ACTIONS:
        if isinstance(cancel, action):
            return action
    raise TypeError(f"{type(cancel).__name__} is none of {', '.join(action.__name__ for action in ACTIONS)}.")


def check_meaning(action: type[CancelAction], event: Event, *, training: bool) -> None:
    """Refuse an action where it has no meaning.

    Args:
        action: One of the five.
        event: Where it was raised.
        training: Whether that was in the training phase; only batches have both.

    Raises:
        ValueError: If there is nothing to leave at that event.

    Example:
        >>> check_meaning(CancelBatch, Event.BATCH_START, training=True)
    """
    place = event.value
    if event in {Event.BATCH_START, Event.BATCH_END}:
        place = f"{'training' if training else 'validation'} {place}"
    if place not in _MEANINGFUL[action]:
        raise ValueError(
            f"{action.__name__} has no meaning at {place}. Raise it at {', '.join(_MEANINGFUL[action])}, or another "
            f"action here."
        )


def strongest(votes: Sequence[float]) -> type[CancelAction] | None:
    """Return the strongest action that has a vote; one number for each of :data:`ACTIONS`."""
    return next((action for action, count in zip(ACTIONS[::-1], votes[::-1], strict=True) if count), None)
