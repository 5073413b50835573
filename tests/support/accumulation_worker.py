"""One rank of the distributed tests: runs every case and writes the gradients of its steps."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from tests.support.accumulation_cases import CASES
from tests.support.accumulation_runs import Probe, run_case


class Sharded(Probe):
    """The same network, split over the ranks by FSDP2."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    results = {}
    for name, case in CASES.items():
        for dtype in (torch.float32, torch.float64):
            results["ddp", name, dtype] = run_case(dataclasses.replace(case, dtype=dtype), rank=rank, ranks=2)
        if not case.arguments.get("carry") and case.precision is None and case.clip is None:
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            results["fsdp2", name, torch.float32] = run_case(
                case, rank=rank, ranks=2, module=Sharded(), strategy=strategy
            )
    torch.save(results, Path(folder) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
