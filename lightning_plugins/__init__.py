"""Training techniques for Lightning, one callback each: exact, unnoticeable in cost, safe to kill.

Every public name is importable from here and loads on first use, so that importing a schedule imports neither Lightning
nor TensorBoard. The imports below are the one list of the public names, and of the techniques.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins._version import __version__ as __version__
from lightning_plugins.core.imports import lazy_exports

if TYPE_CHECKING:
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
        LatestWeightAveraging as LatestWeightAveraging,
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
        TrainingLoop as TrainingLoop,
        on_events as on_events,
    )
    from lightning_plugins.microbatching import MicroBatching as MicroBatching
    from lightning_plugins.schedules import (
        Constant as Constant,
        Cosine as Cosine,
        CosineRestarts as CosineRestarts,
        Duration as Duration,
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
        layerwise_decay as layerwise_decay,
    )
    from lightning_plugins.statistics import (
        ClassificationReport as ClassificationReport,
        CSVStatisticsLogger as CSVStatisticsLogger,
        StatisticsRecorder as StatisticsRecorder,
        TensorBoardStatisticsLogger as TensorBoardStatisticsLogger,
    )
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
