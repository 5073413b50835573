"""This rank's part of a tensor, and what all ranks hold together.

A tensor that FSDP2 or tensor parallelism spreads over processes is a DTensor. What is done to every element alike, such
as an average or a factor, is done to the local parts, without communication.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn


def is_sharded(value: Tensor | nn.Module) -> bool:
    """Return whether a tensor, or some parameter of a module, is spread over ranks."""
    if isinstance(value, nn.Module):
        return any(map(is_sharded, value.parameters()))
    return hasattr(value, "placements") and hasattr(value, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` that lies on this rank, the tensor itself when it is not sharded.

    The two share memory: a write into the part is a write into the tensor.
    """
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor


def reshard(module: nn.Module) -> None:
    """Give every FSDP2 group of ``module`` back to its shards: a forward in eval mode may leave it gathered."""
    for part in module.modules():
        if hasattr(part, "reshard") and hasattr(part, "unshard"):
            cast(Any, part).reshard()


def gather(part: Tensor, like: Tensor) -> Tensor:
    """Return the full tensor of which ``part`` is this rank's share; a collective when ``like`` is sharded.

    Shape and stride are given explicitly: from uneven shards they cannot be guessed, and the ranks would wait for each
    other forever.
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor  # noqa: PLC0415  # absent from builds without distributed support

    sharded = cast(Any, like)
    return DTensor.from_local(
        part.contiguous(),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    ).full_tensor()


def scatter(full: Tensor, like: Tensor) -> Tensor:
    """Return this rank's share of ``full``, which every rank has; no collective.

    Not by ``distribute_tensor``, which sends rank 0's data to the others in torch 2.6.
    """
    if not is_sharded(like):
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
