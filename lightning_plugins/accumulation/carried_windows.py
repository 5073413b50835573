"""Windows that reach over the end of an epoch, which Lightning's loops do not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.core.counting import Count
from lightning_plugins.core.lightning import LightningModule, Trainer, sum_over_ranks
from lightning_plugins.core.patching import Patches
from lightning_plugins.core.validation import real_number, shown, whole_number


class CarriedWindows:
    """Decides in the training loop's place when a window is full, and saves a window that is not.

    Lightning steps at an epoch's last batch and zeroes gradients at its first. Two methods of its loops are replaced
    while the training runs: the one that says whether a batch only accumulates, and the one that says whether it
    zeroes. A batch has its place in a window when Lightning starts it: not if ``on_train_batch_start`` returns -1. The
    first batch of a window that runs zeroes the gradients, also where an earlier one was cancelled.

    Attributes:
        stepped: Whether the window has had its step.
    """

    def __init__(self) -> None:
        self.stepped = False
        self._begin = 0
        self._place = 0
        self._zeroed = False
        self._loaded: dict[str, Any] | None = None

    def take_over(self, trainer: Trainer, patches: Patches) -> None:
        """Take over the two decisions."""
        epoch_loop: Any = trainer.fit_loop.epoch_loop

        def should_accumulate(_: Callable[[], bool]) -> bool:
            last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
            run_ends = last_epoch and epoch_loop._num_ready_batches_reached()
            return bool(self._place < trainer.accumulate_grad_batches and not run_ends)

        def make_zero_grad_fn(original: Callable[[int, Any], Any], _: int, optimizer: Any) -> Any:
            # Lightning asks whether the index is a multiple of the window: 0 is, 1 is not, and a window of one batch
            # has no second one
            zeroed, self._zeroed = self._zeroed, True
            return original(1 if zeroed else 0, optimizer)

        patches.wrap(epoch_loop, "_should_accumulate", should_accumulate)
        patches.wrap(epoch_loop.automatic_optimization, "_make_zero_grad_fn", make_zero_grad_fn)

    def next_batch(self, trainer: Trainer) -> bool:
        """Find the place of the coming batch; return whether a window begins with it.

        A full window without a step ends, too: Lightning zeroes gradients by its count of batches.
        """
        # the epoch in which stochastic weight averaging refreshes statistics
        if trainer.fit_loop._skip_backward:
            return False
        done = self.done(trainer)
        begins = self.stepped or not 0 < done < trainer.accumulate_grad_batches
        if begins:
            done, self._begin, self._zeroed, self.stepped = 0, _started(trainer), False, False
        self._place = done + 1
        return begins

    def done(self, trainer: Trainer) -> int:
        """Return how many batches of the window are done, or at hand."""
        return _started(trainer) - self._begin

    def is_open(self, trainer: Trainer) -> bool:
        """Return whether the window waits for further batches."""
        return not self.stepped and 0 < self.done(trainer) < trainer.accumulate_grad_batches

    def state(self, trainer: Trainer, pl_module: LightningModule, total: float) -> dict[str, Any]:
        """Return the open window: its batches, its count and its gradients, summed over the ranks."""
        gradients = _summed_gradients(trainer, pl_module) if self._zeroed else {}
        return {"position": self.done(trainer), "total": total, "gradients": gradients}

    def load(self, state: Any) -> None:
        """Keep an open window until the model is on its device.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If one is out of range.
        """
        if state is not None:
            if not isinstance(state, Mapping) or state.keys() != {"position", "total", "gradients"}:
                raise TypeError(f"`state['carried']` must hold position, total and gradients, got {shown(state)}.")
            whole_number("state['carried']['position']", state["position"], at_least=1, unit="batches")
            real_number("state['carried']['total']", state["total"], at_least=0)
            gradients = state["gradients"]
            if not isinstance(gradients, Mapping) or not all(isinstance(value, Tensor) for value in gradients.values()):
                raise TypeError(f"`state['carried']['gradients']` must map names to tensors, got {shown(gradients)}.")
            state = dict(state)
        self._loaded = state

    def resume(self, trainer: Trainer, pl_module: LightningModule) -> Count:
        """Put a loaded window in place and return this rank's share of its count, 0 when there is none.

        The saved sums are put on rank 0 and nothing on the others: the sum over the ranks is what a step sees.

        Raises:
            ValueError: If a gradient does not fit its parameter.
        """
        loaded, self._loaded, self.stepped = self._loaded, None, False
        self._begin = _started(trainer) - (loaded["position"] if loaded else 0)
        self._zeroed = bool(loaded and loaded["gradients"])
        if loaded is None or not trainer.is_global_zero:
            return 0
        gradients = loaded["gradients"]
        for name, parameter in pl_module.named_parameters():
            if name in gradients:
                parameter.grad = _fitting(name, gradients[name], parameter)
        total: float = loaded["total"]
        return total


def _started(trainer: Trainer) -> int:
    """Return how many batches the run has started; not those for which ``on_train_batch_start`` returned -1."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    started: int = total.started
    return started


def _fitting(name: str, gradient: Tensor, parameter: Tensor) -> Tensor:
    if gradient.shape != parameter.shape or gradient.dtype != parameter.dtype:
        raise ValueError(
            f"The gradient of `{name}` in a carried window must be {parameter.dtype} of shape "
            f"{tuple(parameter.shape)}, got {gradient.dtype} of shape {tuple(gradient.shape)} in the checkpoint. "
            f"Resume with the module that wrote it, or from an epoch whose last window was full."
        )
    return gradient.to(parameter.device, copy=True)


def _summed_gradients(trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
    """Return the gradients so far by parameter name, as copies; a parameter that no rank has used is left out."""
    parameters = dict(pl_module.named_parameters())
    used = [name for name, parameter in parameters.items() if parameter.grad is not None]
    add_up = sum_over_ranks(trainer) or (lambda gradient: gradient.detach().clone())
    if trainer.world_size > 1:
        used_by_rank: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(used_by_rank, used)
        used = [name for name in parameters if any(name in names for names in used_by_rank)]
    gradients = {}
    for name in used:
        gradient = parameters[name].grad
        gradients[name] = add_up(torch.zeros_like(parameters[name]) if gradient is None else gradient)
    return gradients
