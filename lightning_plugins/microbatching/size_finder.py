"""Finds the largest piece that fits into memory, batch by batch, with all ranks at the same size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.core.lightning import Trainer, rank_zero_info
from lightning_plugins.microbatching.loop import BatchInPieces
from lightning_plugins.microbatching.out_of_memory import StateBeforeBatch, empty_caches, halved, is_out_of_memory


class SizeSearch:
    """Runs batches at the size known so far, and the same batch again at half of it when memory runs out.

    On one device every batch is guarded. Under DDP a rank that ran out of memory cannot tell the others, who wait for
    it in the gradients' all-reduce. So for the first batches at a size no rank synchronizes before all have
    agreed that all succeeded; then the gradients are averaged by hand. Later batches take DDP's own, faster way.

    Args:
        trainer: The Trainer, in a fit.
        size: A size found before, ``None`` to begin with whole batches.
    """

    # batches at one size after which DDP runs unguarded
    SETTLED = 10

    def __init__(self, trainer: Trainer, size: int | None) -> None:
        self.size = size
        self._batch: BatchInPieces | None = None
        self._ranks = Ranks(trainer) if trainer.world_size > 1 else None
        self._passed = 0
        self._trainer = trainer

    @property
    def settled(self) -> bool:
        """Whether batches run unguarded: memory that runs out now ends the run."""
        return self._passed >= self.SETTLED

    def run(self, batch: BatchInPieces) -> Any:
        """Run ``batch`` and return Lightning's result of it."""
        self._batch = batch
        if self._ranks is None:
            self._guarded(batch, lambda wanted: wanted)
            return batch.finish()
        if self.settled:
            return batch.run(self.size)
        with self._ranks.unsynchronized():
            self._guarded(batch, self._ranks.agree)
        self._passed += 1
        return batch.finish()

    def largest(self) -> int:
        """Return the largest piece of the current batch, in samples."""
        return self._batch.largest() if self._batch is not None else 0

    def _guarded(self, batch: BatchInPieces, agree: Callable[[int | None], int | None]) -> None:
        """Run the batch until an attempt succeeds; what it logs waits, since logging may synchronize the ranks."""
        before = StateBeforeBatch(self._trainer.lightning_module, self._trainer.strategy.root_device)
        batch.on_first_backward = before.keep_gradients
        while True:
            wanted = None
            try:
                batch.attempt(self.size)
            except Exception as error:
                # the types are many
                if not is_out_of_memory(error):
                    raise
                wanted = halved(batch.largest())
                if wanted == 0:
                    agree(0)
                    raise
            # outside of `except`, whose error holds the memory of the attempt
            wanted = agree(wanted)
            if wanted is None:
                return
            if wanted == 0:
                raise torch.OutOfMemoryError("Another rank ran out of memory with a single sample.")
            before.restore()
            empty_caches()
            tried = batch.largest()
            rank_zero_info(f"MicroBatching: out of memory with {tried} samples at once; going on with {wanted}.")
            self.size, self._passed = wanted, 0


class Ranks:
    """Keeps the ranks of DDP together while one of them may fail.

    Args:
        trainer: A Trainer whose strategy is DDP.
    """

    # what a rank asks for that did not fail: no limit
    _CONTENT = 2**62

    def __init__(self, trainer: Trainer) -> None:
        self._model: Any = trainer.strategy.model
        self._device = trainer.strategy.root_device
        self._world_size = trainer.world_size

    @contextmanager
    def unsynchronized(self) -> Iterator[None]:
        """Hold DDP's all-reduce back, and average the gradients at the end if DDP was going to."""
        synchronize = self._model.require_backward_grad_sync
        with self._model.no_sync():
            yield
        if synchronize:
            self._average_gradients()
        # what DDP's forward sets by itself otherwise
        self._model.require_forward_param_sync = synchronize

    def agree(self, wanted: int | None) -> int | None:
        """Return the smallest size that any rank wants, ``None`` if all succeeded; all ranks call it."""
        smallest = torch.tensor(self._CONTENT if wanted is None else wanted, device=self._device)
        torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
        # a forward that failed half-way leaves DDP expecting a broadcast of buffers that the other ranks have had
        self._model.require_forward_param_sync = False
        size = int(smallest)
        return None if size == self._CONTENT else size

    @torch.no_grad()
    def _average_gradients(self) -> None:
        """Do what DDP does after a backward; a parameter that no rank has used keeps no gradient."""
        parameters = [parameter for parameter in self._model.module.parameters() if parameter.requires_grad]
        used = torch.tensor([parameter.grad is not None for parameter in parameters], device=self._device).int()
        torch.distributed.all_reduce(used)
        for parameter, ranks in zip(parameters, used.tolist(), strict=True):
            if ranks:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradient: Tensor = parameter.grad
                torch.distributed.all_reduce(gradient)
                gradient.div_(self._world_size)
