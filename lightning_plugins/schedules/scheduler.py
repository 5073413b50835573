"""torch learning-rate schedulers that follow a schedule; usable in any loop and in ``configure_optimizers``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_plugins.core.step_clock import StepClock, StepHooks
from lightning_plugins.core.user_warning import warn
from lightning_plugins.core.validation import (
    a_list,
    check_state_version,
    one_of,
    real_number,
    shown,
    whole_number,
)
from lightning_plugins.schedules.schedule import Schedule
from lightning_plugins.schedules.scheduler_arguments import (
    CLOCKS,
    GroupSchedules,
    check_base_lr,
    check_closed,
    check_group,
    check_parameter,
    first_of,
    identity,
    is_of,
    lr_scale,
    named_groups,
)

_VERSION = 1


class ScheduleLR(LRScheduler):
    """Sets every group's rate to max(base * schedule(t) * lr_scale, min_lr), in closed form, before step t uses it.

    Call :meth:`step` once after every ``optimizer.step()``. In Lightning's ``configure_optimizers`` that means
    ``{"scheduler": scheduler, "interval": "step"}``: Lightning's default interval is the epoch, about which this class
    warns once. The state is the position alone, so a run that is resumed with a longer schedule follows the new curve
    at once.

    A rate that was written elsewhere since the last step (by hand, by a finetuning callback, with a group that was
    added) is taken at its word: it is that group's rate at this step, and its base rate from there on is rate /
    (schedule(t) * lr_scale), or the rate itself where that is 0. ``lr_scale`` is a group's own entry of that name, as
    timm makes them, 1 where there is none.

    Args:
        optimizer: The optimizer. Each parameter group keeps its own base rate: its rate at construction, or its
            ``initial_lr`` where an earlier scheduler left one.
        schedule: Factor by step, every length known (see :meth:`Schedule.resolve`); or a mapping from a group's name
            or index to one. Groups that are not named keep what they have.
        base_lr: Absolute base rate for all groups, or one for each, above 0; ``None``: a group's own.
        min_lr: Absolute rate below which no group falls, at least 0; it lifts the warm-up too.
        parameter: The group's entry to set: ``"lr"``, ``"weight_decay"``, ``"momentum"``, ``"betas"`` (the first), ...
            Where it is 0 in a group, it stays 0. A tensor is filled in place, so that compiled optimizers are not
            compiled again.
        clock: What a position counts. ``"attempted"``: calls of :meth:`step`. ``"applied"``: steps that changed the
            weights, so the schedule waits while a gradient scaler skips; it may then not reach its end in the planned
            number of steps. ``"time"``: no steps; :meth:`refresh` says where the schedule stands.

    Attributes:
        schedule: May be replaced during the run; the next :meth:`step` or :meth:`seek` follows the new one.
        scale: Multiplies the schedule, 1 at first.

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
        schedule: Schedule | GroupSchedules,
        *,
        base_lr: float | Sequence[float | None] | None = None,
        min_lr: float = 0.0,
        parameter: str = "lr",
        clock: Literal["attempted", "applied", "time"] = "attempted",
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` must be a torch optimizer, got {shown(optimizer)}.")
        self.schedule = check_closed(schedule, optimizer.param_groups)
        self._by_group = isinstance(self.schedule, dict)
        self.scale = 1.0
        self.min_lr = real_number("min_lr", min_lr, at_least=0)
        self.parameter = check_parameter(parameter)
        self.clock = one_of("clock", clock, CLOCKS)
        self._base_name = f"initial_{parameter}"
        self._given_base = check_base_lr(base_lr)
        self._own_base: set[int] = set()  # groups whose base rate is not the argument's any more
        self._factors: list[float | None] = []  # of the rates that were last written
        self._last_lr: list[Any] = []
        self._groups: list[dict[str, Any]] = []
        self._filled: dict[int, tuple[Tensor, int]] = {}  # rates that are tensors, and their versions
        self._origin = 0  # position at which the clock of applied steps read 0
        self._attempted = self._attempted_before = 0
        self._warned = False
        self._running = True  # a step may be under way
        self._every_step = False
        self.expected = False  # whether a step was announced, see `follow`
        self.held = False  # by a callback: then `step` does nothing, and another scheduler's state is left alone
        self.restored: bool | None = None  # whether a state was loaded; False: it was another scheduler's
        self.lrs: list[float | tuple[float, ...]] | None = None  # where to note the rate of every step
        for group in optimizer.param_groups:
            check_group(group, self.parameter)
        self._set_base_rates(optimizer)
        self.step_clock = StepClock(optimizer) if clock == "applied" else None
        self._hooks = StepHooks(optimizer, self._before_step, self._after_step)
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
        if self.held:
            return
        self._step_count += 1
        self._update_lr(epoch)

    def seek(self, position: int) -> None:
        """Set the position and write the rates of that step, from the groups' base rates."""
        position = whole_number("position", position, unit="steps")
        self._origin = position - (0 if self.step_clock is None else self.step_clock.applied)
        self._attempted_before = self._attempted
        self._set_base_rates(self.optimizer)
        self._accept_all()
        self._write(position)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rates of the current position, one for each group."""
        rates: list[float | Tensor] = []
        for index, group in enumerate(self.optimizer.param_groups):
            factor = self._factor_of(index, group, int(self.last_epoch))
            if factor is None or self._base_name not in group:
                rates.append(float(first_of(group[self.parameter])))
            else:
                rates.append(self._rate(group, factor))
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Return the position; everything else is in the arguments or in the optimizer's own state."""
        own = {"own_base": sorted(self._own_base)} if self._own_base else {}
        return {**identity(self.parameter, self.clock), "version": _VERSION, "position": self.last_epoch, **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the saved position and write the rates there, from the optimizer's restored base rates.

        Load the optimizer's state first. Base rates are then the saved ones unless ``base_lr`` was given; groups that
        had brought their own rate keep it.

        Raises:
            TypeError: If a value is of the wrong type; nothing is changed then.
            ValueError: If one is out of range, or the state is another scheduler's or a later release's.
        """
        if not is_of(state_dict, self.parameter, self.clock):
            if self.held:
                self.restored = False
                return
            raise ValueError(
                "`state_dict` must come from a ScheduleLR, got the state of another scheduler "
                f"({', '.join(sorted(map(str, state_dict)))}); leave it out and `seek` the position instead."
            )
        state = check_state_version("ScheduleLR", state_dict, _VERSION)
        position = whole_number("position", state.get("position"), unit="steps")
        own = {whole_number("own_base", index) for index in a_list("own_base", state.get("own_base", []))}
        self._own_base |= own
        self._set_base_rates(self.optimizer, position)
        self.seek(position)
        self.restored = True

    def close(self) -> None:
        """Take the hooks off the optimizer; the rates stay as they are."""
        self._hooks.remove()
        if self.step_clock is not None:
            self.step_clock.close()

    # -- for a callback, which holds one for each optimizer

    def named_groups(self) -> set[int]:
        """Return the indexes of the groups that this drives."""
        return named_groups(self.schedule, self.optimizer.param_groups)

    def follow(self, *, every_step: bool) -> None:
        """Move with the optimizer's own steps from here on.

        Args:
            every_step: Whether with every one. Otherwise only with those that ``expected`` announces: a search for a
                rate, or a state that is loaded, takes steps of its own.
        """
        self._every_step, self.expected = every_step, False

    def expect(self) -> None:
        """Announce a step; the one before, if it did not come, was skipped by a gradient scaler."""
        if self.expected:
            self._move()
        self.expected = True

    def skip_to(self, position: int) -> None:
        """Go to a position that no hook told of."""
        self.expected = False
        self._record()
        self._write(position)

    def refresh(self, position: int | None = None) -> None:
        """Write the rates again, of another position if one is given: the schedule or the scale has changed."""
        self._write(self.position if position is None else position)

    def rebase(self) -> None:
        """Take rates that were written elsewhere for base rates, as before a run's first step."""
        for index, group in enumerate(self.optimizer.param_groups):
            if self._given_base is None and self._is_foreign(index, group):
                group[self._base_name] = float(first_of(group[self.parameter]))

    # -- called by torch

    def _initial_step(self) -> None:
        self._step_count = 1
        self._accept_all()
        self._write(0)

    def _update_lr(self, epoch: int | None = None) -> None:
        """Move on or, as torch's ``SequentialLR`` asks for with an epoch of 0, go there."""
        if epoch is not None:
            self.seek(epoch)
            return
        self._warn_if_epochwise()
        self._write(self._next())

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._running = True

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._running:
            return  # an optimizer whose `step` calls its parent's fires every hook twice for one step
        self._running = False
        self._attempted += 1
        if self.expected or self._every_step:
            self.expected = False
            self._move()

    # -- rates

    def _move(self) -> None:
        """Note the rates of the step that is over, and write those of the next."""
        self._record()
        self._write(self._next())

    def _next(self) -> int:
        if self.clock == "time":
            return self.position
        return self.position + 1 if self.step_clock is None else self._origin + self.step_clock.applied

    def _write(self, position: int) -> None:
        """Take over what was written elsewhere, then write the rates of ``position``."""
        groups, factors, rates = self.optimizer.param_groups, [], []
        shared = None if self._by_group else self.schedule._factor(position) * self.scale
        for index, group in enumerate(groups):
            factor = self._factor_of(index, group, position) if shared is None else shared
            factors.append(factor)
            if factor is None:  # a group that has no schedule keeps what it has
                rates.append(float(first_of(group[self.parameter])))
                continue
            if self._is_foreign(index, group):
                self._take_over(index, group)
            rates.append(self._rate(group, factor))
            if type(group[self.parameter]) is float:
                group[self.parameter] = rates[-1]
            else:
                self._put(index, group, rates[-1])
        self.last_epoch, self._factors, self._last_lr, self._groups = position, factors, rates, list(groups)

    def _rate(self, group: dict[str, Any], factor: float) -> float:
        base: float = group[self._base_name]
        rate = base * factor
        if "lr_scale" in group:
            rate *= lr_scale(group, self.parameter)
        return max(rate, self.min_lr) if base or self.parameter == "lr" else rate

    def _put(self, index: int, group: dict[str, Any], rate: float) -> None:
        """Write a rate in place of a number, into a tensor or into the first place of a tuple."""
        current = group[self.parameter]
        first = first_of(current)
        if isinstance(first, Tensor):
            first.fill_(rate)
            self._filled[index] = first, first._version
        else:
            group[self.parameter] = (rate, *current[1:]) if isinstance(current, (tuple, list)) else rate

    def _factor_of(self, index: int, group: dict[str, Any], position: int) -> float | None:
        """Return a group's factor, ``None`` where the group has no schedule."""
        schedule = self.schedule
        if self._by_group:
            schedule = schedule.get(group.get("name"), schedule.get(index))
        return None if schedule is None else schedule._factor(position) * self.scale

    def _is_foreign(self, index: int, group: dict[str, Any]) -> bool:
        """Return whether a group's rate is not the one that was written last."""
        if index >= len(self._last_lr):
            return True
        current = group[self.parameter]
        if type(current) is not float:
            current = first_of(current)
        if isinstance(current, Tensor):  # its version tells without waiting for a device
            tensor, version = self._filled.get(index, (None, 0))
            return tensor is not current or version != current._version
        return bool(current != self._last_lr[index])

    def _take_over(self, index: int, group: dict[str, Any]) -> None:
        """Let a rate that was written elsewhere be the group's rate at this step."""
        if index < len(self._groups) and group is not self._groups[index] and self._base_name in group:
            return  # the optimizer has loaded a state, with its base rates
        check_group(group, self.parameter)
        known = index < len(self._factors)
        factor = self._factors[index] if known else self._factor_of(index, group, self.last_epoch)
        group[self._base_name] = self._base_of(group, (factor or 0.0) * lr_scale(group, self.parameter))
        self._own_base.add(index)

    def _base_of(self, group: dict[str, Any], factor: float) -> float:
        """Return the base rate of a group whose rate at this step is the one that it has."""
        rate = float(first_of(group[self.parameter]))
        base = rate / factor if factor else rate
        return base if math.isfinite(base) else rate

    def _accept_all(self) -> None:
        """Take what is in the groups for what was written last."""
        self._last_lr = [first_of(group[self.parameter]) for group in self.optimizer.param_groups]
        for index, rate in enumerate(self._last_lr):
            if isinstance(rate, Tensor):
                self._filled[index] = rate, rate._version

    def _record(self) -> None:
        if self.lrs is None:
            return
        groups, known = list(enumerate(self.optimizer.param_groups)), self._last_lr
        rates = [float(first_of(g[self.parameter])) if self._is_foreign(i, g) else float(known[i]) for i, g in groups]
        self.lrs.append(rates[0] if len(rates) == 1 else tuple(rates))

    def _set_base_rates(self, optimizer: Optimizer, position: int | None = None) -> None:
        """Give every group its base rate: the argument's, else the one that it has, else its rate.

        With a ``position`` the rate is one that was written there, of a group that came just before the checkpoint.
        """
        groups, given = optimizer.param_groups, self._given_base
        if isinstance(given, tuple) and len(given) != len(groups) and not self._last_lr:
            raise ValueError(f"`base_lr` must have one rate for each of the {len(groups)} groups, got {len(given)}.")
        for index, group in enumerate(groups):
            rate = given[index : index + 1] if isinstance(given, tuple) else (given,)
            factor = 1.0 if position is None else self._factor_of(index, group, position) or 0.0
            base = group.get(self._base_name)
            group[self._base_name] = self._base_of(group, factor) if base is None else float(base)
            off = self.parameter != "lr" and group[self._base_name] == 0
            if index not in self._own_base and rate and rate[0] is not None and not off:
                group[self._base_name] = rate[0]

    def _warn_if_epochwise(self) -> None:
        passed = self._attempted - self._attempted_before
        self._attempted_before = self._attempted
        if passed > 1 and not self._warned:
            self._warned = True
            warn(
                f"{passed} optimizer steps passed since the last `step()` of {type(self).__name__}, which counts "
                'optimizer steps. In Lightning return {"scheduler": scheduler, "interval": "step"}; '
                "in a loop of your own call `step()` after every `optimizer.step()`."
            )
