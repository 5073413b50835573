"""How a cancel action bends the course of Lightning's loops, and how everything is straightened again.

Lightning has no way to leave a batch, a phase or an epoch: ``StopIteration`` out of a hook leaves its counters and its
schedulers in mid-step, so that a checkpoint written later resumes somewhere else. So the loops are told that the batch
at hand is the epoch's last, and methods of theirs are replaced on the instance for as long as that batch lasts; what
follows is Lightning's own end of an epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_plugins.core.lightning import MisconfigurationException, Trainer, torch_optimizers

_TESTED = ("DDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy")
_ABSENT = object()


class Steering:
    """Cancels parts of one fit.

    Args:
        trainer: The Trainer, once its loops and its strategy are set up.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer
        self._epoch: Any = trainer.fit_loop.epoch_loop
        self._of_batch: list[tuple[Any, str, Any, Any]] = []  # what stands in another's place until the next batch
        self._of_fit: list[tuple[Any, str, Any, Any]] = []  # and until the fit ends
        self._unmeasured = False

    @property
    def training_is_over(self) -> bool:
        """Whether the batch at hand, or the last one, ends the epoch's training."""
        trainer = self._trainer
        stopped = trainer.should_stop and trainer.fit_loop._can_stop_early
        return bool(self._epoch._is_training_done or stopped)

    def cancel_batch(self) -> None:
        """Let the batch at hand pass without its step: it counts as a step that was attempted and changed nothing.

        Where it would have ended a window, whoever hears of the step drops the gradients of the window's other batches,
        which no rank has seen of the others yet.
        """
        self._check_strategy()
        optimization = self._epoch.automatic_optimization

        def run(optimizer: Any, batch_idx: int, _: Any) -> dict[str, Any]:
            zero_grad = optimization._make_zero_grad_fn(batch_idx, optimizer)

            def closure() -> None:
                if zero_grad is not None:  # the window begins here all the same
                    zero_grad()

            if self._epoch._should_accumulate():
                closure()
            else:
                optimization._optimizer_step(batch_idx, closure)
            return {}

        self._replace(self._of_batch, optimization, "run", run)
        self._replace(self._of_batch, self._epoch.manual_optimization, "run", _no_step)

    def skip_batch(self) -> None:
        """Let the batch at hand, which is the epoch's last now, pass without even an attempt at a step."""
        self._check_strategy()
        if not self._epoch._should_accumulate():  # else its window goes on in the next epoch
            self.drop_gradients()
        self._replace(self._of_batch, self._epoch, "_should_accumulate", lambda: True)
        for optimization in (self._epoch.automatic_optimization, self._epoch.manual_optimization):
            self._replace(self._of_batch, optimization, "run", _no_step)

    def drop_gradients(self) -> None:
        """Leave the optimizers nothing to step with."""
        self._check_strategy()
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
        self._replace(
            self._of_batch, epoch, "_should_check_val_fx", lambda _: validate and epoch._should_check_val_epoch()
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
        """Stop the fit after this epoch, whatever ``min_epochs`` and ``min_steps`` ask for."""
        self._trainer.should_stop = True
        self._replace(self._of_fit, self._trainer.fit_loop, "min_epochs", 0)
        self._replace(self._of_fit, self._epoch, "min_steps", None)

    def hold_plateaus(self) -> None:
        """Keep schedulers that follow a metric from taking a step in an epoch that was left before it was measured."""
        if self._unmeasured:
            self._replace(self._of_batch, self._epoch, "update_lr_schedulers", _no_step)

    def straighten(self) -> None:
        """Put back what was replaced for a batch."""
        self._unmeasured = False
        if self._of_batch:
            _put_back(self._of_batch)

    def release(self) -> None:
        """Put back everything."""
        self.straighten()
        _put_back(self._of_fit)

    def intercept(self, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Run ``around(step)`` in the place of the strategy's ``step`` of that name until the fit ends."""
        strategy = self._trainer.strategy
        self._replace(self._of_fit, strategy, name, around(getattr(strategy, name)))

    def _replace(self, kept: list[tuple[Any, str, Any, Any]], owner: Any, name: str, value: Any) -> None:
        kept.append((owner, name, vars(owner).get(name, _ABSENT), value))
        setattr(owner, name, value)

    def _check_strategy(self) -> None:
        strategy = self._trainer.strategy
        bases = {base.__name__ for base in type(strategy).__mro__}
        if strategy.handles_gradient_accumulation or not bases & set(_TESTED):
            raise MisconfigurationException(
                f"Cancelling was not tested under {type(strategy).__name__}; it works under {', '.join(_TESTED)}."
            )


def _no_step(*args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ARG001  # in the place of several methods
    """Do nothing, with the result of a batch that has none."""
    return {}


def _put_back(kept: list[tuple[Any, str, Any, Any]]) -> None:
    while kept:
        owner, name, before, value = kept.pop()
        if vars(owner).get(name, _ABSENT) is not value:
            continue  # somebody else has put it back already
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _drop_unsharded_gradients(module: Any) -> None:
    """Drop what FSDP2 holds back of a window until its last batch, out of the parameters' sight."""
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if (unsharded := getattr(parameter, "_unsharded_param", None)) is not None:
                unsharded.grad = None
