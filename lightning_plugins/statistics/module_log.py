"""What a module logs with ``self.log``, read batch by batch: Lightning itself shows it at a phase's end alone."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from lightning_plugins.core.lightning import Trainer

_LINE_END = re.compile(r"[\r\n]+")
_LOSS = re.compile(r"(?:(?:val|valid|validation|test|eval)[_/.-])?loss")


def logs_anything(trainer: Trainer) -> bool:
    """Return whether the module has logged anything in the loop that runs now."""
    return bool(trainer._results)


def logged_values(trainer: Trainer, *, on_step: bool) -> dict[str, Tensor]:
    """Return what the module has logged in the loop that runs now, by the names that Lightning's loggers get.

    Args:
        trainer: Its active loop is asked; with several validation loaders the values of all of them are there.
        on_step: Whether the values of the last batch are meant, or those of the whole phase.
    """
    results = trainer._results
    if not results:
        return {}
    found: dict[str, Tensor] = {}
    for item in results.values():
        if item.has_reset or (on_step and results.dataloader_idx != item.meta.dataloader_idx):
            continue
        value = results._get_cache(item, on_step)
        if isinstance(value, Tensor):
            name, forked = results._forked_name(item, on_step)
            # a row of a file has one line, and so has its header
            found[_LINE_END.sub(" ", name if results.training or not on_step else forked)] = value
    return found


def logged_loss(trainer: Trainer) -> dict[int | None, tuple[Tensor, Tensor]]:
    """Return the loss that the module has logged so far in a validation, as sum and weight, by validation loader.

    It is what is called ``loss``, ``val_loss``, ``valid/loss`` or the like, and is averaged over the phase. A single
    loader has no number, but ``None``.
    """
    found: dict[str, dict[int | None, tuple[Tensor, Tensor]]] = {}
    for item in (trainer._results or {}).values():
        meta: Any = item.meta
        is_mean = item.is_tensor and meta.on_epoch and meta.is_mean_reduction
        if is_mean and _LOSS.fullmatch(meta.name) and not item.has_reset:
            found.setdefault(meta.name, {})[meta.dataloader_idx] = item.value, item.cumulated_batch_size
    return min(found.items(), key=lambda entry: entry[0] == "loss")[1] if found else {}
