"""Windows that reach over the end of an epoch, which Lightning's loops do not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_plugins.core.counting import Count
from lightning_plugins.core.lightning import LightningModule, Trainer
from lightning_plugins.core.strategies import sum_over_ranks


class CarriedWindows:
    """Decides in the training loop's place when a window is full, and saves a window that is not.

    Lightning steps at an epoch's last batch and zeroes gradients at its first. Two methods of its loops are replaced
    on the instances while the training runs: the one that says whether a batch only accumulates, and the one that
    says whether it zeroes.

    Attributes:
        position: Batches of the window so far, the current one included.
    """

    def __init__(self) -> None:
        self.position = 0
        self._loaded: dict[str, Any] | None = None

    def install(self, trainer: Trainer) -> None:
        """Take over the two decisions."""
        epoch_loop: Any = trainer.fit_loop.epoch_loop
        optimization: Any = epoch_loop.automatic_optimization
        zero_grad_of = optimization._make_zero_grad_fn

        def should_accumulate() -> bool:
            last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
            run_ends = last_epoch and epoch_loop._num_ready_batches_reached()
            return bool(self.position < trainer.accumulate_grad_batches and not run_ends)

        def make_zero_grad_fn(_: int, optimizer: Any) -> Any:
            # Lightning asks whether the index is a multiple of the window: 0 is, 1 is not, and a window of one batch
            # has no second one
            return zero_grad_of(0 if self.position == 1 else 1, optimizer)

        epoch_loop._should_accumulate = should_accumulate
        optimization._make_zero_grad_fn = make_zero_grad_fn

    def remove(self, trainer: Trainer) -> None:
        """Give the decisions back; harmless when they were not taken."""
        epoch_loop: Any = trainer.fit_loop.epoch_loop
        epoch_loop.__dict__.pop("_should_accumulate", None)
        epoch_loop.automatic_optimization.__dict__.pop("_make_zero_grad_fn", None)

    def state(self, trainer: Trainer, pl_module: LightningModule, total: Count) -> dict[str, Any]:
        """Return the open window: its batches, its count and its gradients, summed over the ranks."""
        return {
            "position": self.position,
            "total": float(sum_over_ranks(trainer, total)),
            "gradients": _summed_gradients(trainer, pl_module),
        }

    def load(self, state: dict[str, Any] | None) -> None:
        """Keep an open window until the model is on its device."""
        self._loaded = state

    def resume(self, trainer: Trainer, pl_module: LightningModule) -> tuple[bool, Count]:
        """Put a loaded window in place; return whether there is one, and this rank's share of its count.

        The saved sums are put on rank 0 and nothing on the others: the sum over the ranks is what a step sees.
        """
        loaded, self._loaded, self.position = self._loaded, None, 0
        if loaded is None:
            return False, 0
        self.position = loaded["position"]
        if not trainer.is_global_zero:
            return True, 0
        for name, parameter in pl_module.named_parameters():
            if name in loaded["gradients"]:
                parameter.grad = loaded["gradients"][name].to(parameter.device, copy=True)
        return True, loaded["total"]


def _summed_gradients(trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
    """Return the gradients so far by parameter name, as copies; a parameter that no rank has used is left out."""
    parameters = dict(pl_module.named_parameters())
    used = [name for name, parameter in parameters.items() if parameter.grad is not None]
    if trainer.world_size > 1:
        used_by_rank: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(used_by_rank, used)
        used = [name for name in parameters if any(name in names for names in used_by_rank)]
    gradients = {}
    for name in used:
        gradient = parameters[name].grad
        summed = torch.zeros_like(parameters[name]) if gradient is None else gradient.detach().clone()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(summed)
        gradients[name] = summed
    return gradients
