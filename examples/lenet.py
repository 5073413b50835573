"""Train LeNet to read handwritten digits, with running statistics in a CSV file.

    python examples/lenet.py
    python examples/lenet.py --layout s4tf
    python examples/lenet.py --data mnist --batch-size 128 --accelerator gpu

The smallest of the programs. What `lightning_plugins` adds to ordinary Lightning are two callbacks: one that measures
and one that writes. The images come with scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from _common import CommandLine, from_torchvision, make, trainer_options, unused_folder
from lightning_plugins import CSVStatisticsLogger, StatisticsRecorder
from lightning_plugins.statistics import plot_log


class LeNet(LightningModule):
    """Images of 28 x 28 pixels in, one of ten classes out. It logs nothing itself."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
            *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(images)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss; the recorder sees the logits and knows that `batch[1]` are the classes."""
        images, target = batch
        return functional.cross_entropy(self(images), target)

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), self.lr)


def digits() -> list[tuple[Tensor, Tensor]]:
    """scikit-learn's 1,797 scans of 8 x 8 pixels, enlarged to MNIST's size: images and classes to train and to test."""
    torch.set_num_threads(1)  # on images so small threads wait for each other longer than they work
    scans = load_digits()
    images = functional.interpolate(torch.tensor(scans.images)[:, None] * (255 / 16), (28, 28), mode="bilinear")
    target = torch.tensor(scans.target)
    parts = train_test_split(range(len(target)), test_size=360, stratify=target, random_state=0)
    return [(images[part, 0], target[part]) for part in parts]


def main() -> None:
    """Train, and show what was written."""
    command = CommandLine(__doc__, epochs=20, batch_size=32, lr=0.05)
    command.add_argument("--data", choices=("digits", "mnist"), default="digits", help="what to learn (%(default)s)")
    command.add_argument("--data-dir", type=Path, default="data", help="where mnist's files are (%(default)s)")
    command.add_argument("--layout", choices=("numbers", "s4tf"), default="numbers", help="of the CSV (%(default)s)")
    options = command.options()
    with command.refusing(OSError, RuntimeError, TypeError, ValueError):
        seed_everything(options.seed, verbose=False)
        parts = digits() if options.data == "digits" else from_torchvision("MNIST", options.data_dir)
        folder = unused_folder(options.output)
        trainer = Trainer(
            **trainer_options(options),
            callbacks=[
                StatisticsRecorder(["accuracy"]),
                CSVStatisticsLogger(folder / "log.csv", layout=options.layout),
                TQDMProgressBar(refresh_rate=10),
            ],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        make(folder)

    train, test = (TensorDataset(images[:, None].float() / 255, target) for images, target in parts)
    trainer.fit(
        LeNet(options.lr),
        DataLoader(train, options.batch_size, shuffle=True),
        DataLoader(test, options.batch_size),
    )
    if trainer.is_global_zero:
        lines = (folder / "log.csv").read_text().splitlines()
        print(f"\n{folder / 'log.csv'}, {len(lines)} lines:", *lines[:4], "...", *lines[-3:], sep="\n")
        accuracy = float(trainer.callback_metrics["val_accuracy"])
        print(f"\ntest accuracy {accuracy:.4f} on {len(test)} images that were not trained on")
        if options.layout == "numbers":  # the other one holds texts
            print(f"Open {plot_log(folder / 'log.csv', folder / 'curves.png')} for loss and accuracy.")


if __name__ == "__main__":
    main()
