"""A small regression whose module logs as most do, and its batches."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.clients import comparison

LR, EPOCHS, NUMBER, BATCH = 0.1, 2, 27, 4  # 7 batches, in windows of 3, 3 and 1, whose only batch has 3 samples
STEPS = 3  # of an epoch


class Network(pl.LightningModule):
    def __init__(self, lr=LR, width=8):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

    def forward(self, x):
        return self.net(x).squeeze(1)

    def training_step(self, batch, batch_idx):
        loss = loss_of(self, batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", loss_of(self, batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


def loss_of(module, batch):
    return torch.nn.functional.mse_loss(module(batch[0]), batch[1])


def join(batches):
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def loader(seed=0, batch_size=BATCH):
    x = torch.randn(NUMBER, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.sum(1)), batch_size=batch_size)


def validation():
    return loader(seed=1)


def loss_on_validation(state, make=Network):
    """The mean over the samples, as Lightning logs it."""
    net = make().eval()
    net.load_state_dict(state)
    with torch.no_grad():
        return float(loss_of(net, join(list(validation()))))


assert_the_same_steps = partial(comparison.assert_the_same_steps, loss_of=loss_of, join=join, lr=LR, epochs=EPOCHS)


def assert_a_tracker_has(stack, recorded, losses):
    """The rate of each step, and validation losses of which the last is the average's and not the trained weights'.

    Args:
        stack: The callbacks of the run.
        recorded: Step -> the rate that the tracker has for it.
        losses: The validation losses that it has.
    """
    assert [recorded[step] for step in sorted(recorded)] == pytest.approx(
        comparison.rates(LR, EPOCHS * STEPS), abs=1e-12
    )
    assert len(losses) == EPOCHS
    assert losses[-1] == pytest.approx(loss_on_validation(stack.ema.average_state_dict()), rel=1e-5)
    assert losses[-1] != pytest.approx(loss_on_validation(stack.ema.raw_state_dict()), rel=1e-3)
