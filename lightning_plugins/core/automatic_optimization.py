"""Whether Lightning itself runs ``training_step`` on whole batches, and steps the optimizer."""

from __future__ import annotations

import inspect
from typing import Any

from lightning_plugins.core.lightning import LightningModule, MisconfigurationException


def draws_batches(pl_module: Any) -> bool:
    """Return whether ``training_step`` takes its batches from a ``dataloader_iter``."""
    return "dataloader_iter" in inspect.signature(pl_module.training_step).parameters


def overrides(pl_module: Any, name: str) -> bool:
    """Return whether the module has a method of its own in the place of Lightning's."""
    return getattr(getattr(pl_module, name), "__qualname__", "") != f"LightningModule.{name}"


def check_automatic(pl_module: LightningModule, technique: str) -> None:
    """Refuse manual optimization and a ``training_step`` that draws its batches by itself.

    Raises:
        MisconfigurationException: If the module does either.
    """
    name = type(pl_module).__name__
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{technique} needs automatic optimization, but `{name}.automatic_optimization` is False: a module that "
            f"steps by hand also accumulates by hand. Remove {technique}."
        )
    if draws_batches(pl_module):
        raise MisconfigurationException(
            f"{technique} must see the batches, but `{name}.training_step` draws them from `dataloader_iter`. Let it "
            f"take `batch` and `batch_idx`."
        )
