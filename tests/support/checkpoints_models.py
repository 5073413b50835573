"""Small modules, data and files for the tests of checkpoint averaging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as unified
import numpy as np
import pytorch_lightning as classic
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.checkpoints import read_manifest

NAMESPACES = {"lightning.pytorch": unified, "pytorch_lightning": classic}


def module_class(namespace: Any = unified) -> type:
    class Regressor(namespace.LightningModule):
        """Two layers with a batch normalization between them if asked; logs training and validation losses."""

        def __init__(self, width: int = 4, batch_norm: bool = False, rate: float = 0.05) -> None:
            super().__init__()
            self.save_hyperparameters()
            middle = nn.BatchNorm1d(width) if batch_norm else nn.Tanh()
            self.net = nn.Sequential(nn.Linear(3, width), middle, nn.Linear(width, 1))
            self.seen: list[str] = []

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.net(inputs)

        def _loss(self, batch: Any) -> torch.Tensor:
            return nn.functional.mse_loss(self(batch[0]), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self._loss(batch)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self._loss(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=self.hparams.rate)

    return Regressor


Regressor = module_class()


def loader(count: int = 16, batch: int = 4, seed: int = 0, shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator)
    targets = inputs.sum(1, keepdim=True) + 0.1 * torch.randn(count, 1, generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch_size=batch, shuffle=shuffle)


def trainer(root: Path, namespace: Any = unified, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 4,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
    }
    return namespace.Trainer(**{**defaults, **options})


VALIDATION = {"val_dataloaders": loader(seed=1)}


def model_checkpoint(folder: Path, namespace: Any = unified, **options: Any) -> Any:
    return namespace.callbacks.ModelCheckpoint(dirpath=folder, **options)


def sources(path: Path) -> list[Path]:
    """The checkpoints that an average is made of, by its manifest."""
    return [(path.parent / file["path"]).resolve() for file in read_manifest(path)["files"]]


def float64_mean(paths: list[Path], weights: list[float] | None = None) -> dict[str, np.ndarray]:
    """The mean of every floating-point tensor, by NumPy in float64 from whole files: what ours must equal."""
    states = [load_state(path) for path in paths]
    return {
        name: np.average(np.stack([state[name].double().numpy() for state in states]), axis=0, weights=weights)
        for name, tensor in states[0].items()
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    }


def load_state(path: Path) -> dict[str, Any]:
    content = torch.load(path, weights_only=False)
    return content.get("state_dict", content)


def assert_is_mean(state: dict[str, Any], expected: dict[str, np.ndarray], ulps: float = 4.0) -> None:
    for name, values in expected.items():
        tensor = state[name]
        error = np.abs(tensor.double().numpy() - values).max(initial=0.0)
        bound = ulps * torch.finfo(tensor.dtype).eps * max(1.0, np.abs(values).max(initial=0.0))
        assert error <= bound, (name, error, bound)


def write_files(folder: Path, count: int = 3, **tensors: Any) -> list[Path]:
    """Lightning-like checkpoints of random weights, steps 10, 20, ...; ``tensors`` maps names to functions of i."""
    paths = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        state = {
            "a.weight": torch.randn(5, 7, generator=generator),
            "a.bias": torch.randn(5, generator=generator),
            "count": torch.tensor(i),
            **{name: make(i) for name, make in tensors.items()},
        }
        path = folder / f"epoch={i}-step={10 * (i + 1)}.ckpt"
        content = {"epoch": i, "global_step": 10 * (i + 1), "pytorch-lightning_version": "2.6.6", "state_dict": state}
        torch.save(content, path)
        paths.append(path)
    return paths
