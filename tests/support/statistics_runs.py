"""Small runs whose statistics can be recomputed by hand."""

import csv
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytorch_lightning as classic
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins import StatisticsRecorder

CLASSES = 8
METRICS = ["accuracy", "top5_accuracy", "perplexity"]


class _Classifier:
    """One layer; remembers what every step saw, for a recomputation that shares no code with the package."""

    def __init__(self, returns="loss", lr=0.1, classes=CLASSES):
        super().__init__()
        self.layer = torch.nn.Linear(6, classes)
        self.returns = returns
        self.lr = lr
        self.seen = []  # (phase, loss, logits, targets)

    def forward(self, x):
        return self.layer(x)

    def _step(self, phase, batch):
        logits = self(batch[0])
        loss = torch.nn.functional.cross_entropy(logits, batch[1])
        if not self.trainer.sanity_checking:
            self.seen.append((phase, loss.item(), logits.detach().cpu().numpy(), batch[1].cpu().numpy()))
        if self.returns == "dict":
            return {"loss": loss, "logits": logits, "target": batch[1]}
        return loss

    def training_step(self, batch, batch_idx):
        return self._step("train", batch)

    def validation_step(self, batch, batch_idx):
        return self._step("validation", batch)

    def test_step(self, batch, batch_idx):
        return self._step("test", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Classifier(_Classifier, pl.LightningModule):
    """In the one namespace,"""


class ClassicClassifier(_Classifier, classic.LightningModule):
    """and in the other."""


CLASSIFIERS = {pl: Classifier, classic: ClassicClassifier}


class WithHyperparameters(Classifier):
    def __init__(self, lr=0.1, name="small", wide=False, layers=(1, 2)):
        super().__init__(lr=lr)
        self.save_hyperparameters()


def dataset(count=40, classes=CLASSES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(count, 6, generator=generator), torch.randint(classes, (count,), generator=generator)
    )


def loaders(count=40, batch_size=16, **options):
    return (
        DataLoader(dataset(count, seed=1), batch_size=batch_size, **options),
        DataLoader(dataset(count // 2, seed=2), batch_size=batch_size),
    )


class ResumableLoader:
    """A loader that goes on where a checkpoint in mid-epoch left it, as Lightning asks of one."""

    def __init__(self, loader):
        self.batches = list(loader)
        self.position = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        start, self.position = self.position % len(self.batches), 0
        for index in range(start, len(self.batches)):
            self.position = index + 1  # Lightning asks no further when it knows the length
            yield self.batches[index]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state_dict):
        self.position = state_dict["position"]


def resumable(count=40, batch_size=16):
    train, validation = loaders(count, batch_size)
    return ResumableLoader(train), validation


def trainer_of(package, callbacks, **options):
    settings = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return package.Trainer(callbacks=callbacks, **(settings | options))


def fit(callbacks, model=None, package=pl, ckpt_path=None, data=None, **options):
    """Train, and return trainer and model."""
    torch.manual_seed(0)
    model = Classifier() if model is None else model() if isinstance(model, type) else model
    train, validation = data or loaders()
    if validation is None:
        options = {"limit_val_batches": 0, **options}
    trainer = trainer_of(package, callbacks, **options)
    trainer.fit(model, train, validation, ckpt_path=ckpt_path)
    return trainer, model


def read(path):
    """Return a CSV file's rows by the csv module, as dicts."""
    with Path(path).open(newline="") as handle:
        return list(csv.DictReader(handle, skipinitialspace=True))


def without_time(path):
    """Return a CSV file's text without its column of seconds."""
    rows = read(path)
    return [tuple(rows[0]), *[tuple(v for k, v in row.items() if k != "time") for row in rows]]


class Recording:
    """A reader of a recorder's rows."""

    def __init__(self, flush_seconds=0.0):
        self.rows = []
        self.ends = []
        self.writes = 0
        self.flush_seconds = flush_seconds

    def write(self, rows):
        self.rows += rows
        self.writes += 1

    def phase_end(self, row):
        self.ends.append(row)


def recorded(metrics=METRICS, model=None, callbacks=(), **options):
    """Fit with a recorder; return the Trainer, the module and what reads the rows."""
    recorder = StatisticsRecorder(metrics)
    reader = Recording()
    recorder.subscribe(reader)
    trainer, model = fit([recorder, *callbacks], model, **options)
    return trainer, model, reader


def expected_rows(seen):
    """Return (phase, batch, values) for every batch, by NumPy, from what the module saw."""
    expected = []
    begun, running = None, []
    for index, (phase, loss, logits, targets) in enumerate(seen):
        if phase != begun or (index and _new_epoch(seen, index)):
            begun, running = phase, []
        running.append((loss, logits, targets))
        losses = np.array([part[0] for part in running], dtype=np.float64)
        scores = np.concatenate([part[1] for part in running])
        labels = np.concatenate([part[2] for part in running])
        own = scores[np.arange(len(labels)), labels]
        values = {
            "loss": losses.mean(),
            "accuracy": (scores.argmax(1) == labels).mean(),
            "top5_accuracy": ((scores > own[:, None]).sum(1) < 5).mean(),
            "perplexity": np.exp(losses.mean()),
        }
        expected.append((phase, len(running), values))
    return expected


def _new_epoch(seen, index):
    return seen[index][0] == "train" and seen[index - 1][0] != "train"
