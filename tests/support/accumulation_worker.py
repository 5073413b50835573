"""What one rank of the distributed tests runs."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.support import conditions
from tests.support.accumulation_cases import CASES, SHARDED
from tests.support.accumulation_runs import Probe, Recorder, SaveAfterFirstEpoch, fit, run_case, shard_by_fsdp2
from tests.support.fsdp1 import FSDPOnCPU
from tests.support.microbatch_cases import MICRO, run_micro

FIRST = "uneven batches, short last window"


class Sharded(Probe):
    """The same network, split over the ranks by FSDP2."""

    def configure_model(self):
        shard_by_fsdp2(self)


class WholeRecorder(pl.Callback):
    """Gathers the flat shards of FSDP1 before it looks at them."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model, with_grads=True):
            named = [(name.split("module.")[-1], p) for name, p in pl_module.net.named_parameters()]
            weights = {name: parameter.detach().clone() for name, parameter in named}
            self.steps.append({"weights": weights, "gradient": {name: p.grad.clone() for name, p in named}})


def run_flat_shards(name: str, rank: int):
    case, recorder = CASES[name], WholeRecorder()
    settings = {**distributed(), "strategy": FSDPOnCPU(parts=("net",))}
    trainer = fit(Probe(), [case.accumulation(), recorder], case.data(rank), epochs=case.epochs, **settings)
    return recorder.steps, trainer.global_step


def run_stock(rank: int):
    """Lightning's own accumulation of the first case."""
    recorder = Recorder()
    trainer = fit(
        Probe(),
        [recorder],
        CASES[FIRST].data(rank),
        accumulate_grad_batches=2,
        **distributed(),
    )
    return recorder.steps, trainer.global_step


def distributed():
    return {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}


def count_collectives(run):
    """The sizes of what is reduced in a run, and how many objects are broadcast (the gradients go another way)."""
    calls = {"all_reduce": [], "broadcast_object_list": 0}
    all_reduce, broadcast = torch.distributed.all_reduce, torch.distributed.broadcast_object_list

    def counted_reduce(tensor, *args, **kwargs):
        calls["all_reduce"].append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    def counted_broadcast(*args, **kwargs):
        calls["broadcast_object_list"] += 1
        return broadcast(*args, **kwargs)

    torch.distributed.all_reduce, torch.distributed.broadcast_object_list = counted_reduce, counted_broadcast
    try:
        result = run()
    finally:
        torch.distributed.all_reduce, torch.distributed.broadcast_object_list = all_reduce, broadcast
    return result, calls


def resume_carried(rank: int, folder: Path):
    """Two epochs of five batches in windows of two: the first leaves a window open; then the second epoch again."""
    case = dataclasses.replace(CASES["carry, tokens"], dtype=torch.float64)
    whole, resumed = Recorder(), Recorder()
    saver = SaveAfterFirstEpoch(folder / "carried.ckpt")
    fit(Probe(case.dtype), [case.accumulation(), saver, whole], case.data(rank), epochs=2, **distributed())
    trainer_arguments = {"ckpt_path": folder / "carried.ckpt"}
    fit(
        Probe(case.dtype, lr=0.5),
        [case.accumulation(), resumed],
        case.data(rank),
        epochs=2,
        fit_arguments=trainer_arguments,
        **distributed(),
    )
    return whole.steps, resumed.steps


def run_accumulation(rank: int):
    """Every case under every strategy that takes it."""
    results = {}
    for name, case in CASES.items():
        for dtype in (torch.float32, torch.float64):
            results["ddp", name, dtype] = run_case(dataclasses.replace(case, dtype=dtype), rank=rank, ranks=2)
    for name in SHARDED:
        if conditions.HAS_FSDP2_ON_CPU:
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            arguments = {"module": Sharded(), "strategy": strategy}
            results["fsdp2", name, torch.float32] = run_case(CASES[name], rank=rank, ranks=2, **arguments)
        if CASES[name].clip is None:
            results["fsdp1", name, torch.float32] = run_flat_shards(name, rank)
    return results


def run_pieces(rank: int):
    """Every case of micro-batching."""
    results = {}
    for name, options in MICRO.items():
        for accumulate in (1, 2):
            results["micro", name, accumulate] = run_micro(**options, rank=rank, ranks=2, accumulate=accumulate)
    if conditions.HAS_FSDP2_ON_CPU:
        for size in (1, 3):
            options = {"size": size, "rank": rank, "ranks": 2, "sharded": True}
            results["micro", f"fsdp2 in pieces of {size}", 1] = run_micro(**options)
    for name in ("whole", "pieces of 3", "auto on rank 1"):
        for unused in ("everywhere", "but on rank 1"):
            results["micro", name, unused] = run_micro(**MICRO[name], rank=rank, ranks=2, unused=unused)
    with pytest.raises(torch.OutOfMemoryError) as found:
        run_micro(size="auto", fits_on_rank={1: 0}, rank=rank, ranks=2)
    return {**results, "nothing fits": str(found.value)}


def every_case(folder: str) -> None:
    """Run every case on this rank and write the gradients of its steps."""
    rank = int(os.environ["LOCAL_RANK"])
    results = run_accumulation(rank) | run_pieces(rank)
    results["bf16"] = run_case(dataclasses.replace(CASES[FIRST], precision="bf16-mixed"), rank=rank, ranks=2)
    results["stock"], stock_calls = count_collectives(lambda: run_stock(rank))
    _, calls = count_collectives(lambda: run_case(CASES[FIRST], rank=rank, ranks=2))
    results["collectives"] = stock_calls, calls
    results["carried"] = resume_carried(rank, Path(folder))
    torch.save(results, Path(folder) / f"rank{rank}.pt")
