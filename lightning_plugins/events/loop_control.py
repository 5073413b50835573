"""What a cancel action does to Lightning's loops, and how everything is put back.

Lightning has no way to leave a batch, a phase or an epoch: ``StopIteration`` out of a hook leaves its counters and its
schedulers in mid-step, so that a checkpoint written later resumes somewhere else. So the loops are told that the batch
at hand is the epoch's last, and methods of theirs are replaced on the instance until the next batch begins; what
follows is Lightning's own end of an epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_plugins.core.lightning import Trainer, torch_optimizers
from lightning_plugins.core.patching import Patches
from lightning_plugins.core.strategies import check_strategy


class LoopControl:
    """Cancels parts of one fit.

    Args:
        trainer: The Trainer, once its loops and its strategy are set up.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer
        self._epoch: Any = trainer.fit_loop.epoch_loop
        self._until_next_batch = Patches()
        self._until_fit_ends = Patches()
        self._unmeasured = False

    @property
    def training_is_over(self) -> bool:
        """Whether the batch at hand, or the last one, ends the epoch's training."""
        trainer = self._trainer
        stopped = trainer.should_stop and trainer.fit_loop._can_stop_early
        return bool(self._epoch._is_training_done or stopped)

    def cancel_batch(self) -> None:
        """Let the batch at hand pass without its step: it counts as a step that was attempted and changed nothing.

        Where it would have ended a window, the gradients of the window's other batches are dropped, which no rank has
        seen of the others yet: in the closure, which every way of stepping runs.
        """
        check_strategy(self._trainer, "Cancelling")
        optimization = self._epoch.automatic_optimization

        def run(_: Any, optimizer: Any, batch_idx: int, *__: Any) -> dict[str, Any]:
            zero_grad = optimization._make_zero_grad_fn(batch_idx, optimizer)

            def closure() -> None:
                if zero_grad is not None:  # the window begins here all the same
                    zero_grad()

            def last_closure() -> None:
                closure()
                self.drop_gradients()

            if self._epoch._should_accumulate():
                closure()
            else:
                optimization._optimizer_step(batch_idx, last_closure)
            return {}

        self._until_next_batch.wrap(optimization, "run", run)
        self._until_next_batch.wrap(self._epoch.manual_optimization, "run", _no_step)

    def skip_batch(self) -> None:
        """Let the batch at hand, which is the epoch's last now, pass without even an attempt at a step."""
        check_strategy(self._trainer, "Cancelling")
        if not self._epoch._should_accumulate():  # else its window goes on in the next epoch
            self.drop_gradients()
        self._until_next_batch.wrap(self._epoch, "_should_accumulate", lambda _: True)
        for optimization in (self._epoch.automatic_optimization, self._epoch.manual_optimization):
            self._until_next_batch.wrap(optimization, "run", _no_step)

    def drop_gradients(self) -> None:
        """Leave the optimizers nothing to step with."""
        check_strategy(self._trainer, "Cancelling")
        for optimizer in torch_optimizers(self._trainer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        for module in self._trainer.strategy.model.modules():
            if hasattr(module, "_get_fsdp_state"):
                _drop_unsharded_gradients(module)

    def end_epoch(self, *, validate: bool, after_batch: bool = False) -> None:
        """Make the batch at hand the epoch's last.

        Args:
            validate: Whether a validation follows, if this epoch has one.
            after_batch: Whether the batch is over already, and with it the moment in which Lightning would have
                stepped the schedulers of an epoch and taken the step of a short last window.
        """
        epoch = self._epoch
        in_window, ends_anyway = epoch._should_accumulate(), epoch._num_ready_batches_reached()
        epoch.batch_progress.is_last_batch = True
        self._unmeasured = not validate
        self._until_next_batch.wrap(
            epoch, "_should_check_val_fx", lambda *_: validate and epoch._should_check_val_epoch()
        )
        if after_batch and not ends_anyway:
            epoch.update_lr_schedulers("epoch", update_plateau_schedulers=False)
            if in_window and not epoch._should_accumulate():
                self.drop_gradients()

    def end_validation(self) -> None:
        """End the validation with the batch at hand.

        Raises:
            StopIteration: Always; Lightning then ends the validation as usual. To be called last in a batch.
        """
        loop = self._epoch.val_loop
        loop.batch_progress.increment_completed()  # what Lightning would have done next
        loop.batch_progress.is_last_batch = True
        loop._has_run = True
        raise StopIteration

    def end_fit(self) -> None:
        """Stop the fit after this epoch, even if ``min_epochs`` or ``min_steps`` ask for more."""
        self._trainer.should_stop = True
        self._until_fit_ends.replace(self._trainer.fit_loop, "min_epochs", 0)
        self._until_fit_ends.replace(self._epoch, "min_steps", None)

    def hold_plateaus(self) -> None:
        """Keep schedulers that follow a metric from taking a step in an epoch that was left before it was measured."""
        if self._unmeasured:
            self._until_next_batch.wrap(self._epoch, "update_lr_schedulers", _no_step)

    def begin_batch(self) -> None:
        """Put back what was replaced for the batch before."""
        self._unmeasured = False
        self._until_next_batch.undo()

    def release(self) -> None:
        """Put back everything."""
        self.begin_batch()
        self._until_fit_ends.undo()

    def intercept(self, name: str, wrapper: Callable[..., Any]) -> None:
        """Let the strategy's step of that name run as ``wrapper(step, *args)`` until the fit ends."""
        self._until_fit_ends.wrap(self._trainer.strategy, name, wrapper)


def _no_step(*args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ARG001  # in the place of several methods
    """Do nothing, with the result of a batch that has none."""
    return {}


def _drop_unsharded_gradients(module: Any) -> None:
    """Drop the gradients that FSDP2 keeps outside of the parameters until a window's last batch."""
    state = module._get_fsdp_state()
    one = getattr(state, "_fsdp_param_group", None)  # older versions of torch have one at most
    for group in getattr(state, "_fsdp_param_groups", [] if one is None else [one]):
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if (unsharded := getattr(parameter, "_unsharded_param", None)) is not None:
                unsharded.grad = None
