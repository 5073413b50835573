"""The schedule on two ranks: the same rates on both, and those of one process."""

import lightning.pytorch as unified
import pytest
import torch

from lightning_plugins import LearningRateScheduler, Linear, Plateau, WarmupCosine
from tests.support.ranks import run_ranks
from tests.support.training import loader, make_module, make_trainer, rates


def strategy_of(name):
    if name == "ddp":
        return unified.strategies.DDPStrategy(process_group_backend="gloo")
    return unified.strategies.ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo", save_distributed_checkpoint=False
    )


def module_for(name):
    module = make_module(momentum=0.9)  # Lightning's sharded resume wants an optimizer with a state
    if name == "fsdp2":

        def configure_model():
            torch.distributed.fsdp.fully_shard(module.layer, mesh=module.device_mesh["data_parallel"])

        module.configure_model = configure_model
    return module


def train(strategy, path, checkpoint, epochs):
    """Train, and save the last state where a path is given; return this rank's rates."""
    module = module_for(strategy)
    callback = LearningRateScheduler({0: WarmupCosine("20%")}, record=True)
    options = {"devices": 2, "strategy": strategy_of(strategy), "accumulate_grad_batches": 2, "max_epochs": epochs}
    trainer = make_trainer(path, callbacks=[callback], **options)
    trainer.fit(module, loader(20), ckpt_path=checkpoint)
    trainer.save_checkpoint(f"{path}/{epochs}.ckpt")
    return rates(module), callback.lrs


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_agree_and_resume(tmp_path, strategy):
    # 20 samples on 2 ranks are 10 batches each, 5 steps an epoch
    (first, recorded), (second, _) = run_ranks(train, strategy, str(tmp_path), None, 2)
    assert first == second == recorded == pytest.approx([0.1 * WarmupCosine(2, total=10)(step) for step in range(10)])
    longer, recorded = zip(*run_ranks(train, strategy, str(tmp_path), str(tmp_path / "2.ckpt"), 4), strict=True)
    assert longer[0] == longer[1]
    if strategy == "fsdp2":  # torch makes the optimizer's state with a step of rate 0 before it loads a saved one
        assert [used.pop(0) for used in longer] == [0, 0]
    assert recorded == longer
    assert longer[0] == pytest.approx([0.1 * WarmupCosine(4, total=20)(step) for step in range(10, 20)])


def train_on_a_metric_that_differs(path):
    """Each rank logs its own metric; rank zero's stalls, the other's improves."""
    module = make_module(momentum=0.9)

    def validation_step(batch, batch_idx):
        value = 1.0 if trainer.global_rank == 0 else -float(trainer.global_step)
        module.log("metric", value, sync_dist=False)

    module.validation_step = validation_step
    callback = LearningRateScheduler(Linear(1, 0, 1), plateau=Plateau("metric", factor=0.5, patience=0))
    timed = LearningRateScheduler(Linear(None, 1, 0), parameter="momentum", clock="time", record=True)
    options = {"devices": 2, "strategy": strategy_of("ddp"), "max_epochs": 3, "max_time": {"minutes": 10}}
    trainer = make_trainer(path, callbacks=[callback, timed], **options)
    trainer.fit(module, loader(4), loader(2))
    return rates(module), timed.lrs


def test_ranks_agree_on_a_plateau_and_on_the_time_even_when_their_metrics_and_clocks_do_not(tmp_path):
    (first, momenta), (second, other) = run_ranks(train_on_a_metric_that_differs, str(tmp_path))
    assert first == second == pytest.approx([0, 0.1, 0.1, 0.1, 0.05, 0.05])
    assert momenta == other == sorted(other, reverse=True)
    assert momenta[0] == pytest.approx(0.9, rel=0.1)
    assert momenta[-1] < momenta[0]
