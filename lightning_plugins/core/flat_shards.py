"""The parts of parameters that FSDP1 leaves on a rank, which it shows on no tensor: read once from its own records.

FSDP1 (``use_orig_params=True``) joins the parameters of a module into one flat one, cuts that into equal shards, and
lets each parameter be a flat view of what lies in this rank's shard, which may be nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class FlatShard:
    """A rank's part of one parameter.

    Args:
        shape: The parameter's own shape.
        start: The first of the rank's elements in the flattened parameter.
        offset: Where they begin in the rank's part of the flat parameter.
        handle: A weak reference to what FSDP1 keeps the flat parameter with.
        device: Where collectives run.
        group: The processes that share the parameter.
    """

    shape: torch.Size
    start: int
    offset: int
    handle: weakref.ref[Any]
    device: torch.device
    group: Any

    def gather(self, part: Tensor) -> Tensor:
        """Return the whole of which ``part`` is this rank's share; a collective."""
        whole = torch.zeros(self.shape.numel(), dtype=part.dtype, device=self.device)
        whole[self.start : self.start + part.numel()] = part.flatten()
        torch.distributed.all_reduce(whole, group=self.group)
        return whole.view(self.shape)

    def gradient(self, parameter: Tensor, ranks: int) -> Tensor:
        """Return the sum over the ranks of the gradient so far, also while a window is open; a collective.

        Until a window ends a rank has the whole gradient of its own batches, and beside it its share of the mean over
        ``ranks`` that it had before.
        """
        flat: Any = getattr(self.handle(), "flat_param", None)
        own = getattr(flat, "grad", None)
        total = torch.zeros(self.shape, dtype=parameter.dtype, device=self.device)
        before = parameter.grad
        if own is not None and own.shape == flat._unpadded_unsharded_size:
            total += 0 if parameter.grad is None else parameter.grad
            torch.distributed.all_reduce(total)
            shard = getattr(flat, "_saved_grad_shard", None)
            before = None if shard is None else shard[self.offset : self.offset + parameter.numel()]
        return total + ranks * self.gather(torch.zeros_like(parameter) if before is None else before.detach())

    def scatter(self, whole: Tensor, numel: int) -> Tensor:
        """Return a copy of this rank's ``numel`` elements of ``whole``."""
        return whole.flatten()[self.start : self.start + numel].clone()


_shards: MutableMapping[Tensor, FlatShard] = WeakIdKeyDictionary()
# module -> weak references to the handles of its flat parameters
_handles: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()


_HIDDEN = (
    "`use_orig_params` must be True under FSDP1, got False: the module's parameters are hidden in flat ones. Leave it "
    "out of FSDPStrategy(...), and give it to every FullyShardedDataParallel(...) of your own."
)


def check_shown(strategy: Any) -> None:
    """Raise if a strategy is FSDP1's and is told to hide the module's parameters.

    Raises:
        ValueError: If so.
    """
    if not getattr(strategy, "kwargs", {}).get("use_orig_params", True):
        raise ValueError(_HIDDEN)


def look_up(model: nn.Module | None, module: nn.Module) -> None:
    """Read which parts of the parameters of ``module`` lie on this rank, if FSDP1 shards it.

    Args:
        model: What the strategy has made of the module, whose outermost wrapper is no part of the module.
        module: The user's module.

    Raises:
        ValueError: If FSDP1 shows no parameters of the module's own.
    """
    handles: list[Any] = [
        part._handle
        for part in (model or module).modules()
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(part).__mro__) and part._handle
    ]
    if not handles:
        return
    for handle in handles:
        flat = handle.flat_param
        if flat._params is None:
            raise ValueError(_HIDDEN)
        if not handle.uses_sharded_strategy:
            continue
        for parameter, shape, place in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            start, offset = place.intra_param_start_idx or 0, place.offset_in_shard or 0
            known = weakref.ref(handle), handle.device, handle.process_group
            _shards[parameter] = FlatShard(shape, start, offset, *known)
    _handles[module] = [weakref.ref(handle) for handle in handles]


def of(tensor: Tensor) -> FlatShard | None:
    """Return what is known of a tensor that FSDP1 shards, ``None`` for others."""
    return _shards.get(tensor)


def are_in(module: nn.Module) -> bool:
    """Return whether FSDP1 has joined parameters of ``module``."""
    return module in _handles


def reshard(module: nn.Module) -> None:
    """Free what is gathered: the outermost part stays so after a forward without gradients, and would be used again."""
    for reference in _handles.get(module, ()):
        handle = reference()
        # nothing was gathered before the first forward, which makes the local shard
        used = handle is not None and hasattr(handle.flat_param, "_local_shard")
        if used and handle.uses_sharded_strategy:
            handle.reshard(True)
            handle.post_reshard()
