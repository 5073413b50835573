"""What one of four ranks of the tests of meshes runs: one setup after another, with everything that changes weights."""

from __future__ import annotations

import dataclasses
import os
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.debug import CommDebugMode

from lightning_plugins import (
    EMA,
    CancelBatch,
    CheckpointAveraging,
    ConstantDecay,
    Event,
    EventCallback,
    GradientAccumulation,
    MicroBatching,
    PostHocEMA,
)
from lightning_plugins.ema.shadow import Shadow
from tests.support.accumulation_runs import Case, Probe, fit
from tests.support.fsdp1 import FSDPOnCPU, double_precision

RANKS = 4
DECAY = 0.8
SIZES = ((4, 7, 2, 5, 3), (6, 1, 8, 2, 9), (3, 5, 1, 4, 2), (2, 6, 7, 3, 5))
# windows of two batches, over the end of an epoch
CASE = Case(
    [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]],
    sizes=SIZES,
    arguments={"batches": 2, "carry": True},
    dtype=torch.float64,
    epochs=2,
)


def shard(net, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)


def plain(module):
    shard(module.net, module.device_mesh["data_parallel"])


def hybrid(module):
    shard(module.net, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def tensor(module):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(
        module.net, module.device_mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    if module.device_mesh["data_parallel"].size() > 1:
        shard(module.net, module.device_mesh["data_parallel"])


def checkpointed(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    apply_activation_checkpointing(module.net, check_fn=lambda layer: isinstance(layer, nn.Linear))


def checkpointed_and_sharded(module):
    checkpointed(module)
    plain(module)


def offloaded(module):
    from torch.distributed.fsdp import CPUOffloadPolicy

    shard(module.net, module.device_mesh["data_parallel"], offload_policy=CPUOffloadPolicy(pin_memory=False))


def mixed(module):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(module.net, module.device_mesh["data_parallel"], mp_policy=policy)


def compiled(module):
    for layer in (module.net[0], module.net[2]):
        # torch's own compiler takes longer than all of the rest
        layer.compile(backend="aot_eager")
    plain(module)


def nothing(module):
    pass


def mesh(data=4, tensor=1, *, directories=False):
    return lambda: ModelParallelStrategy(data, tensor, save_distributed_checkpoint=directories)


SETUPS = {
    # what is done to the module, the strategy, and whether batches run in pieces
    "fsdp2": (plain, mesh(), True),
    "hsdp": (hybrid, mesh(), True),
    "fsdp2 x tensor parallel": (tensor, mesh(2, 2), True),
    "tensor parallel": (tensor, mesh(1, 4), True),
    "distributed checkpoints": (tensor, mesh(2, 2, directories=True), True),
    "activation checkpointing": (checkpointed_and_sharded, mesh(), False),
    "cpu offload": (offloaded, mesh(), False),
    "mixed precision": (mixed, mesh(), False),
    "compiled layers": (compiled, mesh(), False),
    "fsdp1": (nothing, lambda: FSDPOnCPU(parts=("net.0",)), True),
    "fsdp1, activation checkpointing": (checkpointed, lambda: FSDPOnCPU(parts=("net.0",)), False),
    "fsdp1, not sharded": (nothing, lambda: FSDPOnCPU(sharding_strategy="NO_SHARD"), True),
}


class Meshed(Probe):
    def __init__(self, prepare, dtype=torch.float64):
        super().__init__(dtype)
        self.prepare = prepare
        self.prepared = False

    def configure_model(self):
        if not self.prepared:
            self.prepared = True
            self.prepare(self)

    def configure_optimizers(self):
        # Lightning cannot resume an optimizer without a state
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


class Seen(pl.Callback):
    """The whole weights and the whole gradient at every step."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        with whole(trainer.strategy.model):
            named = {clean(name): parameter for name, parameter in pl_module.net.named_parameters()}
            if all(parameter.grad is None for parameter in named.values()):
                # a batch was cancelled
                return
            self.steps.append(
                {
                    "weights": {name: full(parameter.data) for name, parameter in named.items()},
                    "gradient": {name: full(parameter.grad) for name, parameter in named.items()},
                }
            )


@contextmanager
def whole(model):
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True, writeback=False):
            yield
    else:
        yield


def clean(name):
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def case_of(name):
    """The case of a setup."""
    if name == "mixed precision":
        return dataclasses.replace(CASE, dtype=torch.float32)
    return CASE


def run(name, folder, *, resume=False):
    """One fit; return what this rank has seen of it."""
    prepare, strategy, in_pieces = SETUPS[name]
    strategy, rank = strategy(), int(os.environ["LOCAL_RANK"])
    data_rank = rank // getattr(strategy, "_tensor_parallel_size", 1)
    seen, ema, averaging = Seen(), EMA(ConstantDecay(DECAY)), CheckpointAveraging(last=2, compare=False)
    power = PostHocEMA((0.1,), dirpath=folder / "snapshots")
    callbacks = [case_of(name).accumulation(), seen, ema, power]
    callbacks += [MicroBatching(3)] if in_pieces else []
    files = folder / "resumed" if resume else folder
    callbacks += [averaging, ModelCheckpoint(files, filename="{epoch}", save_top_k=-1)]
    with counted_collectives() as collectives:
        trainer = fit(
            Meshed(prepare, case_of(name).dtype),
            callbacks,
            case_of(name).data(data_rank),
            epochs=2,
            fit_arguments={"ckpt_path": folder / "epoch=0.ckpt"} if resume else None,
            devices=RANKS,
            strategy=strategy,
            plugins=[double_precision()] if isinstance(strategy, FSDPOnCPU) else None,
            use_distributed_sampler=False,
            enable_checkpointing=True,
        )
    return {
        "steps": seen.steps,
        "global_step": trainer.global_step,
        "average": ema.average_state_dict(),
        "raw": ema.raw_state_dict(),
        "power": power._shadows[0].collect("average", copies=True),
        "averaged": str(averaging.path),
        "collectives": collectives,
    }


@contextmanager
def counted_collectives():
    """How many collectives the updates of an average ran, one number an update."""
    counts, update = [], Shadow.update

    def counted(shadow, decay):
        with CommDebugMode() as mode:
            update(shadow, decay)
        counts.append(mode.get_total_counts())

    Shadow.update = counted
    try:
        yield counts
    finally:
        Shadow.update = update


def effective_batch_size(folder):
    """The batches of a step of 16 samples: two ranks share each batch of 4."""
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"inputs": torch.randn(4, 6, generator=generator, dtype=torch.float64), "labels": torch.zeros(4, dtype=int)}
    ] * 16
    loader = torch.utils.data.DataLoader(samples, batch_size=4)
    accumulation = GradientAccumulation(effective_batch_size=16)
    strategy = ModelParallelStrategy(2, 2, save_distributed_checkpoint=False)
    options = {"devices": RANKS, "strategy": strategy, "limit_train_batches": 2}
    trainer = fit(Meshed(tensor), [accumulation], loader, **options)
    return accumulation.accumulation_plan(trainer).changes


CANCELLED = dataclasses.replace(CASE, windows=[[0], [2], [3], [4]], arguments={"batches": 1}, epochs=1)


def cancelled(folder):
    """Rank 1 alone cancels the second batch."""
    rank, seen = int(os.environ["LOCAL_RANK"]), Seen()

    def cancel(loop, event):
        if rank == 1 and loop.batch_index == 1 and event is Event.BATCH_START:
            raise CancelBatch

    callbacks = [CANCELLED.accumulation(), seen, EventCallback(cancel)]
    strategy = ModelParallelStrategy(2, 2, save_distributed_checkpoint=False)
    options = {"devices": RANKS, "strategy": strategy, "use_distributed_sampler": False}
    trainer = fit(Meshed(tensor), callbacks, CANCELLED.data(rank // 2), **options)
    return {"steps": seen.steps, "global_step": trainer.global_step}


def every_setup(folder: str, names: list[str]) -> None:
    """Run every setup, and again from the end of its first epoch, which is in mid-window."""
    rank, results = int(os.environ["LOCAL_RANK"]), {}
    for name in names:
        if name in {"effective_batch_size", "cancelled"}:
            results[name] = globals()[name](folder)
            continue
        place = Path(folder) / name
        results[name] = run(name, place)
        if name != "activation checkpointing":  # Lightning cannot resume it from a single file
            results[name, "resumed"] = run(name, place, resume=True)
    torch.save(results, Path(folder) / f"rank{rank}.pt")
