"""Ready-made torch schedulers: :class:`ScheduleLR` along the schedules that are asked for most."""

from __future__ import annotations

from typing import Any, overload

from torch.optim import Optimizer

from lightning_plugins.core.durations import Duration
from lightning_plugins.core.validation import real_number, whole_number
from lightning_plugins.schedules.families import Noam
from lightning_plugins.schedules.scheduler import ScheduleLR
from lightning_plugins.schedules.warmup import WarmupCosine


class WarmupCosineLR(ScheduleLR):
    """:class:`ScheduleLR` along :class:`~lightning_plugins.WarmupCosine`, in its words or in torch's.

    Args:
        optimizer: The optimizer; its rates are the peaks.
        warmup_steps: Length of the linear warm-up, in optimizer steps, at least 0.
        total_steps: Length of the whole schedule, in optimizer steps, at least ``warmup_steps + hold_steps``.
        hold_steps: Length of the plateau after the warm-up, in optimizer steps, at least 0.
        start_factor: Factor of the first step, at least 0.
        end_factor: Factor after the decay, at least 0.
        warmup: In place of ``warmup_steps``, as the schedule takes it: steps, or a share of ``total`` such as ``"5%"``.
        total: In place of ``total_steps``.
        hold: In place of ``hold_steps``: steps, or a share of ``total``.
        start: In place of ``start_factor``.
        end: In place of ``end_factor``.

    Raises:
        TypeError: If an argument is of the wrong type, missing, or given by both of its words.
        ValueError: If one is out of range.

    Example:
        >>> import torch
        >>> from lightning_plugins import WarmupCosineLR
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> WarmupCosineLR(optimizer, warmup_steps=10, total_steps=100, start_factor=0.1).get_last_lr()
        [0.010000000000000002]
        >>> WarmupCosineLR(optimizer, warmup="10%", total=100, start=0.5).get_last_lr()
        [0.05]
    """

    @overload
    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        total_steps: int,
        hold_steps: int = 0,
        start_factor: float = 0.0,
        end_factor: float = 0.0,
    ) -> None: ...

    @overload
    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup: Duration,
        total: int,
        hold: Duration = 0,
        start: float = 0.0,
        end: float = 0.0,
    ) -> None: ...

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: Any = None,
        total_steps: Any = None,
        hold_steps: Any = 0,
        start_factor: Any = 0.0,
        end_factor: Any = 0.0,
        *,
        warmup: Any = None,
        total: Any = None,
        hold: Any = None,
        start: Any = None,
        end: Any = None,
    ) -> None:
        # lengths by torch's words are steps, by ours any duration; errors name the word that was used
        lengths = {}
        for word, value, other, steps in (
            ("warmup", warmup, "warmup_steps", warmup_steps),
            ("hold", hold, "hold_steps", hold_steps),
        ):
            used, length = _given(word, value, other, steps, default=0 if word == "hold" else None)
            shares = used == word and isinstance(length, (float, str))
            lengths[word] = length if shares else whole_number(used, length, unit="steps")
        least = sum(length for length in lengths.values() if isinstance(length, int))
        used, length = _given("total", total, "total_steps", total_steps)
        steps_in_all = whole_number(used, length, at_least=least, unit="steps (warm-up and hold)")
        first, last = (
            real_number(*_given(word, value, f"{word}_factor", factor, default=0.0), at_least=0)
            for word, value, factor in (("start", start, start_factor), ("end", end, end_factor))
        )
        schedule = WarmupCosine(lengths["warmup"], lengths["hold"], steps_in_all, first, last)
        super().__init__(optimizer, schedule.resolve(steps_in_all))


class NoamLR(ScheduleLR):
    """:class:`ScheduleLR` along :class:`~lightning_plugins.Noam`, with OpenNMT-tf's wrapper around it.

    lr = max(scale * model_dim^-0.5 * min(n^-0.5, n * warmup_steps^-1.5), min_lr) with
    n = max(t - start_step, 0) // step_duration + 1; the optimizer's rate is the scale.

    Args:
        optimizer: The optimizer; its rate is the scale, 2 in OpenNMT's default Transformer.
        model_dim: Width of the model, at least 1.
        warmup_steps: Length of the linear part, in optimizer steps (times ``step_duration``), at least 0.
        warmup: In place of ``warmup_steps``, the word of :class:`~lightning_plugins.Noam`.
        start_step: Optimizer steps for which the first value holds, at least 0.
        step_duration: Optimizer steps for which every value holds, at least 1.
        min_lr: Absolute rate below which none falls, at least 0.

    Raises:
        TypeError: If an argument is of the wrong type, missing, or given by both of its words.
        ValueError: If one is out of range.

    Example:
        >>> import torch
        >>> from lightning_plugins import NoamLR
        >>> optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        >>> NoamLR(optimizer, model_dim=4, warmup_steps=8000, min_lr=1e-4).get_last_lr()
        [0.0001]
    """

    @overload
    def __init__(
        self,
        optimizer: Optimizer,
        model_dim: int,
        warmup_steps: int,
        *,
        start_step: int = 0,
        step_duration: int = 1,
        min_lr: float = 0.0,
    ) -> None: ...

    @overload
    def __init__(
        self,
        optimizer: Optimizer,
        model_dim: int,
        *,
        warmup: int,
        start_step: int = 0,
        step_duration: int = 1,
        min_lr: float = 0.0,
    ) -> None: ...

    def __init__(
        self,
        optimizer: Optimizer,
        model_dim: int,
        warmup_steps: Any = None,
        *,
        start_step: int = 0,
        step_duration: int = 1,
        min_lr: float = 0.0,
        warmup: Any = None,
    ) -> None:
        length = whole_number(*_given("warmup", warmup, "warmup_steps", warmup_steps), unit="steps")
        start_step = whole_number("start_step", start_step, unit="steps")
        step_duration = whole_number("step_duration", step_duration, at_least=1, unit="steps")
        schedule = Noam(model_dim, length).hold_every(step_duration).delay(start_step)
        super().__init__(optimizer, schedule, min_lr=min_lr)


def _given(word: str, value: Any, other: str, other_value: Any, default: Any = None) -> tuple[str, Any]:
    """Return which of an argument's two words was used, and its value."""
    if value is None:
        if other_value is None:
            raise TypeError(f"`{other}` must be given.")
        return other, other_value
    if other_value != default:
        raise TypeError(f"`{word}` and `{other}` are two words for one argument. Give one of them.")
    return word, value
