"""Gradient accumulation that equals the full batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins.core.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_plugins.accumulation.callback import GradientAccumulation as GradientAccumulation
    from lightning_plugins.core.counting import Tokens as Tokens
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
