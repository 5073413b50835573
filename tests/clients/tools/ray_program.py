"""What each of Ray Train's workers runs: a fit under its strategy, with its report callback."""

from pathlib import Path

import lightning.pytorch as pl
import ray.train
import torch
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_plugins import (
    EMA,
    CSVStatisticsLogger,
    GradientAccumulation,
    LearningRateScheduler,
    StatisticsRecorder,
    WarmupCosine,
)
from tests.clients import plain_torch
from tests.clients.stack import DECAY, WINDOW
from tests.clients.tools import small

WORKERS = 2


class Die(pl.Callback):
    """Ends the first try in the second epoch's second batch, as a lost machine would."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            raise RuntimeError("lost")


def work(config):
    """Fit once to the end by itself; then a run with Ray's reports that dies, and in its second try goes on.

    Each rank leaves what it did in a file of its own.
    """
    torch.set_num_threads(1)
    path, rank = Path(config["path"]), ray.train.get_context().get_world_rank()
    kept = ray.train.get_checkpoint()
    if kept is None:
        fit(path / "whole", rank, config["epochs"])
        fit(path / "lost", rank, config["epochs"], RayTrainReportCallback(), Die())
    with kept.as_directory() as folder:
        # it is read here, while the folder is there
        resumed = path / f"resume-{rank}.ckpt"
        resumed.write_bytes((Path(folder) / RayTrainReportCallback.CHECKPOINT_NAME).read_bytes())
    fit(path / "lost", rank, config["epochs"], RayTrainReportCallback(), ckpt_path=resumed)


def fit(path, rank, epochs, *more, **options):
    """A fit under Ray's strategy, which writes into ``path``."""
    path.mkdir(exist_ok=True)
    ema, watch = EMA(DECAY), plain_torch.Watch()
    data = small.loader().dataset
    sampler = DistributedSampler(data, WORKERS, rank, shuffle=False, drop_last=True)
    trainer = prepare_trainer(
        pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices="auto",
            strategy=RayDDPStrategy(),
            plugins=[RayLightningEnvironment()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=path,
            callbacks=[
                GradientAccumulation(WINDOW),
                LearningRateScheduler(WarmupCosine(2)),
                ema,
                StatisticsRecorder(),
                CSVStatisticsLogger(path / "log.csv"),
                watch,
                *more,
            ],
        )
    )
    trainer.fit(small.Network(), DataLoader(data, small.BATCH, sampler=sampler), small.validation(), **options)
    done = {"raw": ema.raw_state_dict(), "average": ema.average_state_dict()}
    torch.save({**done, "rates": watch.rates, "batches": watch.batches}, path / f"rank{rank}.pt")
