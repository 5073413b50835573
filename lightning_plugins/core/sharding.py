"""This rank's part of a tensor, and what all ranks hold together.

A tensor that FSDP2 or tensor parallelism spreads over processes is a DTensor; one of FSDP1 is its own local part. What
is done to every element alike, such as an average or a factor, is done to the local parts, without communication.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_plugins.core import flat_shards


def is_sharded(value: Tensor | nn.Module) -> bool:
    """Return whether a tensor, or some parameter of a module, is spread over ranks."""
    if isinstance(value, nn.Module):
        return any(map(is_sharded, value.parameters()))
    return _is_dtensor(value) or flat_shards.of(value) is not None


def _is_dtensor(value: Tensor) -> bool:
    return hasattr(value, "placements") and hasattr(value, "to_local")


def any_sharded(values: Iterable[Any]) -> bool:
    """Return whether some of ``values``, which may be anything, is a tensor that is spread over ranks."""
    return any(isinstance(value, Tensor) and is_sharded(value) for value in values)


def full_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of a tensor as all ranks hold it together."""
    flat = flat_shards.of(tensor)
    return tensor.shape if flat is None else flat.shape


def local(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` that lies on this rank, the tensor itself when it is not sharded.

    The two share memory: a write into the part is a write into the tensor.
    """
    return cast(Tensor, cast(Any, tensor).to_local()) if _is_dtensor(tensor) else tensor


def reshard(module: nn.Module) -> None:
    """Give every FSDP group of ``module`` back to its shards: a forward in eval mode may leave it gathered."""
    flat_shards.reshard(module)
    for part in module.modules():
        if hasattr(part, "reshard") and hasattr(part, "unshard"):
            cast(Any, part).reshard()


def spread(part: Tensor, like: Tensor) -> Tensor:
    """Return the tensor, spread over ranks as ``like`` is, of which ``part`` is this rank's share; no collective.

    The two share memory where ``part`` lies on the device of the ranks' mesh. Shape and stride are given explicitly:
    from uneven shards they cannot be guessed, and the ranks would wait for each other forever.
    """
    if not _is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor  # noqa: PLC0415  # absent from builds without distributed support

    sharded = cast(Any, like)
    if part.device.type != sharded.device_mesh.device_type:
        # `from_local` would move it there
        whole = torch.empty_like(sharded.detach(), dtype=part.dtype, device=part.device)
        local(whole).copy_(part)
        return whole
    return DTensor.from_local(
        part.contiguous(),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor`` spread over ranks as ``like`` is; a collective where a gradient is spread in another way."""
    if not _is_dtensor(tensor) or cast(Any, tensor).placements == cast(Any, like).placements:
        return tensor
    return cast(Tensor, cast(Any, tensor).redistribute(placements=cast(Any, like).placements))


def gather(part: Tensor, like: Tensor) -> Tensor:
    """Return the full tensor of which ``part`` is this rank's share; a collective when ``like`` is sharded."""
    if (flat := flat_shards.of(like)) is not None:
        return flat.gather(part)
    if not _is_dtensor(like):
        return part
    # weights that are offloaded to the host are gathered on the device all the same
    whole: Any = spread(part.to(cast(Any, like).device_mesh.device_type), like)
    return cast(Tensor, whole.full_tensor())


def collected(part: Tensor, like: Tensor, *, keep: bool, shares: bool) -> Tensor | None:
    """Return the tensor of which ``part`` is this rank's share, as a checkpoint takes it; ``part`` if it is the whole.

    Args:
        part: This rank's share.
        like: The tensor whose share it is.
        keep: Whether this rank wants it; if not, it only takes part in the collective, and gets nothing.
        shares: Whether it stays spread over ranks; otherwise it is gathered, a collective, on the host: a device that
            holds shards has no room for the whole.
    """
    if not is_sharded(like) or shares:
        return spread(part, like) if keep else None
    whole = gather(part.to(local(like).device), like)
    return whole.cpu() if keep else None


def scatter(full: Tensor, like: Tensor) -> Tensor:
    """Return this rank's share of ``full``, which every rank has or which is spread as ``like`` is; no collective.

    Not by ``distribute_tensor``, which sends rank 0's data to the others in torch 2.6.
    """
    if _is_dtensor(full):
        return local(full)
    if (flat := flat_shards.of(like)) is not None:
        return flat.scatter(full, like.numel())
    if not _is_dtensor(like):
        return full
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415

    mesh = cast(Any, like).device_mesh
    whole = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    # a copy: the share would keep the memory of the full tensor
    return whole.redistribute(placements=cast(Any, like).placements).to_local().clone()


def agreed(flag: int, like: Tensor) -> bool:
    """Return whether ``flag`` is not 0 on any rank that shares ``like``, a sharded tensor; a collective."""
    import torch.distributed  # noqa: PLC0415

    if not torch.distributed.is_initialized():
        return bool(flag)
    found = torch.tensor(int(flag), device=local(like).device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
    return bool(found.item())
