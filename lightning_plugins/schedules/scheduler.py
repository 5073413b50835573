"""torch learning-rate schedulers that follow a schedule; usable in any loop and in ``configure_optimizers``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_plugins.core.step_clock import StepClock
from lightning_plugins.core.validation import LightningPluginsWarning, one_of, real_number, shown, whole_number
from lightning_plugins.schedules.families import Noam
from lightning_plugins.schedules.schedule import Schedule
from lightning_plugins.schedules.warmup import WarmupCosine

_FORMAT = "lightning_plugins.ScheduleLR"
_VERSION = 1


class ScheduleLR(LRScheduler):
    """Sets every group's rate to max(base * schedule(t), min_lr), in closed form, before step t uses it.

    Call :meth:`step` once after every ``optimizer.step()``. In Lightning's ``configure_optimizers`` that means
    ``{"scheduler": scheduler, "interval": "step"}``: Lightning's default interval is the epoch, about which this class
    warns once. The state is the position alone, so a run that is resumed with a longer schedule follows the new curve
    at once.

    Args:
        optimizer: The optimizer. Each parameter group keeps its own base rate: its rate at construction, or its
            ``initial_lr`` where an earlier scheduler left one. Groups added later take part from their first step.
        schedule: Factor by step, every length known (see :meth:`Schedule.resolve`).
        base_lr: Absolute base rate for all groups, or one for each, above 0 in place of their own.
        min_lr: Absolute rate below which no group falls, at least 0; it lifts the warm-up too.
        parameter: The group's entry to set: ``"lr"``, ``"weight_decay"``, ``"momentum"``, ... A rate that is a tensor
            is filled in place, so that compiled optimizers are not compiled again.
        clock: What a position counts. ``"attempted"``: calls of :meth:`step`. ``"applied"``: steps that changed the
            weights, so the schedule waits while a gradient scaler skips; it may then not reach its end in the planned
            number of steps.

    Attributes:
        schedule: May be replaced during the run; the next :meth:`step` or :meth:`seek` follows the new one.
        scale: Multiplies the schedule, 1 unless somebody changes it.

    Raises:
        TypeError: If an argument is of the wrong type, or a group's entry is no number.
        ValueError: If an argument is out of range, the schedule is open, or a group has no such entry.

    Example:
        >>> import torch
        >>> from lightning_plugins import ScheduleLR, WarmupLinear
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> scheduler = ScheduleLR(optimizer, WarmupLinear(warmup=2, total=4))
        >>> for _ in range(5):
        ...     print(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     scheduler.step()
        0.0
        0.05
        0.1
        0.05
        0.0
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        *,
        base_lr: float | Sequence[float] | None = None,
        min_lr: float = 0.0,
        parameter: str = "lr",
        clock: str = "attempted",
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` must be a torch optimizer, got {shown(optimizer)}.")
        check_schedule(schedule)
        if schedule.is_open:
            raise ValueError(
                f"`schedule` must have every length in steps, got {shown(schedule)}; call its `resolve` first."
            )
        self.schedule = schedule
        self.scale = 1.0
        self.min_lr = real_number("min_lr", min_lr, at_least=0)
        if not isinstance(parameter, str):
            raise TypeError(f"`parameter` must be the name of an entry of the groups, got {shown(parameter)}.")
        self.parameter = parameter
        self.clock = one_of("clock", clock, ("attempted", "applied"))
        self._base_lr = check_base_lr(base_lr)
        self._origin = 0  # position at which the clock read 0
        self._steps_seen = 0
        self._warned = False
        for group in optimizer.param_groups:
            self._check_group(group)
        self._set_base_rates(optimizer)
        self.step_clock = StepClock(
            optimizer, counts_applied=clock == "applied", before=self._rate_new_groups, after=self._after_step
        )
        super().__init__(optimizer)

    @property
    def position(self) -> int:
        """The step that comes next, from 0: the argument at which the schedule was last read."""
        return int(self.last_epoch)

    def step(self, epoch: int | None = None) -> None:
        """Move to the next position and write the rates; call it after every ``optimizer.step()``.

        Args:
            epoch: Sets the position instead, as in torch (where it is deprecated).
        """
        self._step_count += 1
        self._update_lr(epoch)

    def seek(self, position: int) -> None:
        """Set the position and write the rates of that step."""
        position = whole_number("position", position, unit="steps")
        self._origin = position - self._ticks()
        self._steps_seen = self.step_clock.attempted
        self._write(position)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rates of the current position, one for each group."""
        factor = self.schedule(self.last_epoch) * self.scale
        return [max(self._base(group) * factor, self.min_lr) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the position; everything else is in the arguments or in the optimizer's own state."""
        return {"format": _FORMAT, "version": _VERSION, "position": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the saved position and write the rates there, from the optimizer's restored base rates.

        Load the optimizer's state first. Base rates are then the saved ones unless ``base_lr`` was given.

        Raises:
            ValueError: If the state is another scheduler's; nothing is changed then.
        """
        if not is_own_state(state_dict):
            raise ValueError(
                "`state_dict` must come from a ScheduleLR, got the state of another scheduler "
                f"({', '.join(sorted(map(str, state_dict)))}); leave it out and `seek` the position instead."
            )
        self._set_base_rates(self.optimizer)
        self.seek(state_dict["position"])

    def close(self) -> None:
        """Take the hooks off the optimizer; the rates stay as they are."""
        self.step_clock.close()

    def _update_lr(self, epoch: int | None = None) -> None:
        """Move on or, as torch's ``SequentialLR`` asks for with an epoch of 0, go there."""
        if epoch is not None:
            self.seek(epoch)
            return
        self._warn_if_epochwise()
        self._write(self._next_position())

    def _next_position(self) -> int:
        return self._origin + self._ticks() if self.clock == "applied" else self.last_epoch + 1

    def _ticks(self) -> int:
        """Return the clock's reading; asks a device only where the applied clock is wanted."""
        return self.step_clock.applied if self.clock == "applied" else self.step_clock.attempted

    def _write(self, position: int) -> None:
        self.last_epoch = position
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            current = group[self.parameter]
            if isinstance(current, Tensor):
                current.fill_(rate)
            else:
                group[self.parameter] = rate

    def _initial_step(self) -> None:
        """Write the first rates; torch's constructor calls this."""
        self._step_count = 1
        self._write(0)

    def _base(self, group: dict[str, Any]) -> float:
        """Return a group's base rate; a group that came later has none yet and brings its own."""
        base = group.get(f"initial_{self.parameter}")
        if not isinstance(base, float):
            self._check_group(group)
            base = group[f"initial_{self.parameter}"] = float(group[self.parameter] if base is None else base)
        return base

    def _set_base_rates(self, optimizer: Optimizer) -> None:
        groups = optimizer.param_groups
        rates = self._base_lr
        if isinstance(rates, tuple) and len(rates) != len(groups):
            raise ValueError(f"`base_lr` must have one rate for each of the {len(groups)} groups, got {len(rates)}.")
        for index, group in enumerate(groups):
            if rates is not None:
                group[f"initial_{self.parameter}"] = rates[index] if isinstance(rates, tuple) else rates
            self._base(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        value = group.get(self.parameter)
        if self.parameter not in group:
            numbers = sorted(k for k, v in group.items() if isinstance(v, float) and not k.startswith("initial_"))
            raise ValueError(
                f"`parameter` must be an entry of the optimizer's groups, got {shown(self.parameter)}; "
                f"there are {', '.join(numbers)}."
            )
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise TypeError(
                f"`parameter` must name a number of the optimizer's groups, "
                f"got {shown(self.parameter)}: {shown(value)}."
            )

    def _rate_new_groups(self) -> None:
        """Before a step, give the groups that were added since the last position their rate."""
        if len(self.optimizer.param_groups) != len(self._last_lr):
            self._write(self.last_epoch)

    def _after_step(self) -> None:
        """Do nothing after a step: whoever drives the loop calls :meth:`step`."""

    def _warn_if_epochwise(self) -> None:
        passed = self.step_clock.attempted - self._steps_seen
        self._steps_seen = self.step_clock.attempted
        if passed > 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"{passed} optimizer steps passed since the last `step()` of {type(self).__name__}, which counts "
                'optimizer steps. In Lightning return {"scheduler": scheduler, "interval": "step"}; '
                "in a loop of your own call `step()` after every `optimizer.step()`.",
                LightningPluginsWarning,
                stacklevel=4,
            )


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
        least = warmup_steps + hold_steps  # said here in this class's words
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


def check_schedule(schedule: Any) -> None:
    """Raise unless ``schedule`` is one."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"`schedule` must be a Schedule such as WarmupCosine(warmup=100), got {shown(schedule)}.")


def check_base_lr(base_lr: float | Sequence[float] | None) -> float | tuple[float, ...] | None:
    """Return the base rates as floats, or raise."""
    if base_lr is None:
        return None
    if isinstance(base_lr, (list, tuple)):
        return tuple(float(real_number(f"base_lr[{i}]", rate, above=0)) for i, rate in enumerate(base_lr))
    return float(real_number("base_lr", base_lr, above=0))


def is_own_state(state_dict: dict[str, Any]) -> bool:
    """Return whether a scheduler's state was written by a :class:`ScheduleLR`."""
    return state_dict.get("format") == _FORMAT
