"""How many training samples a full batch and an optimizer step have, as far as the Trainer shows it."""

from __future__ import annotations

from typing import Any


def loader_batch_size(trainer: Any) -> int | None:
    """Return the samples of a full batch on one rank, ``None`` when the training data do not tell.

    Several loaders give one batch, which has the samples of all of them.

    Args:
        trainer: The Trainer, in a fit; training data that are not loaded yet are loaded.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    sizes = [_batch_size(loader) for loader in _flat(trainer.train_dataloader)]
    known = [size for size in sizes if size is not None]
    return sum(known) if known and len(known) == len(sizes) else None


def samples_per_step(trainer: Any) -> int | None:
    """Return batch size x batches per step x ranks that see different data, ``None`` when the data do not tell."""
    size = loader_batch_size(trainer)
    return None if size is None else size * int(trainer.accumulate_grad_batches) * data_ranks(trainer)


def data_ranks(trainer: Any) -> int:
    """Return how many ranks see different data: under tensor parallelism several share each batch."""
    return int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size))


def _flat(loaders: Any) -> list[Any]:
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return [found for loader in loaders for found in _flat(loader)]
    return [loaders]


def _batch_size(loader: Any) -> int | None:
    for holder in (getattr(loader, "batch_sampler", None), loader):
        size: Any = getattr(holder, "batch_size", None)
        # NumPy's integers, too
        if hasattr(size, "__index__"):
            return int(size)
    return None
