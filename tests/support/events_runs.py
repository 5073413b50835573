"""Runs whose events are written down, and the order in which Swift for TensorFlow's loop has them."""

import lightning.pytorch as unified
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins import EventCallback
from lightning_plugins.events import TrainingLoop
from tests.support.training import make_trainer

# What swift-models' own test of its loop expects, for 3 training and 2 validation batches.
TRAINING_BATCH = ["batchStart", "updateStart", "batchEnd"]
VALIDATION_BATCH = ["batchStart", "inferencePredictionEnd", "batchEnd"]
CANCELLED_BATCH = ["batchStart", "batchEnd"]
VALIDATION = ["validationStart", *VALIDATION_BATCH * 2, "validationEnd"]
TRAINING = ["trainingStart", *TRAINING_BATCH * 3, "trainingEnd"]
EPOCH = ["epochStart", *TRAINING, *VALIDATION, "epochEnd"]


class Regression:
    """The parts of a module that both namespaces share: two outputs from four numbers, momentum, a prediction."""

    automatic_optimization = True

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        loss = self.training_step(batch, batch_idx)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def make_regression(namespace=unified, **options):
    class Module(Regression, namespace.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)
            torch.nn.init.constant_(self.layer.weight, 0.5)
            torch.nn.init.zeros_(self.layer.bias)

        def forward(self, x):
            return self.layer(x)

    module = Module()
    for name, value in options.items():
        setattr(module, name, value)
    return module


def batches(count, size=2, seed=1):
    """Return a loader of ``count`` batches."""
    generator = torch.Generator().manual_seed(seed)
    data = TensorDataset(
        torch.randn(count * size, 4, generator=generator), torch.randn(count * size, 2, generator=generator)
    )
    return DataLoader(data, batch_size=size)


class Diary:
    """A function of (loop, event) that writes every event down, after calling ``act`` if there is one."""

    def __init__(self, act=None):
        self.events = []
        self.act = act

    def __call__(self, loop: TrainingLoop, event):
        self.events.append(event.value)
        if self.act is not None:
            self.act(loop, event)


def fit(path, act=None, *, namespace=unified, module=None, callbacks=(), epochs=2, training=3, validation=2, **options):
    """Run; return the events, the module and the Trainer."""
    diary = Diary(act)
    module = make_regression(namespace) if module is None else module
    trainer = make_trainer(
        path,
        namespace,
        callbacks=[EventCallback(diary), *callbacks],
        max_epochs=epochs,
        num_sanity_val_steps=1,
        **options,
    )
    trainer.fit(module, batches(training), batches(validation, seed=2))
    return diary.events, module, trainer


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
