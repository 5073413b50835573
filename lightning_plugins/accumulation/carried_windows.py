"""Windows that reach over the end of an epoch, which Lightning's loops do not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.core import flat_shards
from lightning_plugins.core.checkpoint_keys import SECOND_SETS_FOLDER
from lightning_plugins.core.counting import Count
from lightning_plugins.core.distributed_sets import is_distributed, open_sets, put_beside
from lightning_plugins.core.lightning import LightningModule, Trainer, sum_over_ranks
from lightning_plugins.core.loaders import data_ranks
from lightning_plugins.core.module_state import can_be_copied, clean_name
from lightning_plugins.core.patching import Patches
from lightning_plugins.core.second_sets import GRADIENTS
from lightning_plugins.core.sharding import collected, full_shape, is_sharded, local, placed_as, scatter
from lightning_plugins.core.validation import real_number, shown, whole_number

_ADDED = {"ranks", "batches"}
"""What the state of an open window has since later releases."""


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
        self._resumed = False
        self._loaded: dict[str, Any] | None = None
        # gradients from a distributed checkpoint
        self._beside: dict[str, Tensor] | None = None

    def take_over(self, trainer: Trainer, patches: Patches) -> None:
        """Take over the two decisions."""
        epoch_loop: Any = trainer.fit_loop.epoch_loop

        def should_accumulate(_: Callable[[], bool]) -> bool:
            last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
            run_ends = last_epoch and epoch_loop._num_ready_batches_reached()
            return bool(self._place < trainer.accumulate_grad_batches and not run_ends)

        def make_zero_grad_fn(original: Callable[[int, Any], Any], _: int, optimizer: Any) -> Any:
            # Lightning asks whether the index is a multiple of the window, and 0 is
            zeroed, self._zeroed = self._zeroed, True
            return None if zeroed else original(0, optimizer)

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
        # one that was loaded takes another batch, however few a window has now
        resumed, self._resumed = self._resumed, False
        begins = not resumed and (self.stepped or not 0 < done < trainer.accumulate_grad_batches)
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

    def state(
        self, trainer: Trainer, pl_module: LightningModule, total: float, checkpoint: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the open window: its batches, its count, its gradients, and what these are to be multiplied by.

        Gradients that FSDP2 or tensor parallelism has sharded go beside a ``checkpoint`` that is distributed, each
        rank's shares; then they are ``None`` here.
        """
        state: dict[str, Any] = {"position": self.done(trainer), "total": total, "gradients": {}, "ranks": 1}
        state["batches"] = trainer.accumulate_grad_batches
        means = is_sharded(pl_module) and not flat_shards.are_in(pl_module)
        if means:
            state["ranks"] = data_ranks(trainer)
        if not self._zeroed:
            return state
        if not means:
            return {**state, "gradients": _summed_gradients(trainer, pl_module)}
        shares = is_distributed(checkpoint)
        gradients = _sharded_gradients(trainer, pl_module, shares=shares)
        if shares and gradients:
            put_beside(trainer.strategy, checkpoint, {GRADIENTS: gradients})
        return {**state, "gradients": None if shares and gradients else gradients}

    def read_beside(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read the gradients that lie beside a distributed checkpoint; every rank must call it."""
        sets = open_sets(checkpoint, trainer.ckpt_path, pl_module)
        self._beside = None if sets is None else sets.read(GRADIENTS)

    def load(self, state: Any) -> None:
        """Keep an open window until the model is on its device.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If one is out of range.
        """
        if state is not None:
            if not isinstance(state, Mapping) or state.keys() - _ADDED != {"position", "total", "gradients"}:
                raise TypeError(f"`state['carried']` must hold position, total and gradients, got {shown(state)}.")
            whole_number("state['carried']['position']", state["position"], at_least=1, unit="batches")
            real_number("state['carried']['total']", state["total"], at_least=0)
            whole_number("state['carried']['ranks']", state.get("ranks", 1), at_least=1, unit="ranks")
            whole_number("state['carried']['batches']", state.get("batches", 1), at_least=1, unit="batches")
            # those in a folder are read by now, if they are there; an evaluation does not need them
            gradients, self._beside = self._beside if state["gradients"] is None else state["gradients"], None
            if gradients is not None and not _are_tensors(gradients):
                raise TypeError(f"`state['carried']['gradients']` must map names to tensors, got {shown(gradients)}.")
            state = {**state, "gradients": gradients}
        self._loaded = state

    def resume(self, trainer: Trainer, pl_module: LightningModule) -> Count:
        """Put a loaded window in place and return this rank's share of its count, 0 when there is none.

        The saved sums are put on rank 0 and nothing on the others: a step sees the mean over the ranks. Where that is
        taken after each backward, every rank takes its share of it. Where a window has another number of batches now,
        the gradients are what they were if all losses had been divided by that.

        Raises:
            ValueError: If a gradient does not fit its parameter, or the folder with the gradients is not there.
        """
        loaded, self._loaded, self.stepped = self._loaded, None, False
        if loaded is not None and loaded["gradients"] is None:
            raise ValueError(
                "`gradients` of a carried window must lie beside the checkpoint, in its folder "
                f"{SECOND_SETS_FOLDER}, but it was put together from a directory without it. Resume from the "
                "directory, or from an epoch whose last window was full."
            )
        batches = trainer.accumulate_grad_batches
        self._begin, self._resumed = _started(trainer) - (loaded["position"] if loaded else 0), loaded is not None
        self._zeroed = bool(loaded and loaded["gradients"])
        if loaded is None:
            return 0
        gradients, ranks = loaded["gradients"], loaded.get("ranks", 1)
        sharded = _takes_means(pl_module)
        factor = (ranks / data_ranks(trainer) if sharded else ranks) * loaded.get("batches", batches) / batches
        for key, parameter in pl_module.named_parameters():
            name = clean_name(key)
            if name in gradients and (sharded or trainer.is_global_zero):
                parameter.grad = _fitting(name, gradients[name], parameter, factor)
        # ranks that share a batch count it each
        total: float = loaded["total"] * (trainer.world_size / data_ranks(trainer))
        return total if trainer.is_global_zero else 0


def _are_tensors(found: Any) -> bool:
    return isinstance(found, Mapping) and all(isinstance(value, Tensor) for value in found.values())


def _started(trainer: Trainer) -> int:
    """Return how many batches the run has started; not those for which ``on_train_batch_start`` returned -1."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    started: int = total.started
    return started


def _takes_means(pl_module: LightningModule) -> bool:
    """Return whether FSDP is given gradients as means over the ranks, in shards; DDP is given the sum, on one rank."""
    return is_sharded(pl_module) or flat_shards.are_in(pl_module)


def _fitting(name: str, gradient: Tensor, parameter: Tensor, factor: float) -> Tensor:
    """Return this rank's share of a saved gradient, times ``factor``."""
    fits = gradient.shape == full_shape(parameter) and gradient.dtype == parameter.dtype
    if not fits or not can_be_copied(gradient, into=parameter):
        raise ValueError(
            f"The gradient of `{name}` in a carried window must be {parameter.dtype} of shape "
            f"{tuple(full_shape(parameter))}, got {gradient.dtype} of shape {tuple(gradient.shape)}, {gradient.layout} "
            f"on {gradient.device}, in the checkpoint. "
            f"Resume with the module that wrote it, or from an epoch whose last window was full."
        )
    found = torch.zeros_like(parameter.detach())
    local(found).copy_(scatter(gradient.to(local(parameter).device), parameter))
    return found if factor == 1 else found * factor


def _used(trainer: Trainer, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters that have a gradient on some rank; every rank takes part."""
    used = [name for name, parameter in parameters.items() if parameter.grad is not None]
    if trainer.world_size > 1:
        used_by_rank: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(used_by_rank, used)
        used = [name for name in parameters if any(name in names for names in used_by_rank)]
    return used


def _summed_gradients(trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
    """Return the gradients so far by parameter name, as copies; a parameter that no rank has used is left out."""
    parameters = _named_parameters(pl_module)
    add_up = sum_over_ranks(trainer) or (lambda gradient: gradient.detach().clone())
    gradients = {}
    for name in _used(trainer, parameters):
        parameter, flat = parameters[name], flat_shards.of(parameters[name])
        if flat is not None:
            gradients[name] = flat.gradient(parameter, data_ranks(trainer)).cpu()
        else:
            gradients[name] = add_up(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return gradients


def _sharded_gradients(trainer: Trainer, pl_module: LightningModule, *, shares: bool) -> dict[str, Tensor]:
    """Return the same of sharded gradients: this rank's shares, or whole ones on the first rank."""
    parameters, gradients = _named_parameters(pl_module), {}
    for name in _used(trainer, parameters):
        parameter = parameters[name].detach()
        grad = parameters[name].grad
        part = torch.zeros_like(local(parameter)) if grad is None else local(placed_as(grad.detach(), parameter))
        found = collected(part, parameter, keep=shares or trainer.is_global_zero, shares=shares)
        if found is not None:
            # the next batch adds to it
            gradients[name] = found if shares else found.to("cpu", copy=True)
    return gradients


def _named_parameters(pl_module: LightningModule) -> dict[str, torch.nn.Parameter]:
    return {clean_name(key): parameter for key, parameter in pl_module.named_parameters()}
