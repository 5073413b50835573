"""The run that is killed: every technique that keeps a state, a small network, and data whose order is a function.

What plain Lightning itself can repeat decides what the run is made of. It saves no global random state, so that a
loader with ``shuffle=True`` and ``nn.Dropout`` go another way after any resume; here the order of the data and the
noise are functions of the epoch and the batch, as those of a ``DistributedSampler`` are. It does not fast-forward a
loader either, so that a run saved in mid-epoch has one that keeps its own place (a *stateful* loader). And two of its
own checkpoints are no place to go on from; :func:`can_resume` leaves them out, as the cards tell users to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_plugins import (
    EMA,
    CancelBatch,
    CheckpointAveraging,
    Cosine,
    CSVStatisticsLogger,
    Event,
    EventCallback,
    GradientAccumulation,
    LatestWeightAveraging,
    LearningRateScheduler,
    Linear,
    MicroBatching,
    Plateau,
    PostHocEMA,
    StatisticsRecorder,
    TensorBoardStatisticsLogger,
    TrainingLoop,
    WarmupCosine,
    synthesize_ema,
)

SAMPLES, BATCH, BATCHES = 22, 4, 6  # the last batch has two samples
EPOCHS = 4
WIDTH = 0.07  # of the average that is made of the snapshots


@dataclass(frozen=True)
class Plan:
    """One way to run: where checkpoints are cut, what a step is made of, and what is averaged.

    Args:
        name: What a test calls it.
        checkpoints: Arguments of ``ModelCheckpoint``.
        accumulation: Arguments of ``GradientAccumulation``.
        averaging: Arguments of ``CheckpointAveraging``.
        stateful: Whether the loader keeps its place.
        trainer: Arguments of the Trainer.
        pieces: Samples of a piece of ``MicroBatching``; ``None``: whole batches.
    """

    name: str
    checkpoints: dict[str, Any]
    accumulation: dict[str, Any] = field(default_factory=lambda: {"batches": 2})
    averaging: dict[str, Any] = field(default_factory=lambda: {"last": 3})
    stateful: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)
    pieces: int | None = None

    @property
    def window(self) -> int:
        """Batches of a step."""
        return int(self.accumulation["batches"])


PLANS = {
    plan.name: plan
    for plan in (
        Plan("each epoch", {"save_top_k": -1, "save_last": True}),
        # four batches to a step and six to an epoch: every second epoch ends in the middle of a step
        Plan(
            "the best one, windows over epochs",
            {"save_top_k": 1, "save_last": True, "monitor": "val_loss"},
            accumulation={"batches": 4, "carry": True},
            averaging={"best": 2},
        ),
        Plan(
            "after each validation",
            {"save_top_k": -1, "save_on_train_epoch_end": False},
            averaging={"last": 2},
            pieces=2,
        ),
        Plan(
            "in mid-epoch",
            {"save_top_k": -1, "save_last": True, "every_n_train_steps": 2},
            accumulation={"batches": 2},
            stateful=True,
        ),
        Plan(
            "in mid-epoch, windows over epochs",
            {"save_top_k": -1, "every_n_train_steps": 1},
            accumulation={"batches": 4, "carry": True},
            stateful=True,
        ),
        # twice an epoch; the first of them stands in the middle of a step
        Plan(
            "after a validation in mid-epoch",
            {"save_top_k": -1, "save_on_train_epoch_end": False},
            accumulation={"batches": 4, "carry": True},
            stateful=True,
            trainer={"val_check_interval": 3},
        ),
    )
}


class Net(pl.LightningModule):
    """Two layers with batch normalization between them, and noise that is a function of epoch and batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.norm(self.first(x)).relu()
        return self.last(hidden if keep is None else hidden * keep)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * self.current_epoch + batch_idx)
        keep = torch.rand(7, generator=generator) > 0.2
        return cross_entropy(self(batch[0], keep), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": [*self.first.parameters(), *self.norm.parameters()], "name": "body", "weight_decay": 0.0},
            {"params": self.last.parameters(), "name": "head", "lr": 0.1},
        ]
        return torch.optim.AdamW(groups, lr=0.05)


