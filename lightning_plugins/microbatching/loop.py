"""Runs one batch of Lightning's training loop in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.core.batches import even_sizes, sizes_of
from lightning_plugins.core.counting import Count
from lightning_plugins.core.lightning import MisconfigurationException, Trainer
from lightning_plugins.microbatching.logging import BatchMetrics, PieceLogs
from lightning_plugins.microbatching.merging import merge, shares, weighted, weighted_sum
from lightning_plugins.microbatching.out_of_memory import StateBeforeBatch
from lightning_plugins.microbatching.pieces import Pieces


class PiecewiseClosure:
    """Stands where Lightning's closure stands: called by the optimizer's step, then asked for the result.

    Args:
        run: Runs the batch, gradients included, and returns Lightning's result of it.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self._result: Any = None

    @torch.enable_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Run the batch and return its loss."""
        self._result = self._run()
        loss: Tensor | None = self._result.loss
        return loss

    def consume_result(self) -> Any:
        """Return the result of the last call and forget it."""
        result, self._result = self._result, None
        return result


class RanksInStep:
    """Keeps ranks in step whose every forward and backward is a collective, as under FSDP and tensor parallelism.

    Args:
        trainer: The Trainer, in a fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._device = trainer.strategy.root_device

    def most(self, pieces: int) -> int:
        """Return the largest number of pieces that any rank has; every rank must call it, and waits for the others."""
        number = torch.tensor(pieces, device=self._device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return int(number)

    @contextmanager
    def leaving_nothing(self) -> Iterator[None]:
        """Put random numbers, buffers and metrics back at the end."""
        before = StateBeforeBatch(self._trainer.lightning_module, self._device)
        yield
        before.restore()


class BatchInPieces:
    """One batch, its optimizer and Lightning's loop: everything that an attempt to run it needs.

    Args:
        trainer: The Trainer.
        kwargs: What the loop calls ``training_step`` with.
        optimizer: The optimizer of the coming backward.
        batch_idx: The batch's index in the epoch.
        pieces: How the batch is counted and split.
        logged: How the values that pieces log make the batch's, by name.
        in_step: Keeps ranks in step whose every forward is a collective, ``None`` where each runs for itself.

    Attributes:
        dropped: What the pieces returned and could not be merged, path -> reason.
    """

    def __init__(
        self,
        trainer: Trainer,
        kwargs: Mapping[str, Any],
        optimizer: Any,
        batch_idx: int,
        *,
        pieces: Pieces,
        logged: Mapping[str, str],
        in_step: RanksInStep | None = None,
    ) -> None:
        self._trainer = trainer
        self._loop: Any = trainer.fit_loop.epoch_loop.automatic_optimization
        self._kwargs = kwargs
        self._pieces = pieces
        self._in_step = in_step
        self.logs = PieceLogs(trainer.fit_loop.epoch_loop._results, logged)
        self._zero_grad = self._loop._make_zero_grad_fn(batch_idx, optimizer)
        self._backward = self._loop._make_backward_fn(optimizer)
        self._zeroed = False
        self._runs = 1
        self._weights: Sequence[Count] = ()
        self._sizes: Sequence[int] = ()
        self._results: list[Any] = []
        self.dropped: dict[str, str] = {}
        self.on_first_backward: Callable[[], None] = lambda: None

    def begin(self) -> BatchInPieces:
        """Begin the batch; an optimizer may run it several times in a step, and each time zeroes the gradients."""
        self._zeroed = False
        return self

    def length(self) -> int:
        """Return the batch's samples, which are not counted before that."""
        return self._pieces.length(self._kwargs["batch"])

    def largest(self) -> int:
        """Return the samples of the largest piece of the last attempt."""
        return self.length() if len(self._weights) <= 1 else self._sizes[0]

    def run(self, at_most: int | None) -> Any:
        """Run the batch in pieces of at most so many samples and return Lightning's result of the whole."""
        self.attempt(at_most)
        return self.finish()

    def attempt(self, at_most: int | None) -> None:
        """Run the batch in pieces of at most so many samples, whole for ``None``; nothing is logged yet.

        May be called again after an attempt that failed; what was zeroed is not zeroed again.
        """
        batch = self._kwargs["batch"]
        sizes = [0] if at_most is None else even_sizes(self.length(), at_most)
        self._runs = len(sizes)
        if self._in_step is not None:
            self._runs = self._in_step.most(len(sizes))
            # a rank with fewer samples than that runs its last piece again, for nothing
            sizes = sizes_of(self.length(), min(self._runs, self.length()))
        whole = len(sizes) == 1
        pieces = [batch] if whole else self._pieces.split(batch, sizes)
        self._weights = [1.0] if whole else shares(pieces, sizes, self._pieces.count)
        self._sizes = sizes
        metrics = nullcontext() if whole else BatchMetrics(self._trainer.lightning_module).one_batch()
        with metrics, self.logs.collecting():
            self._results = [self._run_piece(index, piece) for index, piece in enumerate(pieces)]
            for index in range(len(pieces), self._runs):
                self._run_for_others(index, pieces[-1])

    def finish(self) -> Any:
        """Log what the attempt has logged, which may synchronize the ranks, and return Lightning's result."""
        self.logs.log(self._weights, self._sizes)
        return self._merged(self._results)

    def _run_piece(self, index: int, piece: Any) -> Any:
        """Forward and backward of one piece."""
        self.logs.begin(index, piece)
        pieces = len(self._weights)
        with self._unsynchronized_before_last(index):
            result = self._loop._training_step({**self._kwargs, "batch": piece})
            self._zero_once()
            loss, result.closure_loss = result.closure_loss, None
            if loss is not None and self._backward is not None:
                self._backward(loss if pieces == 1 else weighted(loss, self._weights[index]))
        return result

    def _run_for_others(self, index: int, piece: Any) -> None:
        """Take part in the collectives of a piece that only other ranks have; it leaves nothing behind."""
        nothing_left = self._in_step.leaving_nothing() if self._in_step else nullcontext()
        with nothing_left, self.logs.ignoring(), self._unsynchronized_before_last(index):
            result = self._loop._training_step({**self._kwargs, "batch": piece})
            if result.closure_loss is not None and self._backward is not None:
                self._backward(weighted(result.closure_loss, 0.0))

    def _unsynchronized_before_last(self, index: int) -> AbstractContextManager[Any]:
        """Hold the synchronization of the ranks back in every run but the last, which is the same on all ranks."""
        strategy: Any = self._trainer.strategy
        last = index + 1 == self._runs or not hasattr(strategy, "block_backward_sync")
        return nullcontext() if last else strategy.block_backward_sync()

    def _zero_once(self) -> None:
        """Zero the gradients at a window's first batch, after the first forward, as Lightning does."""
        if self._zero_grad is not None and not self._zeroed:
            self._zero_grad()
        self._zeroed = True
        self.on_first_backward()

    def _merged(self, results: Sequence[Any]) -> Any:
        if len(results) == 1:
            return results[0]
        without = sum(result.loss is None for result in results)
        if 0 < without < len(results):
            raise MisconfigurationException(
                f"`training_step` must return a loss for every piece of a batch or for none, but returned None for "
                f"{without} of {len(results)}. Decide before the batch is split, in the loader."
            )
        merged = self._loop.output_result_cls(None)
        if not without:
            merged.loss = weighted_sum([result.loss for result in results], self._weights)
            extra = [result.extra for result in results]
            merged.extra = merge(extra, self._weights, self._sizes, dropped=self.dropped)
        return merged
