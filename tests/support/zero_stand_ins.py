"""What stands for DeepSpeed's engine and its ZeRO optimizers in one process: the attributes that the package reads.

tests/deepspeed looks each of them up in the real ones.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy


class Engine(torch.nn.Module):
    """An engine whose optimizer is one of those below."""

    def __init__(self, optimizer, divisor=1):
        super().__init__()
        self.optimizer = optimizer
        self.global_steps = self.skipped_steps = 0
        self.divisor = divisor
        self.ends = None

    def gradient_accumulation_steps(self):
        return self.divisor

    def set_gradient_accumulation_boundary(self, ends):
        self.ends = ends

    def is_gradient_accumulation_boundary(self):
        return self.ends

    def step(self, gradient=None):
        """Move the masters, or skip when there is no gradient."""
        self.global_steps += 1
        if gradient is None:
            self.skipped_steps += 1
            return
        self.optimizer.flat.add_(gradient)
        self.optimizer.write_out()


class Optimizer12:
    """ZeRO 1 or 2 on a rank that holds elements ``begin`` to ``end`` of all parameters, one after another."""

    cpu_offload = False

    def __init__(self, module, begin, end):
        self.averaged_gradients = {0: [torch.ones(end - begin)]}
        self.flat = torch.cat([p.detach().float().reshape(-1) for p in module.parameters() if p.requires_grad])[
            begin:end
        ]
        self.published, at = 0, 0
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        for parameter in self.parameters:
            first, last = max(begin, at), min(end, at + parameter.numel())
            parameter._hp_mapping = None
            if first < last:
                parameter._hp_mapping = SimpleNamespace(
                    lp_fragment_address=SimpleNamespace(start=first - at, numel=last - first),
                    hp_fragment=self.flat[first - begin : last - begin],
                )
            at += parameter.numel()

    def write_out(self):
        for parameter in self.parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                start = mapping.lp_fragment_address.start
                values = mapping.hp_fragment
                parameter.data.view(-1)[start : start + values.numel()] = values.to(parameter.dtype)

    def update_lp_params(self):
        self.published += 1
        self.write_out()


class Optimizer3:
    """ZeRO 3 on rank ``rank`` of ``ranks``: every parameter is cut into equal parts, the last one filled up."""

    offload_optimizer = False

    def __init__(self, module, rank, ranks):
        self.averaged_gradients = {0: []}
        self.fp16_groups = [[p for p in module.parameters() if p.requires_grad]]
        self.persistent_parameters = []
        self.grad_position, self.calls, parts = {}, [], []
        at = 0
        for parameter in self.fp16_groups[0]:
            size = -(-parameter.numel() // ranks)
            whole = torch.zeros(size * ranks, dtype=parameter.dtype)
            whole[: parameter.numel()] = parameter.detach().reshape(-1)
            parameter.ds_id, parameter.ds_shape, parameter.ds_numel = id(parameter), parameter.shape, parameter.numel()
            parameter.ds_tensor = whole[rank * size : (rank + 1) * size].clone()
            parameter.ds_process_group = rank
            parameter.partition_numel = lambda size=size: size
            parameter.partition = lambda: None
            parameter.data = torch.empty(0, dtype=parameter.dtype)
            self.grad_position[id(parameter)] = [0, at, size]
            parts.append(parameter.ds_tensor.float())
            at += size
        self.flat = torch.cat(parts)
        self.fp32_partitioned_groups_flat = [self.flat]

    @staticmethod
    def get_param_id(parameter):
        return id(parameter)

    def write_out(self):
        for parameter in self.fp16_groups[0]:
            _, at, size = self.grad_position[id(parameter)]
            parameter.ds_tensor.copy_(self.flat[at : at + size])

    def _partition_all_parameters(self):
        self.calls.append("partition")

    def _reassign_or_swap_out_partitioned_parameters(self, number):
        self.calls.append(f"write {number}")
        self.write_out()

    def invalidate_secondary_tensor(self):
        self.calls.append("invalidate")


def strategy_of(engine, **attributes):
    """Return what has the engine, of a class that is known by its name."""
    kind = type("Mine", (type("DeepSpeedStrategy", (), {}),), attributes)
    strategy = kind()
    strategy.model = engine
    return strategy


class OneRank(type("DeepSpeedStrategy", (SingleDeviceStrategy,), {})):
    """A run on one process: plain gradient descent of the masters, and directories as DeepSpeed lays them out."""

    config = {"zero_optimization": {"stage": 2}}  # noqa: RUF012  # as in the strategy that it stands for
    handles_gradient_accumulation = True
    restore_checkpoint_after_setup = True
    lightning_restore_optimizer = False
    exclude_frozen_parameters = False
    engine = None

    @property
    def model(self):
        return self.engine or self.lightning_module

    @model.setter
    def model(self, new):
        pass

    def setup(self, trainer):
        super().setup(trainer)
        if trainer.state.fn == "fit":
            self.engine = self._new_engine()

    def _new_engine(self):
        module = self.lightning_module
        return Engine(Optimizer12(module, 0, sum(each.numel() for each in module.parameters() if each.requires_grad)))

    def training_step(self, *args):
        return self.lightning_module.training_step(*args)

    def validation_step(self, *args):
        return self.lightning_module.validation_step(*args)

    def optimizer_step(self, optimizer, closure, model=None, **kwargs):
        loss = closure()
        gradient = torch.cat([each.grad.float().reshape(-1) for each in self.engine.optimizer.parameters])
        self.engine.step(-optimizer.param_groups[0]["lr"] * gradient)
        return loss

    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        folder = Path(filepath) / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        own = {"global_steps": self.engine.global_steps, "masters": self.engine.optimizer.flat}
        rest = {name: value for name, value in checkpoint.items() if name not in {"state_dict", "optimizer_states"}}
        torch.save({**own, "rest": rest}, folder / "mp_rank_00_model_states.pt")
        (folder.parent / "latest").write_text("checkpoint")

    def load_checkpoint(self, checkpoint_path, weights_only=None):
        if Path(checkpoint_path).is_file():
            return torch.load(checkpoint_path, weights_only=True)
        found = torch.load(Path(checkpoint_path) / "checkpoint" / "mp_rank_00_model_states.pt")
        engine = self.engine or self._new_engine()
        engine.global_steps = found["global_steps"]
        engine.optimizer.flat.copy_(found["masters"])
        engine.optimizer.write_out()
        return found["rest"]

    def load_model_state_dict(self, checkpoint, strict=True):
        """Nothing is left to be done."""
