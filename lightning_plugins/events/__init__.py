"""Functions of (loop, event): Swift for TensorFlow's twelve events and five cancel actions in a Lightning run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins.core.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_plugins.events.callback import EventCallback as EventCallback, on_events as on_events
    from lightning_plugins.events.events import (
        CancelAction as CancelAction,
        CancelBatch as CancelBatch,
        CancelEpoch as CancelEpoch,
        CancelFit as CancelFit,
        CancelTraining as CancelTraining,
        CancelValidation as CancelValidation,
        Event as Event,
    )
    from lightning_plugins.events.training_loop import TrainingLoop as TrainingLoop
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
