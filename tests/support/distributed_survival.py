"""A run of FSDP2 on two ranks with distributed checkpoints; one of them is killed at a place that a number names."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_plugins import (
    EMA,
    ConstantDecay,
    CSVStatisticsLogger,
    GradientAccumulation,
    LearningRateScheduler,
    StatisticsRecorder,
    WarmupCosine,
)
from tests.support.ema_directories import RAW, fit
from tests.support.ema_distributed import save
from tests.support.survival_faults import Fault, Moments

EPOCHS = 3


class Batches(lightning.Callback):
    """Counts the batches of training, as one of the moments."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.moments._tick("training")


def train(directory, moment="", number=0, dying=0, ckpt_path=None):
    """Run to the end, or until rank ``dying`` has come to its ``number``-th moment; save the weights and averages.

    Returns:
        How often each moment came on this rank.
    """
    directory = Path(directory)
    moments = Moments(directory / "run")
    if moment and int(os.environ["LOCAL_RANK"]) == dying:
        moments.arm(Fault("SIGKILL", moment, 0.0), number, lambda: os.kill(os.getpid(), signal.SIGKILL))
    moments.listen("file")
    average, slow = EMA(ConstantDecay(0.8)), EMA(ConstantDecay(0.95), name="slow", **RAW)
    rates = LearningRateScheduler(WarmupCosine("20%"), record=True)
    others = [GradientAccumulation(2), rates, StatisticsRecorder(), Batches(moments)]
    fit(
        average,
        slow,
        *others,
        CSVStatisticsLogger(directory / "run" / "log.csv", flush_seconds=0),
        ModelCheckpoint(directory / "run" / "checkpoints", filename="{epoch}", save_top_k=-1, save_last=True),
        max_epochs=EPOCHS,
        ckpt_path=ckpt_path,
    )
    moments.stop()
    save(
        "train",
        directory,
        average=average.average_state_dict(),
        raw=average.raw_state_dict(),
        slow=slow.average_state_dict(),
        rates=list(rates.lrs),
    )
    return dict(moments.seen)
