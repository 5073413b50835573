"""Runs whose every gradient is compared with that of the whole window, computed in one pass in plain torch."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_plugins import GradientAccumulation, Tokens
from lightning_plugins.core.lightning import CallbackOfBoth

FEATURES, CLASSES = 6, 5


def network(dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).to(dtype)


def make_batch(samples: int, length: int, seed: int, dtype: torch.dtype, *, masked: float = 0.0) -> dict[str, Any]:
    """A padded batch: ``masked`` is the share of labels that the loss ignores, 1 masks all of them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, length, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(CLASSES, (samples, length), generator=generator)
    keep = torch.rand(samples, length, generator=generator) >= masked
    return {"inputs": inputs, "labels": labels.where(keep, torch.tensor(-100))}


def batches(sizes, *, dtype, tokens, rank=0) -> list[dict[str, Any]]:
    """Batches of the given sizes; with ``tokens`` padded to several lengths, the third one masked throughout."""
    return [
        make_batch(
            size,
            length=(3 + index) if tokens else 4,
            seed=100 * rank + index,
            dtype=dtype,
            masked=(1.0 if index == 2 else 0.15 + 0.2 * (index % 3)) if tokens else 0.0,
        )
        for index, size in enumerate(sizes)
    ]


class Listed(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Dictionaries(torch.utils.data.Dataset):
    """Samples for a loader that makes batches of its own size."""

    def __init__(self, samples):
        self.batch = make_batch(samples, 4, 0, torch.float32)

    def __len__(self):
        return len(self.batch["labels"])

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.batch.items()}


def loader(items) -> DataLoader:
    """A loader that yields the given batches as they are, on every rank its own."""
    return DataLoader(Listed(items), batch_size=None, shuffle=False)


def module_class(package=pl):
    class Probe(package.LightningModule):
        def __init__(self, dtype=torch.float32, lr=0.5, backward=None):
            super().__init__()
            torch.manual_seed(0)
            self.net = network(dtype)
            self.lr = lr

        def training_step(self, batch, batch_idx):
            logits = self.net(batch["inputs"])
            return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    return Probe


Probe = module_class()


def shard_by_fsdp2(module):
    """Split the network of a module over the ranks."""
    mesh = module.device_mesh["data_parallel"]
    for layer in module.net:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(module.net, mesh=mesh)


class Recorder(CallbackOfBoth):
    """Keeps the parameters and the gradient of every step, as the hook and as the optimizer sees them."""

    def __init__(self):
        self.steps: list[dict[str, Any]] = []

    def on_train_start(self, trainer, pl_module):
        self._module = pl_module
        self._handle = trainer.optimizers[0].register_step_post_hook(self._at_optimizer)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({"weights": _whole(pl_module, "data"), "gradient": _whole(pl_module, "grad")})

    def _at_optimizer(self, optimizer, args, kwargs):
        self.steps[-1]["applied"] = _whole(self._module, "grad")

    def on_train_end(self, trainer, pl_module):
        self._handle.remove()


class SaveAfterFirstEpoch(pl.Callback):
    """Writes a checkpoint at the end of the first epoch, where Lightning's own checkpoints are written."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def _whole(pl_module, what):
    tensors = {}
    for name, parameter in pl_module.net.named_parameters():
        tensor = getattr(parameter, what)
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        tensors[name] = tensor.detach().clone()
    return tensors


class ScalerOnly(MixedPrecision):
    """A gradient scaler without the rounding of float16, so that the scaling alone is looked at."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    def autocast_context_manager(self):
        return contextlib.nullcontext()


def full_gradient(weights, window) -> dict[str, torch.Tensor]:
    """The gradient of the mean over all labels of all batches of the window, in one pass, in plain torch."""
    dtype = next(iter(weights.values())).dtype
    net = network(dtype)
    net.load_state_dict(weights)
    inputs = torch.cat([batch["inputs"].flatten(0, 1) for batch in window])
    labels = torch.cat([batch["labels"].flatten() for batch in window])
    known = labels != -100
    torch.nn.functional.cross_entropy(net(inputs[known]), labels[known]).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def flat(gradient) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in gradient.values()]).double()


def relative_error(gradient, truth) -> float:
    """The norm of the difference by that of the truth; the difference alone where the truth is zero."""
    size = float(flat(truth).norm())
    return float((flat(gradient) - flat(truth)).norm()) / (size or 1.0)


@dataclass
class Case:
    """One run: batch sizes per rank, the accumulation, and which batches its steps are expected to be made of."""

    windows: list[list[int]]  # the batches of each step, numbered through the epochs
    sizes: tuple[tuple[int, ...], ...] = ((4, 7, 2, 5, 3), (6, 1, 8, 2, 9))
    arguments: dict[str, Any] = field(default_factory=dict)
    tokens: bool = False
    dtype: torch.dtype = torch.float32
    precision: str | None = None
    clip: float | None = None
    epochs: int = 1
    strategy: str = "ddp"

    def data(self, rank: int):
        return batches(self.sizes[rank], dtype=self.dtype, tokens=self.tokens, rank=rank)

    def accumulation(self) -> GradientAccumulation:
        return GradientAccumulation(count=Tokens("labels") if self.tokens else "samples", **self.arguments)


def fit(module, callbacks, data, *, package=pl, epochs=1, fit_arguments=None, **arguments):
    """Train on the CPU without loggers, files or bars."""
    settings = {"max_epochs": epochs, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "devices": 1}
    trainer = package.Trainer(callbacks=callbacks, **{**settings, **quiet, **arguments})
    trainer.fit(module, data if isinstance(data, DataLoader) else loader(data), **(fit_arguments or {}))
    return trainer


class KeepTrainer(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        self.trainer = trainer


def failed(error, callback, data, *, batch):
    """Train until ``error`` comes in a batch; return the Trainer as it is left."""

    class Fails(Probe):
        def training_step(self, found, batch_idx):
            if batch_idx == batch:
                raise error
            return super().training_step(found, batch_idx)

    keep = KeepTrainer()
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit(Fails(), [callback, keep], data)
    return keep.trainer


def precision_arguments(precision):
    if precision == "scaler":
        return {"plugins": [ScalerOnly()]}
    if precision == "fp16":  # by name Lightning refuses it on a CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    return {"precision": precision} if precision else {}


def run_case(case: Case, *, rank: int = 0, ranks: int = 1, accumulation=None, module=None, strategy=None):
    """Run it on this rank and return the recorder and the trainer."""
    recorder = Recorder()
    arguments = precision_arguments(case.precision)
    if ranks > 1:
        arguments |= {"devices": ranks, "strategy": strategy or "ddp", "use_distributed_sampler": False}
    callbacks = [accumulation or case.accumulation(), recorder]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*isinstance.treespec.*")
        trainer = fit(
            module or Probe(case.dtype),
            callbacks,
            case.data(rank),
            epochs=case.epochs,
            gradient_clip_val=case.clip,
            **arguments,
        )
    return recorder.steps, trainer.global_step


def errors_of(case: Case, steps, ranks: int, what: str = "gradient") -> list[float]:
    """The relative error of every step's gradient."""
    data = [case.data(rank) for rank in range(ranks)]
    length = len(data[0])
    found = []
    for step, window in zip(steps, case.windows, strict=True):
        truth = full_gradient(step["weights"], [data[rank][i % length] for i in window for rank in range(ranks)])
        if case.clip is not None and what == "applied":
            norm = float(flat(truth).norm())
            truth = {name: tensor * min(1.0, case.clip / (norm + 1e-6)) for name, tensor in truth.items()}
        found.append(relative_error(step[what], truth))
    return found
