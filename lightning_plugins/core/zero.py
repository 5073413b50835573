"""DeepSpeed's ZeRO: where the float32 master weights and the gradients of this rank are, and which steps were applied.

Under ZeRO a rank trains its own partition of the weights, in float32, from which the weights that compute are made:
``master -> 16 bits -> all ranks``. A parameter's share of the partition is a run of its flattened elements, the
*fragment*. DeepSpeed itself is not imported here: what its engine has is looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.core.module_state import NamedTensor, named_tensors
from lightning_plugins.core.patching import read
from lightning_plugins.core.step_clock import RunClock


@dataclass(frozen=True)
class Fragment:
    """This rank's part of a parameter.

    Args:
        found: The parameter.
        shape: Its sizes: under ZeRO 3 the parameter itself is empty between uses.
        start: Where the part begins in the flattened parameter.
        values: The part, flat; the master weights of a trained parameter.
    """

    found: NamedTensor
    shape: tuple[int, ...]
    start: int
    values: Tensor


def is_deepspeed(strategy: Any) -> bool:
    """Return whether a strategy is DeepSpeed's, or a subclass of it."""
    return any(kind.__name__ == "DeepSpeedStrategy" for kind in type(strategy).__mro__)


def zero_of(trainer: Any) -> Zero | None:
    """Return what ZeRO does in a run, ``None`` where there is none: under another strategy, or without training.

    Raises:
        ValueError: If DeepSpeed's optimizer is of a kind that was not tested.
    """
    engine: Any = trainer.strategy.model if is_deepspeed(trainer.strategy) else None
    optimizer = getattr(engine, "optimizer", None)
    if optimizer is None:
        return None
    if not hasattr(optimizer, "averaged_gradients"):
        raise ValueError(
            f"DeepSpeed must train with its ZeRO optimizer of stage 1, 2 or 3, got {type(optimizer).__name__}: leave "
            "`data_types` out of its configuration, or take another stage."
        )
    return Zero(engine)


class Zero:
    """DeepSpeed's engine and its ZeRO optimizer.

    Args:
        engine: The engine, of a run that trains.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.optimizer: Any = read(engine, "optimizer")

    @property
    def attempted(self) -> int:
        """Optimizer steps so far."""
        return int(read(self.engine, "global_steps"))

    @property
    def applied(self) -> int:
        """Those that changed the weights: DeepSpeed counts the steps that overflowed, and skips them."""
        return self.attempted - int(read(self.engine, "skipped_steps"))

    @property
    def offloads(self) -> bool:
        """Whether gradients and master weights are kept on the host."""
        return bool(
            getattr(self.optimizer, "cpu_offload", False) or getattr(self.optimizer, "offload_optimizer", False)
        )

    # -- weights

    def masters(self, module: nn.Module) -> list[Fragment]:
        """Return this rank's part of every trained parameter, in the module's order; an empty part is one, too.

        Raises:
            ValueError: If the master weights are not in memory.
        """
        trained = [found for found in named_tensors(module) if not found.is_buffer and self._trains(found.tensor)]
        return [fragment(found, self._master(found.tensor)) for found in trained]

    def _trains(self, parameter: Any) -> bool:
        if not parameter.requires_grad:
            return False
        if hasattr(parameter, "ds_id"):
            return self.optimizer.get_param_id(parameter) in read(self.optimizer, "grad_position")
        return hasattr(parameter, "_hp_mapping")

    def _master(self, parameter: Any) -> tuple[int, Tensor]:
        """Return where this rank's part of a parameter begins, and its master weights."""
        if not hasattr(parameter, "ds_id"):
            mapping = parameter._hp_mapping
            if mapping is None:
                return 0, torch.empty(0, device=parameter.device)
            return int(read(mapping, "lp_fragment_address").start), read(mapping, "hp_fragment").detach()
        optimizer = self.optimizer
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat, (start, numel) = read(optimizer, "fp32_partitioned_groups_flat")[group], _part(parameter)
        if flat.numel() < offset + numel:
            raise ValueError(
                "The master weights must be in memory to be averaged, but DeepSpeed keeps them on a disk. Take "
                "`offload_optimizer_device='cpu'`."
            )
        return start, flat.detach().narrow(0, offset, numel)

    @torch.no_grad()
    def publish(self) -> None:
        """Make the weights that compute anew out of the master weights; a collective, as after a step."""
        optimizer = self.optimizer
        if hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for number in range(len(read(optimizer, "fp16_groups"))):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        persistent = read(optimizer, "persistent_parameters")
        if persistent:
            persistent[0].all_gather(persistent)
        optimizer.invalidate_secondary_tensor()

    # -- windows

    def announce(self, *, ends_window: bool) -> None:
        """Say whether the coming batch is the last of an optimizer step, in place of DeepSpeed's own count."""
        self.engine.set_gradient_accumulation_boundary(ends_window)

    @property
    def ends_window(self) -> bool:
        """Whether the batch at hand is the last of an optimizer step."""
        return bool(self.engine.is_gradient_accumulation_boundary())

    @property
    def divisor(self) -> int:
        """What DeepSpeed divides every loss by, beside Lightning."""
        return int(self.engine.gradient_accumulation_steps())

    def gradients(self) -> list[Tensor]:
        """Return this rank's part of the gradients, which are complete before the step of a window."""
        return [part for group in read(self.optimizer, "averaged_gradients").values() for part in group or ()]


