"""Lightning's FSDP1 strategy on CPUs, which it refuses by its exact type."""

from __future__ import annotations

import lightning.fabric.strategies.fsdp as fabric
import lightning.pytorch.strategies.fsdp as stock
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)


def _full_state_dict_context(module, world_size, rank0_only=True):
    """Lightning's own, but that tensors which are on the CPU need not be offloaded to it."""
    return FullyShardedDataParallel.state_dict_type(
        module,
        state_dict_type=StateDictType.FULL_STATE_DICT,
        state_dict_config=FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
        optim_state_dict_config=FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
    )


def double_precision():
    """A plugin that leaves float64 alone, where Lightning would make float32 of it."""
    plugin = FSDPPrecision("32-true")
    plugin._desired_input_dtype = torch.float64
    return plugin


class FSDPOnCPU(stock.FSDPStrategy):
    """A subclass: ``parts`` names the parts of the module that are wrapped by themselves."""

    def __init__(self, *args, parts=(), **kwargs):
        super().__init__(*args, **kwargs)
        self.parts = parts
        for module in (stock, fabric):
            module._get_full_state_dict_context = _full_state_dict_context

    def _setup_model(self, model):
        def wrapped(module):
            return FullyShardedDataParallel(
                module,
                device_id=torch.device("cpu"),
                sharding_strategy=self.sharding_strategy,
                mixed_precision=self.mixed_precision,
                cpu_offload=self.cpu_offload,
                **self.kwargs,
            )

        for name in self.parts:
            model.set_submodule(name, wrapped(model.get_submodule(name)))
        return wrapped(model)
