"""The batch size that the training data show, counted against batches that really come."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_plugins.core.loaders import loader_batch_size, samples_per_step


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        tensors = torch.utils._pytree.tree_leaves(batch)
        self.seen.append(sum(len(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor)))
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(size, samples=24):
    return DataLoader(torch.zeros(samples, 2), batch_size=size)


def in_eights():
    return BatchSampler(SequentialSampler(range(24)), 8, drop_last=False)


def fitted(loaders, **options):
    module = Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, enable_model_summary=False, **quiet, **options)
    trainer.fit(module, loaders)
    return trainer, module


@pytest.mark.parametrize(
    ("loaders", "size"),
    [
        (lambda: loader(6), 6),
        (lambda: [loader(6), loader(4)], 10),
        (lambda: {"a": loader(6), "b": {"c": loader(4), "d": loader(2)}}, 12),
        (
            lambda: DataLoader(range(24), batch_sampler=in_eights()),
            8,
        ),
        (lambda: CombinedLoader([loader(6), loader(4)], "max_size_cycle"), 10),
        (lambda: DataLoader([torch.ones(1, 1)] * 3, batch_size=None), None),
        (lambda: [loader(6), DataLoader([torch.ones(1, 1)] * 3, batch_size=None)], None),
    ],
)
def test_a_full_batch_has_as_many_samples_as_the_loaders_say(loaders, size):
    trainer, module = fitted(loaders())
    assert loader_batch_size(trainer) == size
    if size is not None:
        assert max(module.seen) == size


def test_a_step_has_the_samples_of_its_window():
    trainer, _ = fitted(loader(6), accumulate_grad_batches=2)
    assert samples_per_step(trainer) == 12
