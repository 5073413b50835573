"""Ready-made torch schedulers: :class:`ScheduleLR` along the schedules that are asked for most."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_plugins.core.validation import real_number, whole_number
from lightning_plugins.schedules.families import Noam
from lightning_plugins.schedules.scheduler import ScheduleLR
from lightning_plugins.schedules.warmup import WarmupCosine


class WarmupCosineLR(ScheduleLR):
    """:class:`ScheduleLR` along :class:`~lightning_plugins.WarmupCosine`.

    Args:
        optimizer: The optimizer; its rates are the peaks.
        warmup_steps: Length of the linear warm-up, in optimizer steps, at least 0.
        total_steps: Length of the whole schedule, in optimizer steps, at least ``warmup_steps + hold_steps``.
        hold_steps: Length of the plateau after the warm-up, in optimizer steps, at least 0.
        start_factor: Factor of the first step, at least 0.
        end_factor: Factor after the decay, at least 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> import torch
        >>> from lightning_plugins import WarmupCosineLR
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> WarmupCosineLR(optimizer, warmup_steps=10, total_steps=100, start_factor=0.1).get_last_lr()
        [0.010000000000000002]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        total_steps: int,
        hold_steps: int = 0,
        start_factor: float = 0.0,
        end_factor: float = 0.0,
    ) -> None:
        warmup_steps = whole_number("warmup_steps", warmup_steps, unit="steps")
        hold_steps = whole_number("hold_steps", hold_steps, unit="steps")
        # said here in this class's words
        least = warmup_steps + hold_steps
        total_steps = whole_number("total_steps", total_steps, at_least=least, unit="steps (warm-up and hold)")
        start_factor = real_number("start_factor", start_factor, at_least=0)
        end_factor = real_number("end_factor", end_factor, at_least=0)
        super().__init__(optimizer, WarmupCosine(warmup_steps, hold_steps, total_steps, start_factor, end_factor))


class NoamLR(ScheduleLR):
    """:class:`ScheduleLR` along :class:`~lightning_plugins.Noam`, with OpenNMT-tf's wrapper around it.

    lr = max(scale * model_dim^-0.5 * min(n^-0.5, n * warmup_steps^-1.5), min_lr) with
    n = max(t - start_step, 0) // step_duration + 1; the optimizer's rate is the scale.

    Args:
        optimizer: The optimizer; its rate is the scale, 2 in OpenNMT's default Transformer.
        model_dim: Width of the model, at least 1.
        warmup_steps: Length of the linear part, in optimizer steps (times ``step_duration``), at least 0.
        start_step: Optimizer steps for which the first value holds, at least 0.
        step_duration: Optimizer steps for which every value holds, at least 1.
        min_lr: Absolute rate below which none falls, at least 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> import torch
        >>> from lightning_plugins import NoamLR
        >>> optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        >>> NoamLR(optimizer, model_dim=4, warmup_steps=8000, min_lr=1e-4).get_last_lr()
        [0.0001]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model_dim: int,
        warmup_steps: int,
        *,
        start_step: int = 0,
        step_duration: int = 1,
        min_lr: float = 0.0,
    ) -> None:
        warmup_steps = whole_number("warmup_steps", warmup_steps, unit="steps")
        start_step = whole_number("start_step", start_step, unit="steps")
        step_duration = whole_number("step_duration", step_duration, at_least=1, unit="steps")
        schedule = Noam(model_dim, warmup_steps).hold_every(step_duration).delay(start_step)
        super().__init__(optimizer, schedule, min_lr=min_lr)
