"""Runs on several ranks of which one cancels."""

import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_plugins import (
    EMA,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelTraining,
    CancelValidation,
    ConstantDecay,
    Event,
    EventCallback,
    GradientAccumulation,
    LearningRateScheduler,
    StatisticsRecorder,
    WarmupLinear,
)
from tests.support.events_runs import Diary, batches, make_regression
from tests.support.fsdp1 import FSDPOnCPU

ACTIONS = {
    action.__name__: action for action in (CancelBatch, CancelTraining, CancelValidation, CancelEpoch, CancelFit)
}


def cancelled_on_one_rank(strategy, action, event, phase, index, accumulate=1):
    """Train for two epochs of 6 batches a rank; rank 1 alone cancels in the first epoch. Return what the rank sees."""
    rank, shapes = None, set()

    def act(loop, found):
        if found in {Event.UPDATE_START, Event.INFERENCE_PREDICTION_END}:
            shapes.add(tuple(loop.last_output.shape))
        at = loop.trainer.validating == (phase == "validation") and loop.batch_index == index
        if rank == 1 and found.value == event and at and loop.epoch_index == 0:
            raise ACTIONS[action]

    diary = Diary(act)
    average, recorder = EMA(ConstantDecay(0.5), evaluate="raw", checkpoint="raw", after_fit="raw"), StatisticsRecorder()
    callbacks = [
        EventCallback(diary),
        LearningRateScheduler(WarmupLinear(2)),
        GradientAccumulation(accumulate),
        average,
        recorder,
    ]
    module = make_regression()
    if strategy == "fsdp2":
        module.configure_model = lambda: _shard(module)
        chosen = pl.strategies.ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    else:
        chosen = FSDPOnCPU() if strategy == "fsdp1" else pl.strategies.DDPStrategy()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=chosen,
            max_epochs=2,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=Path(folder),
        )
        rank = trainer.global_rank
        # each rank has samples of its own
        trainer.fit(module, batches(6, seed=10 + rank), batches(2, seed=20 + rank))
    raw = average.raw_state_dict()
    return {
        "events": diary.events,
        "outputs": sorted(shapes),
        "weights": {name: value.tolist() for name, value in raw.items()},
        "average": {name: value.tolist() for name, value in average.average_state_dict().items()},
        "step": trainer.global_step,
        "loss": trainer.callback_metrics["train_loss"].item(),
        "training": module.training,
    }


def _shard(module):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not isinstance(module.layer, FSDPModule):
        fully_shard(module.layer, mesh=module.device_mesh["data_parallel"])


def all_cases(strategy, cases):
    """Return the result of every case, by its name; in one pair of processes, since starting them takes longest."""
    return {name: cancelled_on_one_rank(strategy, *arguments) for name, arguments in cases.items()}


def without_a_meaning():
    """Cancel a validation in training on rank 1 only; return every rank's error."""
    try:
        cancelled_on_one_rank("ddp", "CancelValidation", Event.BATCH_START.value, "training", 1)
    except ValueError as error:
        return str(error)
    finally:
        torch.distributed.destroy_process_group()
    return "no error"
