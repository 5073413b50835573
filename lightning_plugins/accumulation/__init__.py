"""Gradient accumulation that equals the full batch, and batches that run in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins._lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_plugins.accumulation.callback import GradientAccumulation
    from lightning_plugins.accumulation.counting import Tokens
    from lightning_plugins.accumulation.microbatch_callback import MicroBatching

_MODULES = {
    "GradientAccumulation": f"{__name__}.callback",
    "MicroBatching": f"{__name__}.microbatch_callback",
    "Tokens": f"{__name__}.counting",
}

__all__ = ["GradientAccumulation", "MicroBatching", "Tokens"]

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
