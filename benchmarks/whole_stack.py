"""The whole stack per Trainer step: beside a bare Trainer, and beside what Lightning itself offers for the same.

The model is so small (four layers of eight units, four samples a batch, SGD) that the loop around it is all there is:
on a real model every ratio is nearer to 1. Measured is one epoch from its first batch to the end of its last, where
the rows that wait are written; what a fit costs besides (setup, checkpoints, the average of files) is a table of its
own. Lightning's way logs a row per step, as ours does, and computes its metrics by the cheapest means there is, batch
by batch rather than as running values.
"""

import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import Seconds, quiet, report, table, turns
from lightning_plugins import (
    EMA,
    CheckpointAveraging,
    CSVStatisticsLogger,
    GradientAccumulation,
    LearningRateScheduler,
    StatisticsRecorder,
    TensorBoardStatisticsLogger,
    WarmupCosine,
)

BATCH, CLASSES = 4, 8
BARE, EMPTY = "bare Trainer", "seven empty callbacks"
OURS, LIGHTNINGS = "the whole stack", "Lightning's equivalents"
GOAL, LIMIT, SHARE = 1.35, 1.8, 0.5


class Tiny(pl.LightningModule):
    """A classifier so small that everything around it shows; it times its own epoch."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*[torch.nn.Linear(CLASSES, CLASSES) for _ in range(4)])
        self.steps, self.seconds = steps, 0.0

    def forward(self, x):
        return self.layers(x)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 0:
            self.seconds = -time.process_time()

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):  # after the callbacks' hooks of this name
        if batch_idx + 1 == self.steps:
            self.seconds += time.process_time()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Scheduled(Tiny):
    """The same with its schedule where Lightning wants it."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        schedule = WarmupCosine(self.steps // 20, self.steps // 20, self.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, schedule), "interval": "step"},
        }


class Logging(Tiny):
    """The same with the statistics logged by the module."""

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        loss = torch.nn.functional.cross_entropy(logits, batch[1])
        hits = logits.topk(5).indices == batch[1][:, None]
        self.log("train_loss", loss)
        self.log("train_accuracy", hits[:, 0].float().mean())
        self.log("train_top5_accuracy", hits.any(1).float().mean())
        return loss


class ScheduledLogging(Logging, Scheduled):
    """Both."""


Made = tuple[type[Tiny], dict[str, Any]]
"""A module's class and the Trainer's arguments."""


def ours(folder: Path) -> dict[str, Callable[[], list[pl.Callback]]]:
    """Return the stack's techniques, each as the callbacks it needs."""

    def recorder() -> StatisticsRecorder:
        return StatisticsRecorder(["accuracy", "top5_accuracy"])

    return {
        "GradientAccumulation": lambda: [GradientAccumulation(effective_batch_size=BATCH)],
        "LearningRateScheduler": lambda: [LearningRateScheduler(WarmupCosine(warmup="5%", hold="5%"))],
        "EMA": lambda: [EMA(0.9999)],
        "CheckpointAveraging": lambda: [CheckpointAveraging(last=5)],
        "StatisticsRecorder": lambda: [recorder()],
        "StatisticsRecorder, CSVStatisticsLogger": lambda: [recorder(), CSVStatisticsLogger(folder / "log.csv")],
        "StatisticsRecorder, TensorBoardStatisticsLogger": lambda: [recorder(), TensorBoardStatisticsLogger(folder)],
    }


def whole(folder: Path) -> list[pl.Callback]:
    """Return the stack of the README."""
    parts = ours(folder)
    statistics = [*parts["StatisticsRecorder, CSVStatisticsLogger"](), TensorBoardStatisticsLogger(folder)]
    return [
        *(callback for name, make in parts.items() if not name.startswith("Statistics") for callback in make()),
        *statistics,
    ]


def equivalents(folder: Path) -> dict[str, Callable[[], Made]]:
    """Return what Lightning offers for each technique."""
    return {
        "GradientAccumulationScheduler": lambda: (Tiny, {"callbacks": [GradientAccumulationScheduler({0: 1})]}),
        "LambdaLR": lambda: (Scheduled, {}),
        "EMAWeightAveraging": lambda: (Tiny, {"callbacks": [pl.callbacks.EMAWeightAveraging(decay=0.9999)]}),
        "ModelCheckpoint": lambda: (Tiny, {"callbacks": [ModelCheckpoint(folder, save_top_k=-1)]}),
        "three self.log": lambda: (Logging, {}),
        "three self.log, CSVLogger": lambda: (Logging, {"logger": [CSVLogger(folder)]}),
        "three self.log, TensorBoardLogger": lambda: (Logging, {"logger": [TensorBoardLogger(folder)]}),
    }


