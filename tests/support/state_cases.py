"""A checkpoint out of the middle of a run for each technique, and other values in every place of its state."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score

import lightning_plugins as lp
from tests.support.other_values import ODD, Place, at, near, places
from tests.support.survival_run import BATCHES, Net, StatefulLoader, samples

EPOCHS, CUT = 2, 9  # the checkpoint is cut after so many batches, of six an epoch, with a window open
OURS = "lightning_plugins_"
RAW = {"evaluate": "raw", "checkpoint": "raw", "after_fit": "raw"}


class Scored(Net):
    """The network with a score of class 1 for metrics that count by themselves."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self(batch[0])
        loss = torch.nn.functional.cross_entropy(scores, batch[1])
        return {"loss": loss, "logits": scores, "target": batch[1]}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().validation_step(batch, batch_idx)
        self.log("val_loss", loss)
        return {"loss": loss, "logits": self(batch[0]), "target": batch[1]}


def cut_short(loop: Any, event: Any) -> None:
    """End the first epoch before its last batch."""
    if event is lp.Event.BATCH_END and (loop.epoch_index, loop.batch_index) == (0, 2):
        raise lp.CancelEpoch


def _statistics(folder: Path) -> list[Any]:
    return [
        lp.StatisticsRecorder(["accuracy", MulticlassF1Score(5), MulticlassAUROC(5)]),
        lp.CSVStatisticsLogger(folder / "log.csv", flush_seconds=0),
        lp.CSVStatisticsLogger(folder / "epochs.csv", every="epoch"),
        lp.TensorBoardStatisticsLogger(folder / "tensorboard", axis="samples"),
    ]


# technique -> its callbacks, for a folder
STACKS: dict[str, Callable[[Path], list[Any]]] = {
    "accumulation": lambda folder: [lp.GradientAccumulation(4, carry=True)],
    "schedules": lambda folder: [
        lp.GradientAccumulation(2),
        lp.LearningRateScheduler(
            {"body": lp.WarmupCosine("20%"), "head": lp.Linear(None, 1, 0.1)},
            plateau=lp.Plateau("val_loss", "min", 0.5, 0, 9.0),
        ),
        lp.LearningRateScheduler(lp.Cosine(None, 1, 10), parameter="weight_decay"),
    ],
    "time": lambda folder: [lp.LearningRateScheduler(lp.Cosine(None, 1, 0), clock="time")],
    "averages": lambda folder: [
        lp.EMA(0.9),
        lp.EMA(0.8, name="slow", buffers="average", update_every_n_steps=2, **RAW),
        lp.LatestWeightAveraging(3, every=2, **RAW),
    ],
    "posthoc": lambda folder: [lp.PostHocEMA(every_n_steps=2, dirpath=folder / "posthoc")],
    "statistics": _statistics,
    "loggers alone": lambda folder: [lp.CSVStatisticsLogger(folder / "log.csv", flush_seconds=0)],
    "checkpoints": lambda folder: [lp.CheckpointAveraging(best=2)],
    "microbatching": lambda folder: [lp.MicroBatching("auto")],
    "events": lambda folder: [lp.EventCallback(cut_short)],
}


class InMemory(TorchCheckpointIO):
    """Loads this, whatever the file holds."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__()
        self.content = content

    def load_checkpoint(self, path: Any, *rest: Any, **more: Any) -> dict[str, Any]:
        return copy.deepcopy(self.content)


class Cut(pl.Callback):
    """Writes a checkpoint after so many batches, or in an epoch that was cut short, and ends the run there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == CUT:
            self._cut(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.processed < BATCHES:
            self._cut(trainer)

    def _cut(self, trainer: Any) -> None:
        trainer.save_checkpoint(self.path)
        raise InterruptedError


def fit(folder: Path, name: str, *more: Any, content: dict[str, Any] | None = None, ckpt_path: Any = None) -> list[Any]:
    """Run a technique's callbacks; return them."""
    torch.manual_seed(0)
    callbacks = STACKS[name](folder)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        max_time="00:00:10:00",
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        plugins=[] if content is None else [InMemory(content)],
        callbacks=[*callbacks, ModelCheckpoint(folder / "checkpoints", save_top_k=2, monitor="val_loss"), *more],
    )
    module = Scored()
    if name == "microbatching":
        # another number of pieces is another run with it, and one sample has no variance
        module.norm = torch.nn.Identity()
    trainer.fit(module, StatefulLoader(samples(22, 1)), DataLoader(samples(10, 2), batch_size=4), ckpt_path=ckpt_path)
    return callbacks


@dataclass(frozen=True)
class Stopped:
    """A run of a technique that ended in its middle.

    Args:
        name: The technique, one of :data:`STACKS`.
        folder: Where it ran; ``resume`` puts back what it left there.
        content: The checkpoint.
    """

    name: str
    folder: Path
    content: dict[str, Any]

    @classmethod
    def run(cls, folder: Path, name: str) -> Stopped:
        """Run in a folder until the checkpoint is cut."""
        (folder / "run").mkdir(parents=True)
        try:
            fit(folder / "run", name, Cut(folder / "cut.ckpt"))
        except InterruptedError:
            shutil.copytree(folder / "run", folder / "left")
        return cls(name, folder, torch.load(folder / "cut.ckpt", weights_only=True))

    def places(self) -> list[Place]:
        """Return every place in what the package keeps in the checkpoint."""
        found = []
        for key, state in self.content["callbacks"].items():
            if not key.startswith(("ModelCheckpoint", "Timer")):
                found += [("callbacks", key, *place) for place in places(state) if place]
        for index, state in enumerate(self.content["lr_schedulers"]):
            found += [("lr_schedulers", index, *place) for place in places(state) if place]
        for key in self.content:
            if key.startswith(OURS):
                found += [(key, *place) for place in places(self.content[key])]
        return found

    def cases(self) -> list[tuple[Place, Any]]:
        """Return every place with every value that is tried there."""
        return [(place, value) for place in self.places() for value in (*ODD, *near(at(self.content, place)))]

    def restore(self) -> None:
        """Put back what the run left."""
        shutil.rmtree(self.folder / "run")
        shutil.copytree(self.folder / "left", self.folder / "run")

    def resume(self, content: dict[str, Any]) -> list[Any]:
        """Go on to the end from a checkpoint with this content, where the run was restored; return the callbacks."""
        return fit(self.folder / "run", self.name, content=content, ckpt_path=self.folder / "cut.ckpt")

    def changed(self) -> list[str]:
        """Return which of the files that the run left are others now."""
        left = sorted(path.relative_to(self.folder / "left") for path in (self.folder / "left").rglob("*"))
        pairs = ((self.folder / "left" / path, self.folder / "run" / path) for path in left)
        return [str(new) for old, new in pairs if old.is_file() and not _same(old, new)]


def _same(old: Path, new: Path) -> bool:
    return new.is_file() and old.read_bytes() == new.read_bytes()
