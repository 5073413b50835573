"""What the callbacks must arrive at, written in plain torch in the simplest way; nothing here knows the package."""

import math
from dataclasses import dataclass, field

import lightning.pytorch as unified
import numpy as np
import pytorch_lightning as classic
import torch


def warmup_cosine(step, *, warmup, total):
    """From 0 up to 1 in ``warmup`` steps, then half a cosine down to 0 at ``total``."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def power_gamma(sigma_rel):
    """The exponent of the power average of that relative width, by the authors' published formula."""
    return np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real.max()


def ema_decay(n, decay):
    return min(decay, (1 + n) / (10 + n))


def power_decay(n, sigma_rel):
    return (1 - 1 / n) ** (power_gamma(sigma_rel) + 1)


@dataclass
class Averages:
    """Running averages of a network's parameters, each by its rule ``decay(n)``, in double precision."""

    net: torch.nn.Module
    rules: dict
    n: int = 0
    kept: dict = field(default_factory=dict)

    def __post_init__(self):
        self.kept = {name: self._weights() for name in self.rules}

    def _weights(self):
        return {name: parameter.detach().double().clone() for name, parameter in self.net.named_parameters()}

    def update(self):
        self.n += 1
        for name, decay in self.rules.items():
            share = decay(self.n)
            for key, weight in self._weights().items():
                self.kept[name][key] = share * self.kept[name][key] + (1 - share) * weight


def train(net, windows, loss_of, optimizer, lrs, averages):
    """One optimizer step for each window, whose loss is computed in one pass."""
    net.train()
    for window, lr in zip(windows, lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss_of(net, window).backward()
        optimizer.step()
        averages.update()


class Watch(unified.Callback, classic.Callback):
    """Notes what a run was given and did: initial weights, batches, undivided losses, and the rate inside each step."""

    def __init__(self):
        self.initial, self.batches, self.losses, self.rates = None, [], [], []
        self.validations, self.validation_batches = [], []

    def on_fit_start(self, trainer, pl_module):
        if self.initial is None:
            self.initial = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}

    def on_train_start(self, trainer, pl_module):
        self._handle = trainer.optimizers[0].register_step_pre_hook(self._note)

    def _note(self, optimizer, args, kwargs):
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if outputs:  # of a batch that took place
            self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.validation_batches.append(batch)
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if isinstance(loss, torch.Tensor):  # some clients only log
                self.validations.append(float(loss))

    def on_train_end(self, trainer, pl_module):
        self._handle.remove()
        del self._handle


def distance(weights, truth, initial):
    """How far ``weights`` are from ``truth``, as a share of how far training went; over all names of ``truth``."""
    apart = sum(float((weights[name].double() - tensor.double()).square().sum()) for name, tensor in truth.items())
    went = sum(float((initial[name].double() - tensor.double()).square().sum()) for name, tensor in truth.items())
    return math.sqrt(apart / went)