def lightnings(folder: Path) -> Made:
    """Return all of them together, with the monitor that logs the rate."""
    callbacks = [
        GradientAccumulationScheduler({0: 1}),
        LearningRateMonitor("step"),
        pl.callbacks.EMAWeightAveraging(decay=0.9999),
        ModelCheckpoint(folder, save_top_k=-1),
    ]
    return ScheduledLogging, {"callbacks": callbacks, "logger": [CSVLogger(folder), TensorBoardLogger(folder)]}


def fitting(make: Callable[[Path], Made], steps: int, folder: Path) -> Callable[[], tuple[float, float]]:
    """Return a function that fits once, and returns the seconds of a step and those of all the rest."""
    data = TensorDataset(torch.randn(BATCH * steps, CLASSES), torch.randint(CLASSES, (BATCH * steps,)))
    number = count()

    def fit() -> tuple[float, float]:
        place = folder / str(next(number))
        begin = time.process_time()
        kind, settings = make(place)
        torch.manual_seed(0)
        module = kind(steps)
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            default_root_dir=place,
            log_every_n_steps=settings.pop("every", 1),
            enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in settings.get("callbacks", [])),
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"logger": False, **settings},
        )
        trainer.fit(module, DataLoader(data, batch_size=BATCH))
        return module.seconds / steps, time.process_time() - begin - module.seconds

    return fit


def measure(makes: dict[str, Callable[[Path], Made]], steps: int, rounds: int) -> tuple[Seconds, Seconds]:
    """Return seconds per step and seconds per fit besides."""
    with tempfile.TemporaryDirectory() as name:
        fits = {title: fitting(make, steps, Path(name) / str(i)) for i, (title, make) in enumerate(makes.items())}
        found = turns(fits, rounds=rounds)
    step = {title: [pair[0] for pair in pairs] for title, pairs in found.items()}
    return step, {title: [pair[1] for pair in pairs] for title, pairs in found.items()}


def stacks() -> dict[str, Callable[[Path], Made]]:
    def default_interval(folder: Path) -> Made:
        kind, settings = lightnings(folder)
        return kind, {**settings, "every": 50}

    return {
        BARE: lambda folder: (Tiny, {}),
        EMPTY: lambda folder: (Tiny, {"callbacks": [pl.Callback() for _ in range(7)]}),
        OURS: lambda folder: (Tiny, {"callbacks": whole(folder)}),
        LIGHTNINGS: lightnings,
        "Lightning's, a row every 50 steps": default_interval,
    }


def techniques() -> dict[str, Callable[[Path], Made]]:
    made: dict[str, Callable[[Path], Made]] = {BARE: lambda folder: (Tiny, {})}
    for name in ours(Path()):
        made[name] = lambda folder, name=name: (Tiny, {"callbacks": ours(folder)[name]()})
    for name in equivalents(Path()):
        made[f"Lightning's {name}"] = lambda folder, name=name: equivalents(folder)[name]()
    return made


def verdict(step: Seconds) -> str:
    """Return whether the goals are met; shares are formed round by round, of turns that stood side by side."""
    bare, mine, theirs = step[BARE], step[OURS], step[LIGHTNINGS]
    ratio = median(mine) / median(bare)
    low, _, high = quantiles([m / b for m, b in zip(mine, bare, strict=True)], n=4)
    shares = [(m - b) / (t - b) for m, t, b in zip(mine, theirs, bare, strict=True)]
    least, _, most = quantiles(shares, n=4)
    added = [1e6 * (median(side) - median(bare)) for side in (mine, theirs)]
    first = "met" if ratio <= GOAL else "within the limit" if ratio <= LIMIT else "MISSED"
    second = "met" if added[0] <= SHARE * added[1] else "MISSED"
    return (
        f"A step with the whole stack takes {ratio:.2f} of a bare one (quartiles {low:.2f} to {high:.2f}; goal {GOAL}, "
        f"at most {LIMIT}): {first}.\n\n"
        f"It adds {added[0]:.0f} us, {added[0] / added[1]:.2f} of the {added[1]:.0f} us that Lightning's equivalents "
        f"add (quartiles {least:.2f} to {most:.2f}; at most {SHARE}): {second}."
    )


def main(*, quick: bool = False) -> None:
    torch.set_num_threads(1)
    quiet()
    steps, rounds = (20, 2) if quick else (1000, 15)
    step, rest = measure(stacks(), steps, rounds)
    part, _ = measure(techniques(), steps, 2 if quick else 9)
    tables = [
        table("One Trainer step of 4 x Linear(8, 8), batch 4, SGD", step, base=BARE),
        verdict(step),
        table("A fit besides its steps: setup, checkpoints, the average", rest, base=BARE, unit="ms"),
        table("One Trainer step with one technique", part, base=BARE),
    ]
    report("whole_stack", tables, {"step": step, "rest": rest, "technique": part}, keep=not quick)


if __name__ == "__main__":
    main()
