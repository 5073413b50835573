"""A module and callbacks for runs in which something is exchanged. Not a test file."""

from __future__ import annotations

import lightning.pytorch as unified
import torch
from torch import nn


class Wide(unified.LightningModule):
    """A backbone and a head, trained by SGD in small steps."""

    def __init__(self, lr=0.01):
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class At(unified.Callback):
    """Calls a function of Trainer and module once, at the start of a batch, or of an epoch."""

    def __init__(self, step, act, *, batch=False):
        self.step, self.act, self.batch, self.done = step, act, batch, False

    def _meet(self, trainer, pl_module):
        if trainer.global_step == self.step and not self.done:
            self.done = True
            self.act(trainer, pl_module)

    def on_train_epoch_start(self, trainer, pl_module):
        if not self.batch:
            self._meet(trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, *args):
        if self.batch:
            self._meet(trainer, pl_module)


class Weights(unified.Callback):
    """Notes a copy of every parameter after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def averaged(start, seen, name, decay=0.9):
    """The average of a tensor by the formula, in float64."""
    shadow = start.double()
    for weights in seen:
        shadow = decay * shadow + (1 - decay) * weights[name].double()
    return shadow.float()


def new_head(trainer, module):
    """As a user would: another layer, and its parameters in the optimizer."""
    old = {id(parameter) for parameter in module.head.parameters()}
    module.head = nn.Linear(4, 1)
    nn.init.constant_(module.head.weight, 3.0)
    group = trainer.optimizers[0].param_groups[0]
    kept = [parameter for parameter in group["params"] if id(parameter) not in old]
    group["params"] = kept + list(module.head.parameters())
