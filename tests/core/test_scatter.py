"""A rank's share of a tensor is what ``torch.chunk`` gives, in two processes."""

import os

import pytest
import torch

from lightning_plugins.core.sharding import scatter
from tests.support.ranks import run_ranks

CASES = {
    "even rows": ((4, 3), 0),
    "even columns": ((4, 4), 1),
    "uneven rows": ((5, 3), 0),
    "one element": ((1,), 0),
    "no elements": ((0, 3), 0),
    "the same on both": ((5, 3), None),
}


def numbered(shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def shares():
    """Return, on a rank, its share of each case, and whether it keeps the memory of the full tensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]))
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name, (shape, dim) in CASES.items():
        whole = DTensor.from_local(torch.zeros(shape), mesh, [Replicate()], run_check=False)
        like = whole.redistribute(placements=[Replicate() if dim is None else Shard(dim)])
        full = numbered(shape)
        share = scatter(full, like)
        shared = share.numel() and share.untyped_storage().data_ptr() == full.untyped_storage().data_ptr()
        found[name] = (share.tolist(), list(share.shape), bool(shared))
    torch.distributed.destroy_process_group()
    return found


@pytest.mark.slow
def test_a_share_is_the_ranks_chunk():
    for rank, found in enumerate(run_ranks(shares)):
        for name, (shape, dim) in CASES.items():
            full = numbered(shape)
            chunks = [full, full] if dim is None else [*full.chunk(2, dim), full[:0]]
            assert found[name] == [chunks[rank].tolist(), list(chunks[rank].shape), False], name
