"""How many training samples one optimizer step sees, as far as the Trainer shows it."""

from __future__ import annotations

from typing import Any

from lightning_plugins.core.lightning import MisconfigurationException, Trainer


def samples_per_step(trainer: Trainer) -> int:
    """Return batch size x batches per step x ranks that see different data.

    Raises:
        MisconfigurationException: If the training data has no batch size that can be read.
    """
    sizes = [_batch_size(loader) for loader in _loaders(trainer.train_dataloader)]
    if not sizes or None in sizes:
        raise MisconfigurationException(
            "`HalfLife(samples=...)` must find the batch size of the training loader, which has none: "
            "give the half-life as HalfLife(steps=...)."
        )
    ranks = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size)
    return sum(size for size in sizes if size is not None) * trainer.accumulate_grad_batches * int(ranks)


def _loaders(loader: Any) -> list[Any]:
    if isinstance(loader, dict):
        return list(loader.values())
    return list(loader) if isinstance(loader, (list, tuple)) else [loader]


def _batch_size(loader: Any) -> int | None:
    for holder in (getattr(loader, "batch_sampler", None), loader):
        size = getattr(holder, "batch_size", None)
        if isinstance(size, int):
            return size
    return None
