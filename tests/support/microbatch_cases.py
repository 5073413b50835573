"""Micro-batching runs for one process and for two, each to be compared with the same run of whole batches."""

from __future__ import annotations

import math

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_plugins import GradientAccumulation, MicroBatching, Tokens
from lightning_plugins.core.batches import batch_length
from tests.support.accumulation_runs import Probe, Recorder, batches, fit, precision_arguments, shard_by_fsdp2

SIZES = ((8, 7, 2, 5, 3, 6, 1, 4, 9, 2, 3, 5, 7, 4), (6, 1, 8, 2, 9, 3, 5, 4, 1, 7, 2, 6, 3, 8))


class Fitting(Probe):
    """A module that runs out of (simulated) memory above ``fits`` samples, and logs and returns a few things."""

    def __init__(self, dtype=torch.float64, fits=None, unused=False):
        super().__init__(dtype)
        self.fits = fits
        self.unused = torch.nn.Linear(3, 1).double() if unused else None
        self.uses_it = False  # on one rank only
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        self.seen += batch_length(batch)  # what a running statistic does: changed by every forward
        if self.fits is not None and batch_length(batch) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated).")
        loss = super().training_step(batch, batch_idx)
        if self.uses_it:
            loss = loss + self.unused(torch.ones(3, dtype=torch.float64)).sum()
        hits = (self.net(batch["inputs"]).argmax(-1) == batch["labels"]).sum()
        synchronize = torch.distributed.is_initialized()
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=synchronize)
        self.log("hits", hits.double(), on_step=True, on_epoch=True, reduce_fx="sum")
        return {"loss": loss, "hits": hits, "rows": batch["labels"][:, 0], "samples": batch_length(batch)}


class Outputs(Recorder):
    """Also keeps what the end of every batch shows."""

    def __init__(self, micro_batching=None):
        super().__init__()
        self.batches = []
        self.micro_batching = micro_batching

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        plain = {key: value.tolist() if torch.is_tensor(value) else value for key, value in outputs.items()}
        self.batches.append({"outputs": plain, "logged": logged, "seen": float(pl_module.seen)})
        search = getattr(self.micro_batching, "_search", None)
        self.settled = search is not None and search.settled


MICRO = {
    "whole": {},
    "pieces of 3": {"size": 3},
    "pieces of 1": {"size": 1},
    "auto": {"size": "auto", "fits": 2},
    "auto on rank 1": {"size": "auto", "fits_on_rank": {1: 3}},
    "auto that fits": {"size": "auto"},
}


class Sharded(Fitting):
    """The same, split over the ranks by FSDP2."""

    def configure_model(self):
        shard_by_fsdp2(self)


def run_micro(
    *, size=None, fits=None, fits_on_rank=None, rank=0, ranks=1, accumulate=1, unused=False, sharded=False, **options
):
    """Run 14 uneven batches of tokens and return everything that can be seen."""
    tokens = Tokens("labels")
    callbacks = [] if size is None else [MicroBatching(size, count=tokens)]
    callbacks += [GradientAccumulation(accumulate, count=tokens)] if accumulate > 1 else []
    fits = (fits_on_rank or {}).get(rank, fits)
    module = (Sharded if sharded else Fitting)(fits=fits, unused=unused)
    module.uses_it = unused == "but on rank 1" and rank == 1
    recorder = Outputs(callbacks[0] if size is not None else None)
    arguments = precision_arguments(options.get("precision"))
    if ranks > 1:
        strategy = DDPStrategy(find_unused_parameters=bool(unused))
        if sharded:
            strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
        arguments |= {"devices": ranks, "strategy": strategy, "use_distributed_sampler": False}
    data = batches(SIZES[rank], dtype=torch.float64, tokens=True, rank=rank)
    trainer = fit(module, [*callbacks, recorder], data, **arguments)
    return {
        "steps": recorder.steps,
        "batches": recorder.batches,
        "global_step": trainer.global_step,
        "zeroed": trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.zero_grad.total.ready,
        "settled": recorder.settled,
        "found": callbacks[0].size_found if size is not None else None,
        "unused": None if not unused else [_listed(parameter.grad) for parameter in module.unused.parameters()],
    }


def _listed(gradient):
    return None if gradient is None else gradient.flatten().tolist()


def close(found, expected):
    """Equal up to rounding, where a mean of nothing is no number in both."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key]) for key in expected)
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-12) or (math.isnan(found) and math.isnan(expected))
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == expected
