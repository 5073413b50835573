"""Train a small ResNet to read scans of handwritten digits, every technique of this package at work.

    python examples/digits.py
    python examples/digits.py --epochs 60 --precision bf16-mixed --accelerator gpu
    python examples/digits.py --effective-batch-size 64 --micro-batch-size 16

An ordinary Lightning program: a network, a module, data, a Trainer. What `lightning_plugins` adds to it stands in the
list of callbacks in `main`. The scans come with scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from _common import CommandLine, from_torchvision, make, trainer_options, unused_folder
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
from lightning_plugins.statistics import plot_log

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
    parts = [(images.movedim(3, 1) / 255, target) for images, target in from_torchvision("CIFAR10", folder)]
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
    command = CommandLine(__doc__, epochs=30, batch_size=32, lr=0.1)
    add = command.add_argument
    add("--data", choices=("digits", "cifar10"), default="digits", help="what to learn (%(default)s)")
    add("--data-dir", type=Path, default="data", help="where cifar10's files are (%(default)s)")
    add("--ema-decay", type=float, default=0.99, help="of the average of the weights (%(default)s)")
    add("--effective-batch-size", type=int, help="images of a step, over several batches (one batch)")
    add("--micro-batch-size", type=int, help="images that go through the network at once (all of a batch)")
    options = command.options()
    schedule = WarmupCosine(warmup="5%", hold="5%")
    with command.refusing(OSError, RuntimeError, TypeError, ValueError):
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
            StatisticsRecorder(["accuracy"], progress_bar=["loss", "accuracy"]),
            CSVStatisticsLogger(str(folder / "log.csv")),
            TensorBoardStatisticsLogger(str(folder / "tensorboard")),
            best,
            last,
            averaging,
            TQDMProgressBar(refresh_rate=10),
        ]
        trainer = Trainer(
            **trainer_options(options),
            callbacks=callbacks,
            logger=False,
            deterministic=True,
            enable_model_summary=False,
        )
        make(folder)

    train, val, test = (DataLoader(split, options.batch_size, shuffle=split is splits[0]) for split in splits)
    module = Classifier(channels=splits[0].tensors[0].shape[1], lr=options.lr)
    start = time.perf_counter()
    with command.refusing():  # options that do not go together
        trainer.fit(module, train, val)
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
    reading = ClassificationReport(10, digits=3, path=[folder / "report.txt", folder / "confusion.png"])
    Trainer(
        **trainer_options(options),
        callbacks=[reading],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).test(tested, test, verbose=False)
    if trainer.is_global_zero:
        schedule.plot(trainer.global_step, folder / "learning-rate.png", base_lr=options.lr)
        plot_log(folder / "log.csv", folder / "curves.png")
        report(accuracy, trainer.global_step, seconds, folder)


def report(accuracy: dict[str, float], steps: int, seconds: float, folder: Path) -> None:
    """Print the result, what to look at, and where everything is."""
    print(f"\n{'weights':<20}{'test accuracy':>15}")
    for weights, value in accuracy.items():
        print(f"{weights:<20}{value:>15.4f}")
    print("\nOpen curves.png for loss, accuracy and rate, confusion-test.png for which digit is taken for which.")
    print(f"\n{steps} steps in {seconds:.1f} seconds. Written:", *sorted(folder.iterdir()), sep="\n  ")


if __name__ == "__main__":
    main()
