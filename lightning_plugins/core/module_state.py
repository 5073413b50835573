"""A module's tensors under the names that its ``state_dict`` gives them, matched by identity.

Where a tensor lies in a module does not say what it is called in a file: activation checkpointing and other wrappers
rename their entries while the state dict is made. So the state dict is asked, and each tensor is found in it by
identity. Only FSDP1, which gathers every tensor for a state dict, is not asked: its names are those of the places.
``torch.compile`` puts ``_orig_mod.`` into names, which is taken out, so that a file written by a compiled module fits a
plain one and the other way round. A tensor that has several names (tied weights) is one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins.core import flat_shards
from lightning_plugins.core.sharding import full_shape, is_sharded, local, reshard, scatter
from lightning_plugins.core.validation import printable, shortened, shown

# the last two are left in by FSDP1 alone
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class TensorPlace:
    """The place in a module that a tensor is read from.

    Args:
        owner: The module that has it.
        key: Its name there.
        is_buffer: Whether it is a buffer; else a parameter.
    """

    owner: nn.Module
    key: str
    is_buffer: bool

    @property
    def table(self) -> Mapping[str, Tensor | None]:
        """The owner's table that has it."""
        return self.owner._buffers if self.is_buffer else self.owner._parameters


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of a module.

    Args:
        tensor: The tensor that lay there when it was looked up.
        names: Its clean names in the state dict; several when it is tied, none when the state dict lacks it.
        places: Where it lies.
    """

    tensor: Tensor
    names: tuple[str, ...]
    places: tuple[TensorPlace, ...]

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer."""
        return self.places[0].is_buffer

    @property
    def described(self) -> str:
        """Its name for a message: where it lies, if the state dict lacks it."""
        return self.names[0] if self.names else f"{type(self.places[0].owner).__name__}.{self.places[0].key}"


def clean_name(name: str) -> str:
    """Return ``name`` as the module calls it that is neither compiled nor wrapped.

    Example:
        >>> clean_name("encoder._orig_mod.0.weight"), clean_name("_fsdp_wrapped_module.weight")
        ('encoder.0.weight', 'weight')
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module behind ``torch.compile(module)``, any other as it is."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def device_name(device: Any) -> str | None:
    """Return the argument ``device`` as text, ``None`` as it is.

    Raises:
        ValueError: If there is no such kind of device.
    """
    try:
        return None if device is None else str(torch.device(device))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"`device` must be the name of a device such as 'cpu', got {shown(device)}.") from error


def named_tensors(module: nn.Module) -> list[NamedTensor]:
    """Return every parameter and persistent buffer of ``module`` once, in the module's order.

    FSDP2 groups that a forward left gathered are sharded again first.
    """
    reshard(module)
    tensors: dict[int, Tensor] = {}
    places: dict[int, list[TensorPlace]] = {}
    for owner in module.modules():
        skipped = owner._non_persistent_buffers_set
        for table, is_buffer in ((owner._parameters, False), (owner._buffers, True)):
            for key, tensor in table.items():
                if tensor is not None and not (is_buffer and key in skipped):
                    tensors[id(tensor)] = tensor
                    places.setdefault(id(tensor), []).append(TensorPlace(owner, key, is_buffer))
    names = _state_names(module, tensors)
    return [NamedTensor(tensor, tuple(names.get(key, ())), tuple(places[key])) for key, tensor in tensors.items()]


def state_of(module: nn.Module, *, keep_vars: bool = False) -> dict[str, Any]:
    """Return the module's state dict, sharded tensors in shards."""
    if not flat_shards.are_in(module):
        return module.state_dict(keep_vars=keep_vars) if keep_vars else module.state_dict()
    state: dict[str, Any] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        skipped = owner._non_persistent_buffers_set
        for key, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and key not in skipped:
                state[clean_name(f"{prefix}.{key}" if prefix else key)] = tensor
    return state


