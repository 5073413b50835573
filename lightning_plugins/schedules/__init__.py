"""Learning-rate schedules: pure values that compose, a torch scheduler and a callback that follow them.

Importing a schedule imports neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins.core.imports import lazy_exports
from lightning_plugins.schedules.combinators import (
    CosineRestarts,
    Cycled,
    Delayed,
    Floored,
    HeldEvery,
    Product,
    Scaled,
    Shifted,
)
from lightning_plugins.schedules.durations import Duration, RunLengthUnknownError, ScheduleTooLongError
from lightning_plugins.schedules.families import InverseSqrt, Noam, ReciprocalSqrt, RNMTPlus
from lightning_plugins.schedules.piecewise import Join, PiecewiseConstant, Segment, Segments
from lightning_plugins.schedules.plateau import Plateau
from lightning_plugins.schedules.ramps import Constant, Cosine, Exponential, Linear, OneMinusSqrt, Polynomial, Shape
from lightning_plugins.schedules.schedule import Schedule
from lightning_plugins.schedules.warmup import OneCycle, WarmupCosine, WarmupLinear, WarmupStableDecay

if TYPE_CHECKING:
    from lightning_plugins.schedules.callback import LearningRateScheduler
    from lightning_plugins.schedules.expression import parse_schedule
    from lightning_plugins.schedules.plot import plot_schedules, sketch
    from lightning_plugins.schedules.scheduler import NoamLR, ScheduleLR, WarmupCosineLR

# Every schedule class, and Segment: what a configuration or an expression may name.
SCHEDULES = (
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Cycled",
    "Delayed",
    "Exponential",
    "Floored",
    "HeldEvery",
    "InverseSqrt",
    "Join",
    "Linear",
    "Noam",
    "OneCycle",
    "OneMinusSqrt",
    "PiecewiseConstant",
    "Polynomial",
    "Product",
    "RNMTPlus",
    "ReciprocalSqrt",
    "Scaled",
    "Segment",
    "Segments",
    "Shape",
    "Shifted",
    "WarmupCosine",
    "WarmupLinear",
    "WarmupStableDecay",
)

__all__ = [
    "SCHEDULES",
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Cycled",
    "Delayed",
    "Duration",
    "Exponential",
    "Floored",
    "HeldEvery",
    "InverseSqrt",
    "Join",
    "LearningRateScheduler",
    "Linear",
    "Noam",
    "NoamLR",
    "OneCycle",
    "OneMinusSqrt",
    "PiecewiseConstant",
    "Plateau",
    "Polynomial",
    "Product",
    "RNMTPlus",
    "ReciprocalSqrt",
    "RunLengthUnknownError",
    "Scaled",
    "Schedule",
    "ScheduleLR",
    "ScheduleTooLongError",
    "Segment",
    "Segments",
    "Shape",
    "Shifted",
    "WarmupCosine",
    "WarmupCosineLR",
    "WarmupLinear",
    "WarmupStableDecay",
    "parse_schedule",
    "plot_schedules",
    "sketch",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "LearningRateScheduler": f"{__name__}.callback",
        "NoamLR": f"{__name__}.scheduler",
        "ScheduleLR": f"{__name__}.scheduler",
        "WarmupCosineLR": f"{__name__}.scheduler",
        "parse_schedule": f"{__name__}.expression",
        "plot_schedules": f"{__name__}.plot",
        "sketch": f"{__name__}.plot",
    },
)
