"""Fits under DeepSpeed on CPU processes: what tests/deepspeed runs on every rank. Importing it needs DeepSpeed."""

import importlib
import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["RANK"] = os.environ.get("LOCAL_RANK", "0")

import lightning.pytorch as lightning
import pytest
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.zero import gathered, zero_of

# the name in the package is torch's own module; without this, C++ is compiled for minutes
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
# torch has half precision on a CPU by now
importlib.import_module("deepspeed.accelerator").get_accelerator().is_fp16_supported = lambda: True

STAGES = (1, 2, 3)
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ["RANK"])


class CPUDeepSpeed(DeepSpeedStrategy):
    """Lightning's strategy without its demand for a GPU."""

    @property
    def root_device(self):
        """Return a device with an index, which DeepSpeed wants."""
        return torch.device("cpu", 0)

    def setup_environment(self):
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Net(lightning.LightningModule):
    """Two layers with odd sizes, a tied pair, a frozen weight and a buffer."""

    def __init__(self, lr=0.1):
        super().__init__()
        self.lr = lr
        torch.manual_seed(0)
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 5, bias=False)
        self.third = nn.Linear(5, 5, bias=False)
        self.third.weight = self.second.weight
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.last = nn.Linear(3, 1)
        self.register_buffer("shift", torch.tensor([0.25]))
        self.seen = None

    def forward(self, x):
        hidden = torch.tanh(self.first(x.to(self.shift.dtype)))
        return self.last(self.frozen(self.third(torch.tanh(self.second(hidden))))) + self.shift

    def loss(self, batch):
        return nn.functional.mse_loss(self(batch[0]), batch[1].to(self.shift.dtype))

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.seen = self(batch[0]).detach().float()
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        decayed, rest = [self.first.weight, self.second.weight], [self.first.bias, *self.last.parameters()]
        return torch.optim.SGD([{"params": decayed}, {"params": rest}], lr=self.lr, momentum=0.9)


def samples(number=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 4, generator=generator)
    return x, x.sum(1, keepdim=True).tanh()


class Batches:
    """A loader of batches of given sizes."""

    def __init__(self, sizes, seed=1):
        x, y = samples(sum(sizes), seed)
        self.batches = list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def even_loader(batch_size=4, number=24, seed=1):
    return DataLoader(TensorDataset(*samples(number, seed)), batch_size=batch_size)


def trainer(stage, *callbacks, precision="32-true", **settings):
    options = {
        "accelerator": "cpu",
        "devices": RANKS,
        "strategy": CPUDeepSpeed(stage=stage, process_group_backend="gloo", **settings.pop("strategy", {})),
        "precision": precision,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(hasattr(callback, "best_k_models") for callback in callbacks),
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "callbacks": list(callbacks),
    }
    return lightning.Trainer(**{**options, **settings})


def masters(fit):
    """Return the master weights in full; a collective."""
    zero = zero_of(fit)
    return {part.found.names[0]: gathered(part) for part in zero.masters(fit.lightning_module)}


class AtTheEnd(Callback):
    """Keeps the master weights of the end of the training."""

    def __init__(self):
        self.masters = None

    def on_train_end(self, trainer, pl_module):
        self.masters = {name: value.clone() for name, value in masters(trainer).items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def plain(tensors):
    return {name: value.double().tolist() for name, value in tensors.items()}


# -- accumulation

SIZES = ((3, 5, 2, 4, 1), (4, 1, 6, 2, 3))
"""Of each rank's batches: unequal, and no multiple of the window."""


def accumulation():
    """Fit with every way of accumulating, at every stage; return the trained weights and the Trainer's steps."""
    from lightning_plugins import GradientAccumulation

    unequal = Batches(SIZES[RANK], seed=RANK)
    cases = {
        "batches": (GradientAccumulation(batches=2), unequal, {"max_epochs": 2}),
        "clipped": (GradientAccumulation(batches=2), unequal, {"gradient_clip_val": 0.05}),
        "schedule": (GradientAccumulation(schedule={0: 1, 2: 3}), unequal, {"max_epochs": 2}),
        "effective": (GradientAccumulation(effective_batch_size=16), even_loader(number=20, seed=RANK), {}),
    }
    found = {}
    for stage in STAGES:
        for name, (callback, data, settings) in cases.items():
            end = AtTheEnd()
            fit = trainer(stage, callback, end, **settings)
            module = Net()
            fit.fit(module, data)
            engine = fit.strategy.deepspeed_engine
            steps = [fit.global_step, engine.global_steps]
            found[f"{stage} {name}"] = {"weights": plain(end.masters), "steps": steps}
    found["refused carry"] = refused(2, GradientAccumulation(batches=2, carry=True))
    found["refused stage 0"] = refused(0, GradientAccumulation(batches=2))
    return found


def refused(stage, *callbacks, **settings):
    """Return what the user of a run is told that is refused at setup."""
    with pytest.raises(MisconfigurationException) as told:
        trainer(stage, *callbacks, **settings).fit(Net(), even_loader())
    return str(told.value)
