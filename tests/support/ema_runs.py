"""Small modules and runs for the tests of averages. Not a test file."""

from __future__ import annotations

from collections.abc import Iterable

import lightning.pytorch as unified
import pytest
import pytorch_lightning as classic
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins import WarmupDecay

THETA = [1.0, 2.0, 4.0, 3.0, 5.0, 8.0, 7.0, 9.0, 6.0, 10.0]  # the weights of the golden tables


def follow(theta: Iterable[float], decays: Iterable[float], start: float = 0.0) -> list[float]:
    """The average of ``theta`` in plain Python, after each step."""
    shadow, out = start, []
    for weight, decay in zip(theta, decays, strict=False):
        shadow = decay * shadow + (1 - decay) * weight
        out.append(shadow)
    return out


WARMUP = follow(THETA, [WarmupDecay(0.9)(n) for n in range(1, 11)])  # equals the golden table: test_ema_decay.py


class Script(torch.optim.Optimizer):
    """An optimizer that sets its one weight to the next number of a list: a run whose weights are known."""

    def __init__(self, params, values=THETA):
        super().__init__(params, {"lr": 1.0})
        self.values = list(values)

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                p.fill_(self.values[(state["step"] - 1) % len(self.values)])


def numbers(n=10, batch_size=1):
    """A loader of n batches."""
    return DataLoader(TensorDataset(torch.ones(n * batch_size, 1)), batch_size=batch_size)


class _Scripted:
    """One weight, 0 at first, that takes the values of THETA; validation records what it sees."""

    def __init__(self, values=THETA):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.values = values
        self.seen = []

    def training_step(self, batch, batch_idx):
        return self.weight * batch[0].sum()

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.weight.item())
        self.log("val", self.weight.detach().float())

    def test_step(self, batch, batch_idx):
        self.seen.append(self.weight.item())

    def predict_step(self, batch, batch_idx):
        self.seen.append(self.weight.item())
        return self.weight.detach().clone()

    def configure_optimizers(self):
        return Script(self.parameters(), self.values)


class _Net:
    """A small network with batch statistics, trained by momentum SGD on fixed data."""

    def __init__(self, width=8, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 1))
        self.crash = None

    def forward(self, x):
        return self.net(x)

    def _loss(self, batch):
        dtype = next(self.parameters()).dtype
        return nn.functional.mse_loss(self(batch[0].to(dtype)), batch[1].to(dtype))

    def training_step(self, batch, batch_idx):
        if self.crash == ("train", self.current_epoch, batch_idx):
            raise RuntimeError("killed")
        return self._loss(batch)

    def validation_step(self, batch, batch_idx):
        if self.crash == ("val", self.current_epoch, batch_idx):
            raise RuntimeError("killed")
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self._loss(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


class Scripted(_Scripted, unified.LightningModule):
    """In the one namespace,"""


class ClassicScripted(_Scripted, classic.LightningModule):
    """and in the other."""


NAMESPACES = pytest.mark.parametrize(
    ("trainer_class", "module_class"),
    [(unified.Trainer, Scripted), (classic.Trainer, ClassicScripted)],
    ids=["lightning.pytorch", "pytorch_lightning"],
)


class Net(_Net, unified.LightningModule):
    """In the one namespace,"""


class ClassicNet(_Net, classic.LightningModule):
    """and in the other."""


def regression(n=32, batch_size=4, seed=0):
    """A loader of a small regression problem, in a fixed order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size)


def trainer(*callbacks, trainer_class=unified.Trainer, **kwargs):
    """A quiet CPU Trainer."""
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(hasattr(callback, "best_k_models") for callback in callbacks),
        "callbacks": list(callbacks),
        "num_sanity_val_steps": 0,
    }
    return trainer_class(**{**settings, **kwargs})


def clone_state(module):
    """A copy of the module's state dict."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def same(a, b):
    """Whether two dicts of tensors are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
