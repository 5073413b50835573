"""Counts the steps of one optimizer: those that were attempted and those that changed the weights.

Lightning's ``global_step`` counts attempts: also the steps that a gradient scaler skipped, those without any gradient
(``training_step`` returned ``None``) and, in manual optimization, those of every optimizer together. What follows the
weights must count *applied* steps. A step is applied when the optimizer's post-step hook fired, some parameter had a
gradient, and the scaler found no infinity: other optimizers are simply not called then, but a fused one is, and skips
inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_plugins.core.patching import Patches


class StepHooks:
    """Calls functions before and after every step of an optimizer, as torch's step hooks do.

    Optimizers that fire no hooks, such as wrappers without ``Optimizer.__init__``, have their ``step`` wrapped instead.

    Args:
        optimizer: The optimizer. :meth:`remove` leaves it as it was.
        before: Called with the optimizer and the arguments of ``step``, as a tuple and as a dict.
        after: Likewise.
    """

    def __init__(self, optimizer: Optimizer, before: Callable[..., None], after: Callable[..., None]) -> None:
        self._optimizer, self._before, self._after = optimizer, before, after
        self._handles: tuple[Any, ...] = ()
        self._patches = Patches()
        try:
            # torch marks the `step` of a class that fires hooks when the first instance is made
            if getattr(type(optimizer).step, "hooked", False):
                self._handles = (optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after))
        except AttributeError:
            pass
        if not self._handles:
            self._patches.wrap(optimizer, "step", self._watched_step)

    def remove(self) -> None:
        """Call them no more."""
        for handle in self._handles:
            handle.remove()
        self._patches.undo()

    def _watched_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._before(self._optimizer, args, kwargs)
        result = original(*args, **kwargs)
        self._after(self._optimizer, args, kwargs)
        return result


class StepClock:
    """Counts the attempted and the applied steps of one optimizer through its :class:`StepHooks`.

    Args:
        optimizer: The optimizer to listen to. :meth:`close` takes the hooks off again.
        before: Called before every step.

    Attributes:
        attempted: Steps that the optimizer was called for. A step that a scaler skipped calls no hook.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> clock = StepClock(optimizer)
        >>> optimizer.step()  # no gradient: the weights stay
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        >>> clock.attempted, clock.applied
        (2, 1)
    """

    def __init__(self, optimizer: Optimizer, before: Callable[[], None] | None = None) -> None:
        self.attempted = 0
        self._before = before
        self._called_with_gradient = 0
        # stays on the device until it is asked for
        self._skipped_inside: Tensor | None = None
        # a step may be under way
        self._running = True
        self._hooks = StepHooks(optimizer, self._before_step, self._after_step)

    @property
    def applied(self) -> int:
        """Steps that changed the weights; reads one number from the device if a fused optimizer ran under a scaler."""
        if self._skipped_inside is not None:
            self._called_with_gradient -= int(self._skipped_inside.item())
            self._skipped_inside = None
        return self._called_with_gradient

    def count_unannounced(self, steps: int) -> None:
        """Count steps that changed the weights and called no hook."""
        self._called_with_gradient += steps

    def restore(self, attempted: int, applied: int) -> None:
        """Set both counters, as after a resume."""
        self.attempted = attempted
        self._called_with_gradient = applied
        self._skipped_inside = None

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        self._hooks.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._running = True
        if self._before is not None:
            self._before()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._running:
            # an optimizer whose `step` calls its parent's fires every hook twice for one step
            return
        self._running = False
        self.attempted += 1
        if has_gradient(optimizer):
            self._count_applied(optimizer)

    def _count_applied(self, optimizer: Optimizer) -> None:
        self._called_with_gradient += 1
        # set by GradScaler for the call of a fused optimizer
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            skipped = (found_inf.detach() > 0).to(torch.int64)
            self._skipped_inside = skipped if self._skipped_inside is None else self._skipped_inside + skipped


class RunClock:
    """Counts the applied steps of a Trainer's first optimizer: of another one, too, once the Trainer has set that up.

    Steps of which the Trainer knows and the optimizer told nothing are counted if they wrote into its parameters. A
    gradient scaler that skips a step does not call the optimizer, and neither does a module whose own
    ``optimizer_step`` leaves one out: then nothing was written.

    Args:
        trainer: The Trainer, when training starts.
        applied: Steps that were applied before.
        between: Called between two steps of one batch, when the Trainer has one optimizer.

    Attributes:
        news: What was noticed, a line each; emptied by the reader.
    """

    def __init__(self, trainer: Any, applied: int, between: Callable[[], None] | None = None) -> None:
        self.news: list[str] = []
        self._trainer = trainer
        self._between = between if len(trainer.optimizers) == 1 else None
        # the Trainer's and the clock's count, as last compared
        self._steps: tuple[int, int] | None = None
        self._silent = False
        self._optimizer: Any = None
        self._listen(applied)

    @property
    def applied(self) -> int:
        """Steps that changed the weights; see :class:`StepClock`."""
        return self._clock.applied

    def restore(self, applied: int) -> None:
        """Set the count, as after weights were restored; the Trainer's own may have been, too."""
        self._clock.restore(attempted=applied, applied=applied)
        self._steps = None

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        self._clock.close()

    def start_batch(self) -> None:
        """Look for another optimizer; called before every batch."""
        if self._optimizer_of_trainer() is not self._optimizer:
            self._listen_to_another()
        if self._steps is None:
            self._steps = self._trainer.global_step, self._clock.attempted

    def end_batch(self) -> None:
        """Look for steps that were not announced; called after every batch, before :attr:`applied` is read."""
        before, clock = self._steps, self._clock
        if before is None:
            return
        self._steps = now = self._trainer.global_step, clock.attempted
        if now[0] != before[0] and now[1] == before[1]:
            self._look_for_silent_steps(now[0] - before[0])

    def _optimizer_of_trainer(self) -> Any:
        optimizers = self._trainer.optimizers
        return getattr(optimizers[0], "optimizer", optimizers[0]) if optimizers else self._optimizer

    def _listen(self, applied: int) -> None:
        self._optimizer = self._optimizer_of_trainer()
        self._clock = StepClock(self._optimizer, None if self._between is None else self._before_step)
        self.restore(applied)
        self._writes = self._clock.attempted, _writes_into(self._optimizer)

    def _before_step(self) -> None:
        if self._steps is not None and self._between is not None and self._clock.attempted != self._steps[1]:
            self._between()

    def _listen_to_another(self) -> None:
        applied = self._clock.applied
        self._clock.close()
        self._listen(applied)
        self.news.append("another optimizer was set up; its steps are counted from here on.")

    def _look_for_silent_steps(self, steps: int) -> None:
        scaled = getattr(self._trainer.precision_plugin, "scaler", None) is not None
        if scaled or len(self._trainer.optimizers) > 1:
            return
        # in this batch: the next one begins by listening to it
        exchanged = self._optimizer_of_trainer() is not self._optimizer
        seen, now = self._writes, (self._clock.attempted, _writes_into(self._optimizer))
        # the count of writes tells something only if no announced step came since it was taken
        if exchanged or (seen[0] == now[0] and seen[1] != now[1]):
            if not (self._silent or exchanged):
                self._silent = True
                kind = type(self._optimizer).__name__
                self.news.append(f"{kind} does not announce its steps; those that the Trainer counts are taken.")
            self._clock.count_unannounced(steps)
        self._writes = now


def _writes_into(optimizer: Any) -> int:
    """Return how often the parameters of ``optimizer`` were written to, as they count it themselves."""
    return sum(parameter._version for group in optimizer.param_groups for parameter in group["params"])


def has_gradient(optimizer: Optimizer) -> bool:
    """Return whether any parameter of ``optimizer`` has a gradient; stops at the first.

    A rank on which FSDP1 has left no element of what is trained never has one, and is taken to step with the others.
    """
    # loops: a generator is entered anew for every parameter
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                return True
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return bool(trained) and not any(parameter.numel() for parameter in trained)
