"""Train a small ResNet to read scans of handwritten digits, every technique of this package at work.

    python examples/digits.py
    python examples/digits.py --epochs 60 --precision bf16-mixed --accelerator gpu
    python examples/digits.py --effective-batch-size 64 --micro-batch-size 16

An ordinary Lightning program: a network, a module, data, a Trainer. What `lightning_plugins` adds to it stands in the
list of callbacks in `main`. The scans come with scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning_utilities.core import rank_zero
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins import (
    EMA,
    CheckpointAveraging,
    ClassificationReport,
    CSVStatisticsLogger,
    GradientAccumulation,
    LearningRateScheduler,
    MicroBatching,
    StatisticsRecorder,
    TensorBoardStatisticsLogger,
    WarmupCosine,
    extract_weights,
)

# What would be printed and says nothing about this run:
warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")  # between torch and Lightning
warnings.filterwarnings("ignore", ".* does not have many workers")  # the images are in memory: nothing to wait for
rank_zero.log.addFilter(lambda record: "Tip: " not in record.getMessage())  # for other products

# --- the network and its task ----------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.around = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, maps: Tensor) -> Tensor:
        """Add both ways."""
        return functional.relu(self.body(maps) + self.around(maps))


class Classifier(LightningModule):
    """Images in, one of ten classes out. Callbacks read predictions and targets from what the steps return."""

    def __init__(self, channels: int = 1, width: int = 32, classes: int = 10, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Block(width, width, stride=1),
            Block(width, 2 * width, stride=2),
            Block(2 * width, 4 * width, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(images)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Learn from images that are moved a little, differently each time."""
        images, target = batch
        return self._step(random_shift(images, by=images.shape[-1] // 8), target)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measure on images that are not learned from."""
        return self._step(*batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measure on images that nothing was chosen by."""
        found = self._step(*batch)
        correct = (found["logits"].argmax(1) == found["target"]).float().mean()
        self.log("test_accuracy", correct, batch_size=len(found["target"]), sync_dist=True)
        return found

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer with its peak rate; the callback does the rest."""
        return torch.optim.SGD(self.parameters(), self.hparams["lr"], momentum=0.9, nesterov=True, weight_decay=5e-4)

    def _step(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        logits = self(images)
        return {"loss": functional.cross_entropy(logits, target), "logits": logits.detach(), "target": target}


def random_shift(images: Tensor, by: int) -> Tensor:
    """Move every image by up to `by` pixels up or down and left or right; what comes in from outside is 0."""
    windows = functional.pad(images, [by] * 4).unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
    down, right = torch.randint(2 * by + 1, (2, len(images)), device=images.device)
    return windows[torch.arange(len(images), device=images.device), :, down, right]


# --- the data: images in [0, 1] as (count, channels, side, side), and their classes ----------------------------------

Splits = tuple[TensorDataset, TensorDataset, TensorDataset]  # training, validation, test


def digits() -> Splits:
    """scikit-learn's 1,797 scans of 8 x 8 pixels."""
    torch.set_num_threads(1)  # on images so small threads wait for each other longer than they work
    scans = load_digits()
    images = torch.tensor(scans.images, dtype=torch.float32).unsqueeze(1) / 16
    rest, test = set_aside(TensorDataset(images, torch.tensor(scans.target)), 360)
    return (*set_aside(rest, 270), test)


def cifar10(folder: Path) -> Splits:
    """60,000 photographs of 32 x 32 pixels, where torchvision and the data are there already."""
    try:
        from torchvision.datasets import CIFAR10  # noqa: PLC0415  # optional

        sources = [CIFAR10(folder, train=train, download=False) for train in (True, False)]
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(f"--data cifar10 needs torchvision, with its data in {folder}: {error}") from error
    parts = [(torch.tensor(source.data).movedim(3, 1) / 255, torch.tensor(source.targets)) for source in sources]
    rest, test = (TensorDataset(*part) for part in parts)
    return (*set_aside(rest, len(rest) // 10), test)


def set_aside(data: TensorDataset, count: int) -> tuple[TensorDataset, TensorDataset]:
    """Take `count` images out, every class in proportion, and the same ones whatever the seed."""
    target = data.tensors[1]
    kept, aside = train_test_split(range(len(target)), test_size=count, stratify=target, random_state=0)
    return TensorDataset(*data[kept]), TensorDataset(*data[aside])


# --- the program -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Train, test, and say what came out."""
    options, refuse = command_line()
    schedule = WarmupCosine(warmup="5%", hold="5%")
    try:
        seed_everything(options.seed, workers=True, verbose=False)
        splits = digits() if options.data == "digits" else cifar10(options.data_dir)
        folder = unused_folder(options.output)
        best = ModelCheckpoint(folder, "best", monitor="val_loss")
        last = ModelCheckpoint(folder, "last")
        averaging = CheckpointAveraging(last=5)
        callbacks: list[Callback] = [
            *([GradientAccumulation(effective_batch_size=size)] if (size := options.effective_batch_size) else []),
            *([MicroBatching(size)] if (size := options.micro_batch_size) else []),
            LearningRateScheduler(schedule),
            EMA(options.ema_decay),
            StatisticsRecorder(["accuracy"]),
            CSVStatisticsLogger(str(folder / "log.csv")),
            TensorBoardStatisticsLogger(str(folder / "tensorboard")),
            best,
            last,
            averaging,
            TQDMProgressBar(refresh_rate=10),
        ]
        trainer = Trainer(
            precision=options.precision,
            accelerator=options.accelerator,
            devices=options.devices,
            max_epochs=options.epochs,
            limit_train_batches=options.limit_batches,
            limit_val_batches=options.limit_batches,
            limit_test_batches=options.limit_batches,
            callbacks=callbacks,
            logger=False,
            deterministic=True,
            enable_model_summary=False,
        )
        rank_zero.rank_zero_only(folder.mkdir)(parents=True)
    except (OSError, RuntimeError, TypeError, ValueError, MisconfigurationException) as error:
        refuse(str(error))  # an option that cannot be followed here

    train, val, test = (DataLoader(split, options.batch_size, shuffle=split is splits[0]) for split in splits)
    module = Classifier(channels=splits[0].tensors[0].shape[1], lr=options.lr)
    start = time.perf_counter()
    try:
        trainer.fit(module, train, val)
    except MisconfigurationException as error:
        refuse(str(error))  # options that do not go together
    seconds = time.perf_counter() - start

    weights = {
        "raw, last step": extract_weights(last.best_model_path, "raw"),
        "EMA, last step": extract_weights(last.best_model_path, "average"),
        "best single (EMA)": extract_weights(best.best_model_path, "average"),
    }
    if averaging.path is not None:  # it takes two epochs
        weights["averaged (EMA)"] = torch.load(averaging.path)["state_dict"]
    accuracy = {}
    for name, state in weights.items():
        tested = Classifier(**module.hparams)
        tested.load_state_dict(state)
        accuracy[name] = trainer.test(tested, test, verbose=False)[0]["test_accuracy"]
    if trainer.is_global_zero:
        schedule.plot(trainer.global_step, folder / "learning-rate.png", base_lr=options.lr)
        reading = ClassificationReport(10, digits=3)
        images, target = splits[2].tensors
        with torch.no_grad():
            reading.update(tested.to(images).eval()(images), target)
        (folder / "report.txt").write_text(str(reading.compute()))
        report(accuracy, str(reading.compute()), trainer.global_step, seconds, folder)


def report(accuracy: dict[str, float], reading: str, steps: int, seconds: float, folder: Path) -> None:
    """Print the result and where everything is."""
    print(f"\n{reading}\n{'weights':<20}{'test accuracy':>15}")
    for weights, value in accuracy.items():
        print(f"{weights:<20}{value:>15.4f}")
    print(f"\n{steps} steps in {seconds:.1f} seconds. Written:", *sorted(folder.iterdir()), sep="\n  ")


def unused_folder(parent: Path) -> Path:
    """Return a folder for this run, named by the time."""
    while (folder := parent / time.strftime("%Y-%m-%dT%H-%M-%S")).exists():
        time.sleep(0.1)  # another run began in this second
    return folder


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def command_line() -> tuple[argparse.Namespace, Callable[[str], NoReturn]]:
    """Return the options, and what to call with the reason if they cannot be followed."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=("digits", "cifar10"), default="digits", help="what to learn (%(default)s)")
    add("--data-dir", type=Path, default="data", help="where cifar10's files are (%(default)s)")
    add("--epochs", type=int, default=30, help="times through the training images (%(default)s)")
    add("--batch-size", type=int, default=32, help="images of a step (%(default)s)")
    add("--lr", type=float, default=0.1, help="peak learning rate (%(default)s)")
    add("--ema-decay", type=float, default=0.99, help="of the average of the weights (%(default)s)")
    add("--effective-batch-size", type=int, help="images of a step, over several batches (one batch)")
    add("--micro-batch-size", type=int, help="images that go through the network at once (all of a batch)")
    add("--precision", default="32-true", help="as in Lightning: bf16-mixed, 16-mixed, ... (%(default)s)")
    add("--accelerator", default="auto", help="as in Lightning: cpu, gpu, ... (%(default)s)")
    add("--devices", default="1", help="as in Lightning: how many, or auto (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, order and shifts (%(default)s)")
    add("--output", type=Path, default="runs", help="where the run's folder is made (%(default)s)")
    add("--limit-batches", type=int, help="batches of an epoch, for a quick trial (all)")
    options = parser.parse_args()
    for name in ("epochs", "batch_size", "lr", "limit_batches", "effective_batch_size", "micro_batch_size"):
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be a finite number above 0, got {value}")
    return options, parser.error


if __name__ == "__main__":
    main()
