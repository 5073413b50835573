"""What the programs share and what is no part of a training: their command line, their folders, a quiet console."""

from __future__ import annotations

import argparse
import importlib
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

# What would be printed and says nothing about a run:
warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")  # between torch and Lightning
warnings.filterwarnings("ignore", ".* does not have many workers")  # the data are in memory: nothing to wait for
for namespace in ("lightning.pytorch", "pytorch_lightning"):
    logger = logging.getLogger(f"{namespace}.utilities.rank_zero")
    logger.addFilter(lambda record: "Tip: " not in record.getMessage())  # for other products


class CommandLine(argparse.ArgumentParser):
    """A parser that knows the options of every program, and whose errors are one line.

    Args:
        description: The program's own documentation.
        epochs: Times through the training data.
        batch_size: Examples of a batch.
        lr: Learning rate.
    """

    def __init__(self, description: str | None, *, epochs: int, batch_size: int, lr: float) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        add = self.add_argument
        add("--epochs", type=int, default=epochs, help="times through the training data (%(default)s)")
        add("--batch-size", type=int, default=batch_size, help="examples of a batch (%(default)s)")
        add("--lr", type=float, default=lr, help="learning rate; with a schedule its base (%(default)s)")
        add("--precision", default="32-true", help="as in Lightning: bf16-mixed, 16-mixed, ... (%(default)s)")
        add("--accelerator", default="auto", help="as in Lightning: cpu, gpu, ... (%(default)s)")
        add("--devices", default="1", help="as in Lightning: how many, or auto (%(default)s)")
        add("--seed", type=int, default=0, help="of the first weights and of all that is drawn (%(default)s)")
        add("--output", type=Path, default="runs", help="where the run's folder is made (%(default)s)")
        add("--limit-batches", type=int, help="batches of an epoch, for a quick trial (all)")

    def options(self) -> argparse.Namespace:
        """Read the command line; every number but the seed is above 0."""
        options = self.parse_args()
        if not 0 <= options.seed < 2**32:  # Lightning before 2.6 would draw one instead
            self.error(f"--seed must be a whole number from 0 to {2**32 - 1}, got {options.seed}")
        for name, value in vars(options).items():
            if name != "seed" and type(value) in (int, float) and not 0 < value < float("inf"):
                self.error(f"--{name.replace('_', '-')} must be a finite number above 0, got {value}")
        return options

    @contextmanager
    def refusing(self, *kinds: type[Exception]) -> Iterator[None]:
        """Turn an error of these kinds, or one of Lightning's about its arguments, into one line and status 2."""
        refused: tuple[type[Exception], ...] = (MisconfigurationException, *kinds)
        try:
            yield
        except refused as error:
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def trainer_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line says to the Trainer."""
    return {
        "precision": options.precision,
        "accelerator": options.accelerator,
        "devices": options.devices,
        "max_epochs": options.epochs,
        "limit_train_batches": options.limit_batches,
        "limit_val_batches": options.limit_batches,
        "limit_test_batches": options.limit_batches,
    }


def unused_folder(parent: Path) -> Path:
    """Return a folder for this run, named by the time."""
    while (folder := parent / time.strftime("%Y-%m-%dT%H-%M-%S")).exists():
        time.sleep(0.1)  # another run began in this second
    return folder


def make(folder: Path) -> None:
    """Make the run's folder, in one process of several."""
    rank_zero_only(folder.mkdir)(parents=True)


def from_torchvision(name: str, folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Return the images and classes of a training and a test set, where torchvision and the data are there already."""
    try:
        kind = getattr(importlib.import_module("torchvision.datasets"), name)  # optional: only who asks for it needs it
        sources = [kind(folder, train=train, download=False) for train in (True, False)]
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(f"--data {name.lower()} needs torchvision, with its data in {folder}: {error}") from error
    return [(torch.as_tensor(source.data), torch.as_tensor(source.targets)) for source in sources]
