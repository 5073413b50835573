"""Statistics of batch normalization for averaged weights, which no checkpoint has seen at work.

The mean of running statistics is not the statistics of the mean weights. They are estimated anew: every layer's running
mean and variance become the plain mean over batches of that batch's mean and (unbiased) variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_STATISTICS = ("running_mean", "running_var")


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers whose statistics follow the data: not frozen ones (in eval mode), not those without any."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats
    }


@contextmanager
def estimating(layers: dict[str, _BatchNorm]) -> Iterator[None]:
    """Restart the layers' statistics, to take the plain mean over all batches run in the block."""
    before = [(layer, layer.momentum) for layer in layers.values()]
    try:
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = None  # what torch calls a cumulative average
        yield
    finally:
        for layer, momentum in before:
            layer.momentum = momentum


def statistics(layers: dict[str, _BatchNorm], reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the layers' statistics by their names in the state dict.

    Args:
        layers: The layers by name.
        reduce: Returns the mean over all processes, which saw different data.
    """
    found = {}
    for name, layer in layers.items():
        for kind in _STATISTICS:
            value = getattr(layer, kind)
            if value is not None:
                found[f"{name}.{kind}" if name else kind] = reduce(value.detach().clone()).to("cpu", torch.float32)
    return found
