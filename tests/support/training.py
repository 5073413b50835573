"""Tiny modules and Trainers whose optimizers tell the rate that each step really used."""

import lightning.pytorch as unified
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset


class RecordingSGD(torch.optim.SGD):
    """SGD that notes the rates inside every call of ``step``."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.used = []

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.used.append([float(group["lr"]) for group in self.param_groups])
        super().step()
        return loss


class Numbers(Dataset):
    """``length`` samples of four numbers."""

    def __init__(self, length):
        self.data = torch.randn(length, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


class Stream(IterableDataset):
    """The same without a length."""

    def __init__(self, length):
        self.data = Numbers(length)

    def __iter__(self):
        return (self.data[index] for index in range(len(self.data)))


def loader(length, batch_size=1, stream=False):
    return DataLoader((Stream if stream else Numbers)(length), batch_size=batch_size)


def make_module(namespace=unified, **options):
    """Return a module of ``namespace`` with one recording optimizer of rate 0.1; ``options`` are its attributes."""

    class Tiny(namespace.LightningModule):
        lr = 0.1
        momentum = 0.0
        scheduler = None  # a function of the optimizer
        skip_batches = ()  # batches for which training_step returns None

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            return None if batch_idx in self.skip_batches else self.layer(batch).pow(2).mean()

        def configure_optimizers(self):
            self.optimizer = RecordingSGD(self.layer.parameters(), lr=self.lr, momentum=self.momentum)
            if self.scheduler is None:
                return self.optimizer
            return [self.optimizer], [self.scheduler(self.optimizer)]

    module = Tiny()
    for name, value in options.items():
        setattr(module, name, value)
    return module


def make_trainer(path, namespace=unified, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": path,
        "max_epochs": 1,
    }
    return namespace.Trainer(**{**defaults, **options})


def rates(module, group=0):
    """Return the rate that each optimizer step used, of one group."""
    return [used[group] for used in module.optimizer.used]
