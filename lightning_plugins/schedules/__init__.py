"""Learning-rate schedules: pure values that compose, a torch scheduler and a callback that follow them.

Importing a schedule imports neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins.core.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_plugins.core.durations import (
        Duration as Duration,
        RunLengthUnknownError as RunLengthUnknownError,
        ScheduleTooLongError as ScheduleTooLongError,
    )
    from lightning_plugins.schedules.callback import LearningRateScheduler as LearningRateScheduler
    from lightning_plugins.schedules.combinators import (
        CosineRestarts as CosineRestarts,
        Cycled as Cycled,
        Delayed as Delayed,
        Floored as Floored,
        HeldEvery as HeldEvery,
        Product as Product,
        Scaled as Scaled,
        Shifted as Shifted,
    )
    from lightning_plugins.schedules.configuration import SCHEDULES as SCHEDULES
    from lightning_plugins.schedules.expression import parse_schedule as parse_schedule
    from lightning_plugins.schedules.families import (
        InverseSqrt as InverseSqrt,
        Noam as Noam,
        ReciprocalSqrt as ReciprocalSqrt,
        RNMTPlus as RNMTPlus,
    )
    from lightning_plugins.schedules.layerwise import layerwise_decay as layerwise_decay
    from lightning_plugins.schedules.named_schedulers import NoamLR as NoamLR, WarmupCosineLR as WarmupCosineLR
    from lightning_plugins.schedules.piecewise import (
        Join as Join,
        PiecewiseConstant as PiecewiseConstant,
        Segment as Segment,
        Segments as Segments,
    )
    from lightning_plugins.schedules.plateau import Plateau as Plateau
    from lightning_plugins.schedules.plot import plot_schedules as plot_schedules, sketch as sketch
    from lightning_plugins.schedules.ramps import (
        Constant as Constant,
        Cosine as Cosine,
        Exponential as Exponential,
        Linear as Linear,
        OneMinusSqrt as OneMinusSqrt,
        Polynomial as Polynomial,
        Shape as Shape,
    )
    from lightning_plugins.schedules.schedule import Schedule as Schedule
    from lightning_plugins.schedules.scheduler import ScheduleLR as ScheduleLR
    from lightning_plugins.schedules.warmup import (
        OneCycle as OneCycle,
        WarmupCosine as WarmupCosine,
        WarmupLinear as WarmupLinear,
        WarmupStableDecay as WarmupStableDecay,
    )
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
