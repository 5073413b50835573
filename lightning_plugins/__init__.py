"""Training techniques for Lightning, one callback each: exact, unnoticeable in cost, safe to kill.

Every public name is importable from here and loads on first use, so that importing a schedule imports neither Lightning
nor TensorBoard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins._version import __version__
from lightning_plugins.core.imports import lazy_exports

if TYPE_CHECKING:
    # The redundant aliases tell type checkers that these names are exported.
    from lightning_plugins.accumulation import (
        GradientAccumulation as GradientAccumulation,
        Tokens as Tokens,
    )
    from lightning_plugins.checkpoints import (
        CheckpointAveraging as CheckpointAveraging,
        average_checkpoints as average_checkpoints,
        greedy_soup as greedy_soup,
        select_checkpoints as select_checkpoints,
    )
    from lightning_plugins.ema import (
        EMA as EMA,
        ConstantDecay as ConstantDecay,
        DebiasedDecay as DebiasedDecay,
        DecayRule as DecayRule,
        HalfLife as HalfLife,
        InverseGammaDecay as InverseGammaDecay,
        PostHocEMA as PostHocEMA,
        PowerDecay as PowerDecay,
        WarmupDecay as WarmupDecay,
        extract_weights as extract_weights,
        synthesize_ema as synthesize_ema,
    )
    from lightning_plugins.events import (
        CancelBatch as CancelBatch,
        CancelEpoch as CancelEpoch,
        CancelFit as CancelFit,
        CancelTraining as CancelTraining,
        CancelValidation as CancelValidation,
        Event as Event,
        EventCallback as EventCallback,
        on_events as on_events,
    )
    from lightning_plugins.microbatching import MicroBatching as MicroBatching
    from lightning_plugins.schedules import (
        Constant as Constant,
        Cosine as Cosine,
        CosineRestarts as CosineRestarts,
        Exponential as Exponential,
        InverseSqrt as InverseSqrt,
        Join as Join,
        LearningRateScheduler as LearningRateScheduler,
        Linear as Linear,
        Noam as Noam,
        NoamLR as NoamLR,
        OneCycle as OneCycle,
        OneMinusSqrt as OneMinusSqrt,
        PiecewiseConstant as PiecewiseConstant,
        Plateau as Plateau,
        Polynomial as Polynomial,
        ReciprocalSqrt as ReciprocalSqrt,
        RNMTPlus as RNMTPlus,
        Schedule as Schedule,
        ScheduleLR as ScheduleLR,
        Segment as Segment,
        Segments as Segments,
        Shape as Shape,
        WarmupCosine as WarmupCosine,
        WarmupCosineLR as WarmupCosineLR,
        WarmupLinear as WarmupLinear,
        WarmupStableDecay as WarmupStableDecay,
    )
    from lightning_plugins.statistics import (
        ClassificationReport as ClassificationReport,
        CSVStatisticsLogger as CSVStatisticsLogger,
        StatisticsRecorder as StatisticsRecorder,
        TensorBoardStatisticsLogger as TensorBoardStatisticsLogger,
    )

# Technique -> its public names. The package of a technique knows which module defines a name.
_TECHNIQUES = {
    "accumulation": [
        "GradientAccumulation",
        "Tokens",
    ],
    "checkpoints": [
        "CheckpointAveraging",
        "average_checkpoints",
        "greedy_soup",
        "select_checkpoints",
    ],
    "ema": [
        "ConstantDecay",
        "DebiasedDecay",
        "DecayRule",
        "EMA",
        "HalfLife",
        "InverseGammaDecay",
        "PostHocEMA",
        "PowerDecay",
        "WarmupDecay",
        "extract_weights",
        "synthesize_ema",
    ],
    "events": [
        "CancelBatch",
        "CancelEpoch",
        "CancelFit",
        "CancelTraining",
        "CancelValidation",
        "Event",
        "EventCallback",
        "on_events",
    ],
    "microbatching": [
        "MicroBatching",
    ],
    "schedules": [
        "Constant",
        "Cosine",
        "CosineRestarts",
        "Exponential",
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
        "RNMTPlus",
        "ReciprocalSqrt",
        "Schedule",
        "ScheduleLR",
        "Segment",
        "Segments",
        "Shape",
        "WarmupCosine",
        "WarmupCosineLR",
        "WarmupLinear",
        "WarmupStableDecay",
    ],
    "statistics": [
        "CSVStatisticsLogger",
        "ClassificationReport",
        "StatisticsRecorder",
        "TensorBoardStatisticsLogger",
    ],
}

_MODULES = {name: f"{__name__}.{technique}" for technique, names in _TECHNIQUES.items() for name in names}

__all__ = ["__version__", *_MODULES]

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