class ZeroClock:
    """Counts the applied steps of a run under ZeRO; as :class:`~lightning_plugins.core.step_clock.RunClock` is used.

    DeepSpeed calls its inner optimizer once for every part of the weights, so that one's calls are no steps.

    Args:
        zero: The run's.
        applied: Steps that were applied before.

    Attributes:
        news: What was noticed: nothing.
    """

    def __init__(self, zero: Zero, applied: int) -> None:
        self.news: list[str] = []
        self._zero = zero
        self.restore(applied)

    @property
    def applied(self) -> int:
        """Steps that changed the weights."""
        return self._before + self._zero.applied - self._seen

    def restore(self, applied: int) -> None:
        """Set the count, as after weights were restored."""
        self._before, self._seen = applied, self._zero.applied

    def start_batch(self) -> None:
        """Do nothing: the optimizer cannot be exchanged."""

    def end_batch(self) -> None:
        """Do nothing: no step is silent."""

    def close(self) -> None:
        """Do nothing: there is nothing to take off."""


def clock_of(trainer: Any, applied: int, between: Callable[[], None] | None = None) -> RunClock | ZeroClock:
    """Return what counts the applied steps of a run, whatever its strategy.

    Args:
        trainer: The Trainer, when training starts.
        applied: Steps that were applied before.
        between: Called between two steps of one batch, where there is one optimizer and it is not DeepSpeed's.

    Raises:
        TypeError: If the optimizer's steps cannot be seen.
        ValueError: If DeepSpeed's optimizer is of a kind that was not tested.
    """
    zero = zero_of(trainer)
    return RunClock(trainer, applied, between) if zero is None else ZeroClock(zero, applied)


def fragment(found: NamedTensor, part: tuple[int, Tensor]) -> Fragment:
    """Return a parameter's part, given as its start and its values."""
    shape = tuple(getattr(found.tensor, "ds_shape", found.tensor.shape))
    return Fragment(found, shape, *part)


def held_part(parameter: Any) -> tuple[int, Tensor]:
    """Return what this rank holds of a parameter that computes: where it begins, and the values, flat."""
    if not hasattr(parameter, "ds_id"):
        return 0, parameter.detach().reshape(-1)
    start, numel = _part(parameter)
    return start, read(parameter, "ds_tensor").detach().reshape(-1)[:numel]


def _part(parameter: Any) -> tuple[int, int]:
    """Return where this rank's part of a parameter of ZeRO 3 begins, and its length without the filling."""
    rank = torch.distributed.get_rank(read(parameter, "ds_process_group"))
    size, numel = parameter.partition_numel(), read(parameter, "ds_numel")
    start = min(rank * size, numel)
    return start, min(size, numel - start)


@torch.no_grad()
def gathered(part: Fragment) -> Tensor:
    """Return a parameter's full tensor out of every rank's part; a collective."""
    whole = torch.zeros(torch.Size(part.shape).numel(), dtype=part.values.dtype, device=part.values.device)
    whole[part.start : part.start + part.values.numel()] = part.values
    torch.distributed.all_reduce(whole)
    return whole.view(part.shape)


@torch.no_grad()
def load_full(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write full tensors into the parameters of those clean names that compute, each rank its part; no collective."""
    for found in named_tensors(module):
        source = next((tensors[name] for name in found.names if name in tensors), None)
        if source is None:
            continue
        parameter: Any = found.tensor
        if not hasattr(parameter, "ds_id"):
            parameter.copy_(source)
            continue
        # a parameter that is in use is put together from the parts again
        parameter.partition()
        start, values = held_part(parameter)
        values.copy_(source.reshape(-1)[start : start + values.numel()])