class StatefulLoader:
    """Batches in an order of each epoch's own, and a place that a checkpoint keeps."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset
        self.sampler = self  # where Lightning looks for `set_epoch`
        self.epoch = self.position = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self):
        start, self.position = self.position % BATCHES, 0
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch))
        for index in range(start, BATCHES):
            self.position = index + 1  # Lightning asks no further when it knows the length
            yield self.dataset[order[index * BATCH : (index + 1) * BATCH]]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.position = state_dict["position"]


def samples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 6, generator=generator), torch.randint(5, (count,), generator=generator))


def loaders(plan: Plan) -> tuple[Any, DataLoader]:
    dataset = samples(SAMPLES, 1)
    train: Any = StatefulLoader(dataset)
    if not plan.stateful:
        sampler = DistributedSampler(dataset, num_replicas=1, rank=0, seed=3)
        train = DataLoader(dataset, batch_size=BATCH, sampler=sampler)
    return train, DataLoader(samples(10, 2), batch_size=BATCH)


def leave_a_batch_out(loop: TrainingLoop, event: Event) -> None:
    """One batch of the third epoch changes nothing."""
    if event is Event.BATCH_START and (loop.epoch_index, loop.batch_index) == (2, 1):
        raise CancelBatch


def stack(folder: Path, plan: Plan) -> list[Any]:
    """Every technique with a state, in an order of no meaning."""
    return [
        CheckpointAveraging(**plan.averaging),
        StatisticsRecorder(["accuracy"]),
        CSVStatisticsLogger(folder / "log.csv", flush_seconds=0),
        CSVStatisticsLogger(folder / "epochs.csv", every="epoch"),
        TensorBoardStatisticsLogger(folder / "tensorboard", axis="samples"),
        PostHocEMA(every_n_steps=2, dirpath=folder / "posthoc"),
        GradientAccumulation(**plan.accumulation),
        # nothing is good enough for this plateau: the factor halves at every validation but the first
        LearningRateScheduler(
            {"body": WarmupCosine("20%"), "head": Linear(None, 1, 0.1)},
            plateau=Plateau("val_loss", "min", 0.5, 0, 9.0),
            record=True,
        ),
        LearningRateScheduler(Cosine(None, 1, 10), parameter="weight_decay", record=True),
        EventCallback(leave_a_batch_out),
        EMA(0.9),
        LatestWeightAveraging(3, every="10%", evaluate="raw", checkpoint="raw", after_fit="raw"),
        *([] if plan.pieces is None else [MicroBatching(plan.pieces)]),
        ModelCheckpoint(folder / "checkpoints", **plan.checkpoints),
    ]


def train(folder: Path, plan: Plan, final: Path, *, ckpt_path: Path | None = None, extra: Any = ()) -> dict[str, Any]:
    """Run to the end, and save a last checkpoint as ``final``; return what a user of the run has in memory then."""
    torch.manual_seed(0)
    module, callbacks = Net(), stack(folder, plan)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*callbacks, *extra],
        **plan.trainer,
    )
    trainer.fit(module, *loaders(plan), ckpt_path=ckpt_path)
    trainer.save_checkpoint(final)
    found = {type(callback).__name__: callback for callback in callbacks}
    return {
        "raw": found["EMA"].raw_state_dict(),
        "average": found["EMA"].average_state_dict(),
        "latest": found["LatestWeightAveraging"].average_state_dict(),
        "module": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "rates": list(zip(*(each.lrs for each in callbacks if isinstance(each, LearningRateScheduler)), strict=True)),
        "scores": found["CheckpointAveraging"].scores,
        "posthoc": synthesize_ema(folder / "posthoc", WIDTH),
    }


def can_resume(checkpoint: dict[str, Any], plan: Plan) -> bool:
    """Return whether plain Lightning goes on from this checkpoint as if nothing had been.

    Two are left out. One cut by ``every_n_train_steps`` on an epoch's last batch skips that epoch's validation. One
    cut in the middle of a window has lost the window's gradients, unless windows are carried: ``every_n_train_steps``
    cuts such ones after a resume, when the step that it was just saved at is still the current one.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if "every_n_train_steps" not in plan.checkpoints:
        return True
    if progress["is_last_batch"]:
        return False
    return bool(plan.accumulation.get("carry")) or progress["current"]["ready"] % plan.window == 0
