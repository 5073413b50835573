"""A module's tensors by name.

Names are those of the uncompiled module: ``torch.compile`` puts ``_orig_mod.`` into them, which is taken out, so that a
file written by a compiled module fits a plain one and the other way round. A tensor that has several names (tied
weights) is one tensor with aliases.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.core.sharding import is_sharded, local, reshard, scatter
from lightning_plugins.core.validation import shown


@dataclass(frozen=True)
class Slot:
    """The place in a module that a tensor is read from, so that a tensor that is replaced there is found again."""

    owner: nn.Module
    key: str
    is_buffer: bool

    @property
    def tensor(self) -> Tensor:
        """The tensor that lies there now."""
        table = self.owner._buffers if self.is_buffer else self.owner._parameters
        tensor = table[self.key]
        if tensor is None:
            raise RuntimeError(f"The module's tensor {self.key!r} was removed while it was averaged.")
        return tensor


def clean_name(name: str) -> str:
    """Return ``name`` as the uncompiled module calls it.

    Example:
        >>> clean_name("encoder._orig_mod.0.weight")
        'encoder.0.weight'
    """
    return name.replace("_orig_mod.", "")


def device_name(device: Any) -> str | None:
    """Return the argument ``device`` as text, ``None`` as it is.

    Raises:
        ValueError: If there is no such kind of device.
    """
    try:
        return None if device is None else str(torch.device(device))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"`device` must be the name of a device such as 'cpu', got {shown(device)}.") from error


def named_slots(module: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Yield every parameter and persistent buffer of ``module`` with its clean name, tied ones under each name."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        path = f"{prefix}." if prefix else ""
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                yield clean_name(path + key), Slot(owner, key, is_buffer=False)
        for key, buffer in owner._buffers.items():
            if buffer is not None and key not in owner._non_persistent_buffers_set:
                yield clean_name(path + key), Slot(owner, key, is_buffer=True)


def averaged_slots(module: nn.Module, *, buffers: bool = False, also: Collection[str] = ()) -> dict[str, Slot]:
    """Return the slots that an average follows: trainable parameters and, on request, floating-point buffers.

    Args:
        module: The module. FSDP2 groups that a forward left gathered are sharded again first.
        buffers: Whether floating-point buffers are averaged too; integer ones never are.
        also: Parameters to include although they are frozen: an average in a file may hold them.

    Raises:
        ValueError: If a trainable parameter is lazy and has no shape yet.
    """
    reshard(module)
    chosen = {}
    for name, slot in named_slots(module):
        tensor = slot.tensor
        wanted = buffers if slot.is_buffer else tensor.requires_grad or name in also
        if not wanted or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"`{name}` must have a shape before it can be averaged, but it is a lazy parameter: run one batch "
                "through the module in its `setup` or `configure_model`."
            )
        chosen[name] = slot
    return chosen


def is_opaque(tensor: Tensor) -> bool:
    """Return whether a tensor has no plain block of numbers: sparse ones, and kinds that answer operations themselves.

    Quantized weights of torchao are such a kind. Sharded tensors are not meant: their local parts are plain.

    Example:
        >>> is_opaque(torch.eye(2)), is_opaque(nn.Parameter(torch.eye(2))), is_opaque(torch.eye(2).to_sparse())
        (False, False, True)
    """
    answers_itself = getattr(type(tensor), "__torch_dispatch__", None) is not Tensor.__torch_dispatch__
    return tensor.layout != torch.strided or (answers_itself and not is_sharded(tensor))


def shadow_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which weights of ``dtype`` are averaged: float32 at least, so that no average freezes.

    Example:
        >>> shadow_dtype(torch.bfloat16), shadow_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    if dtype.is_complex:
        return torch.complex128 if dtype == torch.complex128 else torch.complex64
    return torch.float64 if dtype == torch.float64 else torch.float32


def fill(state: MutableMapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replace those entries of a state dict that ``tensors`` has under their clean name; others stay."""
    for key in state:
        name = clean_name(key)
        if name in tensors:
            state[key] = tensors[name]


def misfits(module: nn.Module, tensors: Mapping[str, Tensor], *, required: Collection[str] = ()) -> list[str]:
    """Return what is wrong with loading ``tensors`` into ``module``, a line per kind of fault; empty when it fits.

    Args:
        module: The module.
        tensors: Clean name -> full tensor.
        required: Names that must be there.
    """
    reshard(module)
    shapes = {name: slot.tensor.shape for name, slot in named_slots(module)}
    faults = {
        "missing": [name for name in required if name not in tensors],
        "unexpected": [name for name in tensors if name not in shapes],
        "misshapen": [
            f"{name} {tuple(tensor.shape)} for {tuple(shapes[name])}"
            for name, tensor in tensors.items()
            if name in shapes and shapes[name] != tensor.shape
        ],
    }
    return [f"{kind}: {shorten(names)}" for kind, names in faults.items() if names]


def shorten(names: Collection[str], most: int = 5) -> str:
    """Return ``names`` as a list for a message, the first few of them.

    Example:
        >>> shorten(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    listed = ", ".join(list(names)[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def load_named(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write full tensors into the module's tensors of those clean names, each rank its share."""
    reshard(module)
    with torch.no_grad():
        for name, slot in named_slots(module):
            if name in tensors:
                target = local(slot.tensor)
                target.copy_(scatter(tensors[name].to(target.device), slot.tensor))