def _state_names(module: nn.Module, tensors: Mapping[int, Tensor]) -> dict[int, list[str]]:
    """Return id of a tensor -> its clean names in the module's state dict."""
    try:
        state = state_of(module, keep_vars=True)
    except TypeError:
        # a method of the user's own that takes no arguments
        state = module.state_dict()
    entries = {clean_name(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if any(id(value) not in tensors for value in entries.values()):
        # detached tensors are other objects over the same memory
        entries.update(_by_memory(entries, tensors))
    names: dict[int, list[str]] = {}
    for name, tensor in entries.items():
        names.setdefault(id(tensor), []).append(name)
    return names


def _by_memory(entries: Mapping[str, Tensor], tensors: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Return name -> the module's tensor over whose memory, and no other's, an entry of a state dict lies."""
    lying: dict[Any, list[Tensor]] = {}
    for tensor in tensors.values():
        if not nn.parameter.is_lazy(tensor):
            lying.setdefault(_memory(tensor), []).append(tensor)
    strange = {name: value for name, value in entries.items() if id(value) not in tensors and value.numel()}
    found = {name: lying.get(_memory(value), []) for name, value in strange.items()}
    return {name: same[0] for name, same in found.items() if len(same) == 1}


def _memory(tensor: Tensor) -> Any:
    part = local(tensor)
    try:
        return part.data_ptr(), part.shape, part.stride(), part.dtype
    # some tensor subclasses have no memory of their own
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def averaged_tensors(
    module: nn.Module,
    *,
    buffers: bool = False,
    also: Callable[[NamedTensor], bool] = lambda _: False,
) -> list[NamedTensor]:
    """Return the tensors that an average follows: trainable parameters and, on request, floating-point buffers.

    Args:
        module: The module.
        buffers: Whether floating-point buffers are averaged too; integer ones never are.
        also: Which frozen parameters are averaged all the same.

    Raises:
        ValueError: If one of them is lazy and has no shape yet, is of a kind that cannot be averaged, such as a
            quantized or a sparse one, or has no place in the module's state dict.
    """
    chosen = []
    for found in named_tensors(module):
        tensor = found.tensor
        wanted = buffers if found.is_buffer else tensor.requires_grad or also(found)
        if not wanted or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"`{found.described}` must have a shape before it can be averaged, but it is a lazy parameter: run one "
                "batch through the module in its `setup` or `configure_model`."
            )
        if is_opaque(tensor):
            raise ValueError(
                f"`{found.described}` must be a dense tensor to be averaged, got {type(tensor).__name__} of layout "
                f"{str(tensor.layout).removeprefix('torch.')}. Freeze it (requires_grad=False)."
            )
        if not found.names:
            raise ValueError(
                f"`{found.described}` must have a place in the module's state_dict to be averaged, but no entry is "
                "this tensor: a hook or a `state_dict` of your own leaves it out or replaces it. Keep it there, or "
                "freeze it (requires_grad=False)."
            )
        chosen.append(found)
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
    """Replace the entries of a state dict that ``tensors`` has under their clean names; others stay.

    Raises:
        ValueError: If a tensor has no place in the state dict; nothing is replaced then.
    """
    places = {clean_name(key): key for key in state}
    lost = [shortened(name) for name in tensors if name not in places]
    if lost:
        raise ValueError(f"`state_dict` must have a place for every averaged tensor, but lacks {shorten(lost)}.")
    for name, tensor in tensors.items():
        state[places[name]] = _in_parts(tensor, state[places[name]])


def _in_parts(tensor: Tensor, entry: Any) -> Any:
    """Return a full tensor in the form of an entry of a state dict that FSDP1 has cut into copies of parts."""
    if not hasattr(entry, "local_shards"):
        return tensor
    for part in entry.local_shards():
        start, sizes = part.metadata.shard_offsets, part.metadata.shard_sizes
        part.tensor.copy_(tensor[tuple(slice(i, i + size) for i, size in zip(start, sizes, strict=True))])
    return entry


def misfits(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return what is wrong with loading ``tensors`` into ``module``, a line per kind of fault; empty when it fits.

    Args:
        module: The module.
        tensors: Clean name -> full tensor.
    """
    targets = {name: found.tensor for found in named_tensors(module) for name in found.names}
    faults: dict[str, list[str]] = {"unexpected": [], "misshapen": [], "not of plain numbers": []}
    for name, tensor in tensors.items():
        target = targets.get(name)
        if target is None:
            faults["unexpected"].append(printable(shortened(name)))
        elif (shape := full_shape(target)) != tensor.shape:
            faults["misshapen"].append(f"{name} {tuple(tensor.shape)} for {tuple(shape)}")
        elif not can_be_copied(tensor, into=target):
            faults["not of plain numbers"].append(f"{name} {tensor.dtype} {tensor.layout} on {tensor.device}")
    return [f"{kind}: {shorten(names)}" for kind, names in faults.items() if names]


def can_be_copied(tensor: Tensor, *, into: Tensor) -> bool:
    """Return whether a tensor out of a file has elements that can be written into another of its shape.

    A sparse tensor cannot, nor can one without its elements, nor complex numbers into real ones.

    Example:
        >>> weight = torch.zeros(2)
        >>> can_be_copied(torch.ones(2), into=weight), can_be_copied(torch.ones(2).to_sparse(), into=weight)
        (True, False)
    """
    whole = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
    return whole and (into.is_complex() or not tensor.is_complex())


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
    with torch.no_grad():
        for found in named_tensors(module):
            source = next((tensors[name] for name in found.names if name in tensors), None)
            if source is not None:
                target = local(found.tensor)
                target.copy_(scatter(source.to(target.device), found.tensor))
