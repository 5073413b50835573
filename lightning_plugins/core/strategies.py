"""What both callbacks ask of a Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch

from lightning_plugins.core.counting import Count, as_count, wide
from lightning_plugins.core.lightning import LightningModule, MisconfigurationException, Trainer


def check_strategy(trainer: Trainer, technique: str, tested: Collection[str]) -> None:
    """Refuse a strategy that is none of ``tested``, by its name and those of its bases.

    Raises:
        MisconfigurationException: If it is not, or if it splits a batch over several processes.
    """
    strategy: Any = trainer.strategy
    name = type(strategy).__name__
    if strategy.handles_gradient_accumulation:
        raise MisconfigurationException(
            f"{technique} does not work under {name}, which accumulates gradients by itself. Set the accumulation in "
            f"the strategy's own configuration and remove {technique}."
        )
    if not {base.__name__ for base in type(strategy).__mro__} & set(tested):
        raise MisconfigurationException(
            f"{technique} was not tested under {name}; it works under {', '.join(sorted(tested))}."
        )
    mesh = getattr(strategy, "_device_mesh", None)
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise MisconfigurationException(
            f"{technique} does not work with tensor parallelism, where several processes share a batch. Give "
            f"{name}(data_parallel_size={trainer.world_size}, tensor_parallel_size=1)."
        )


def check_module(pl_module: LightningModule, technique: str) -> None:
    """Refuse manual optimisation and a ``training_step`` that draws its batches by itself.

    Raises:
        MisconfigurationException: If the module does either.
    """
    name = type(pl_module).__name__
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{technique} needs automatic optimisation, but `{name}.automatic_optimization` is False: a module that "
            f"steps by hand also accumulates by hand. Remove {technique}."
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise MisconfigurationException(
            f"{technique} must see the batches, but `{name}.training_step` draws them from `dataloader_iter`. Let it "
            f"take `batch` and `batch_idx`."
        )


def loader_batch_size(trainer: Trainer) -> int | None:
    """Return the samples of a full batch on one rank, or ``None`` when the loader does not tell."""
    trainer.fit_loop.setup_data()
    loader: Any = trainer.train_dataloader
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def when_data_is_loaded(trainer: Trainer, act: Callable[[Trainer], None]) -> None:
    """Call ``act(trainer)`` once, right after the training data is loaded; :func:`forget_data` calls it off."""
    load = trainer.fit_loop.setup_data

    def load_and_act() -> None:
        forget_data(trainer)
        load()
        act(trainer)

    trainer.fit_loop.setup_data = load_and_act  # type: ignore[method-assign]


def forget_data(trainer: Trainer) -> None:
    """Take back what :func:`when_data_is_loaded` did; harmless when it has acted already, or was not called."""
    trainer.fit_loop.__dict__.pop("setup_data", None)


def sum_over_ranks(trainer: Trainer, count: Count) -> Count:
    """Return the sum of ``count`` over the ranks: one scalar collective, and no wait for a device."""
    if trainer.world_size == 1:
        return count
    total = wide(count, trainer.strategy.root_device)
    torch.distributed.all_reduce(total)
    return total if total.device.type != "cpu" else total.item()


def first_count(trainer: Trainer, count: Count) -> float:
    """Return rank 0's ``count`` on every rank as the run's reference, 1 if it is 0; once in a run, so it may wait."""
    value = as_count(count.item() if isinstance(count, torch.Tensor) else count)
    return float(trainer.strategy.broadcast(value)) or 1.0
