"""Functions of (loop, event): Swift for TensorFlow's twelve events and five cancel actions in a Lightning run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins.core.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_plugins.events.callback import EventCallback, on_events
    from lightning_plugins.events.events import (
        CancelAction,
        CancelBatch,
        CancelEpoch,
        CancelFit,
        CancelTraining,
        CancelValidation,
        Event,
    )
    from lightning_plugins.events.training_loop import TrainingLoop

_MODULES = {
    "CancelAction": f"{__name__}.events",
    "CancelBatch": f"{__name__}.events",
    "CancelEpoch": f"{__name__}.events",
    "CancelFit": f"{__name__}.events",
    "CancelTraining": f"{__name__}.events",
    "CancelValidation": f"{__name__}.events",
    "Event": f"{__name__}.events",
    "EventCallback": f"{__name__}.callback",
    "TrainingLoop": f"{__name__}.training_loop",
    "on_events": f"{__name__}.callback",
}

__all__ = [
    "CancelAction",
    "CancelBatch",
    "CancelEpoch",
    "CancelFit",
    "CancelTraining",
    "CancelValidation",
    "Event",
    "EventCallback",
    "TrainingLoop",
    "on_events",
]

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
