"""Averages of the weights, exponential ones and those of the latest snapshots, and the callbacks that keep them.

Importing a decay rule imports neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins.core.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_plugins.ema.callback import EMA as EMA
    from lightning_plugins.ema.checkpoint_format import (
        NoStateDictError as NoStateDictError,
        extract_weights as extract_weights,
    )
    from lightning_plugins.ema.checkpoint_summary import describe_checkpoint as describe_checkpoint
    from lightning_plugins.ema.decay import (
        ConstantDecay as ConstantDecay,
        DebiasedDecay as DebiasedDecay,
        DecayRule as DecayRule,
        InverseGammaDecay as InverseGammaDecay,
        PowerDecay as PowerDecay,
        WarmupDecay as WarmupDecay,
    )
    from lightning_plugins.ema.half_life import HalfLife as HalfLife
    from lightning_plugins.ema.latest_callback import LatestWeightAveraging as LatestWeightAveraging
    from lightning_plugins.ema.posthoc import synthesize_ema as synthesize_ema
    from lightning_plugins.ema.posthoc_callback import PostHocEMA as PostHocEMA
    from lightning_plugins.ema.shadow import Shadow as Shadow
    from lightning_plugins.ema.zero_files import describe_zero_directory as describe_zero_directory
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
