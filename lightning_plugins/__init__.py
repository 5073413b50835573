"""Training techniques for Lightning, one callback each: exact, unnoticeable in cost, safe to kill.

Every public name is importable from here and loads on first use, so that importing a schedule imports neither
Lightning nor TensorBoard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins._lazy import lazy_exports
from lightning_plugins._version import __version__

if TYPE_CHECKING:
    pass

_MODULES: dict[str, str] = {}

__all__ = ["__version__", *_MODULES]

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
