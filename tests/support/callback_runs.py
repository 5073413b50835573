"""Runs of a small classifier with any callbacks, and what comes out of them."""

import contextlib
import os
from pathlib import Path

import lightning.pytorch as unified
import torch

from tests.support.training import make_trainer


class Samples(torch.utils.data.Dataset):
    """``length`` samples of four numbers and a label of 0 or 1."""

    def __init__(self, length=6):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        return torch.full((4,), float(index)), index % 2


def loader(length=6):
    return torch.utils.data.DataLoader(Samples(length), batch_size=2)


def make_classifier(namespace=unified, *, scheduled=False):
    """A module that knows nothing of this package; ``scheduled``: with a scheduler of torch's own."""

    class User(namespace.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
            self.register_buffer("mine", torch.zeros(1))

        def forward(self, x):
            return self.layer(x)

        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            loss = torch.nn.functional.cross_entropy(logits, batch[1])
            self.log("val_loss" if self.trainer.validating or self.trainer.sanity_checking else "loss", loss.detach())
            return {"loss": loss, "logits": logits, "target": batch[1]}

        validation_step = test_step = training_step

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

        def configure_optimizers(self):
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            if not scheduled:
                return self.optimizer
            scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
            return [self.optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return User()


@contextlib.contextmanager
def working_in(folder):
    before = Path.cwd()
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Killed(Exception):
    """The end of a run that a test has asked for."""


def fit(folder, callbacks, *, namespace=unified, epochs=4, die_in_epoch=None, **options):
    """Fit in a folder, whose relative paths the callbacks write to; return what came out.

    Args:
        folder: Made if it is not there. Checkpoints of every epoch are in its ``checkpoints``.
        callbacks: In the order of the Trainer's list, behind none.
        namespace: Which name of Lightning.
        epochs: So many.
        die_in_epoch: Raise at the beginning of that epoch, and return ``None``.
        **options: Of ``fit``.
    """

    class Die(namespace.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == die_in_epoch:
                raise Killed

    with working_in(folder):
        torch.manual_seed(0)
        module = make_classifier(namespace)
        saving = namespace.callbacks.ModelCheckpoint(Path("checkpoints"), "{epoch}", save_top_k=-1)
        trainer = make_trainer(
            folder, namespace, callbacks=[*callbacks, saving, Die()], max_epochs=epochs, enable_checkpointing=True
        )
        try:
            trainer.fit(module, loader(12), loader(4), **options)
        except Killed:
            return None
    return {
        "weights": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "steps": trainer.global_step,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        **{type(callback).__name__: _comparable(callback.state_dict(), folder) for callback in callbacks},
    }


_BY_CHANCE = {"directory", "files", "fits", "seconds", "stamp"}


def _comparable(value, folder):
    """Return a state without what the clock and the folder decide, also by the digests of files."""
    if isinstance(value, dict):
        kept = [item for item in value.items() if item[0] not in _BY_CHANCE and not _is_run_id(*item)]
        return {_comparable(name, folder): _comparable(part, folder) for name, part in kept}
    if isinstance(value, (list, tuple)):
        return [_comparable(part, folder) for part in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value


def _is_run_id(name, value):
    return name == "run" and isinstance(value, str)


def same(left, right):
    """Whether two outcomes, or parts of them, are equal to the last bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right
