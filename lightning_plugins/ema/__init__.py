"""Exponential moving averages of the weights: decay rules, the average itself, and the callbacks that follow a run.

Importing a decay rule imports neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins.core.imports import lazy_exports
from lightning_plugins.ema.decay import (
    ConstantDecay,
    DebiasedDecay,
    DecayRule,
    HalfLife,
    InverseGammaDecay,
    PowerDecay,
    WarmupDecay,
)

if TYPE_CHECKING:
    from lightning_plugins.ema.callback import EMA
    from lightning_plugins.ema.checkpoint_format import extract_weights
    from lightning_plugins.ema.describe import describe_checkpoint
    from lightning_plugins.ema.posthoc import synthesize_ema
    from lightning_plugins.ema.posthoc_callback import PostHocEMA
    from lightning_plugins.ema.shadow import Shadow

__all__ = [
    "EMA",
    "ConstantDecay",
    "DebiasedDecay",
    "DecayRule",
    "HalfLife",
    "InverseGammaDecay",
    "PostHocEMA",
    "PowerDecay",
    "Shadow",
    "WarmupDecay",
    "describe_checkpoint",
    "extract_weights",
    "synthesize_ema",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "EMA": f"{__name__}.callback",
        "PostHocEMA": f"{__name__}.posthoc_callback",
        "Shadow": f"{__name__}.shadow",
        "describe_checkpoint": f"{__name__}.describe",
        "extract_weights": f"{__name__}.checkpoint_format",
        "synthesize_ema": f"{__name__}.posthoc",
    },
)
