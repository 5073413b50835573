"""Batches that run in pieces, so that they fit into memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins.core.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_plugins.microbatching.callback import MicroBatching as MicroBatching
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
