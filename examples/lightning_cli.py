"""A LightningCLI program that knows nothing of this package: the YAML file beside it brings every technique.

    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml --model.lr 0.05 --trainer.max_epochs 5
    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml --print_config

The scans of handwritten digits come with scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

# What would be printed and says nothing about this run:
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # between jsonargparse and Lightning
warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")  # between torch and Lightning
warnings.filterwarnings("ignore", ".* does not have many workers")  # the images are in memory: nothing to wait for
warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # the configuration lies there
for library in ("lightning.pytorch", "pytorch_lightning"):  # tips for other products
    logging.getLogger(f"{library}.utilities.rank_zero").addFilter(lambda record: "Tip: " not in record.getMessage())


Split = tuple[Any, Any]  # images and their classes, as NumPy arrays


class Classifier(LightningModule):
    """Pixels in, one of ten classes out.

    Args:
        width: Units of each of the two hidden layers.
        lr: Peak of the learning rate; the schedule stands in the YAML file.
    """

    def __init__(self, width: int = 128, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers = [nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(images)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the loss, and what the callbacks read."""
        images, target = batch
        logits = self(images)
        return {"loss": functional.cross_entropy(logits, target), "logits": logits.detach(), "target": target}

    validation_step = training_step

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measure on images that nothing was chosen by."""
        found = self.training_step(batch, batch_idx)
        correct = (found["logits"].argmax(1) == found["target"]).float().mean()
        self.log("test_accuracy", correct, batch_size=len(found["target"]), sync_dist=True)
        return found

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer with its peak rate."""
        return torch.optim.SGD(self.parameters(), self.hparams["lr"], momentum=0.9, weight_decay=5e-4)


class Digits(LightningDataModule):
    """scikit-learn's 1,797 scans of 8 x 8 pixels: 1,167 to learn from, 270 to choose by, 360 to test.

    Args:
        batch_size: Images of a batch.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Split the scans, the same way every time."""
        scans = load_digits()
        rest, self.tested = _set_aside((scans.images / 16, scans.target), 360)
        self.learned, self.validated = _set_aside(rest, 270)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the images to learn from, in a new order each epoch."""
        return self._loader(self.learned, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the images to choose by."""
        return self._loader(self.validated)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the images that nothing is chosen by."""
        return self._loader(self.tested)

    def _loader(self, part: Split, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        images, target = part
        data = TensorDataset(torch.tensor(images, dtype=torch.float32), torch.tensor(target))
        return DataLoader(data, self.batch_size, shuffle=shuffle)


def _set_aside(part: Split, count: int) -> tuple[Split, Split]:
    """Take `count` images out, every class in proportion."""
    images, target = part
    kept, aside, kept_target, aside_target = train_test_split(
        images, target, test_size=count, stratify=target, random_state=0
    )
    return (kept, kept_target), (aside, aside_target)


class Program(LightningCLI):
    """LightningCLI that tests what `fit` has trained."""

    def after_fit(self) -> None:
        """Measure the weights that the fit ends with; LightningCLI calls this after `fit`."""
        self.trainer.test(self.model, datamodule=self.datamodule)


if __name__ == "__main__":
    torch.set_num_threads(1)  # in layers so small, threads wait for each other longer than they work
    Program(Classifier, Digits, seed_everything_default=0, save_config_kwargs={"overwrite": True})
