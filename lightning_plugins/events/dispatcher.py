"""Which events take place in a fit, which functions are called for them, and what a cancelled part leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.core.lightning import Trainer, rank_zero_info
from lightning_plugins.events.events import (
    ACTIONS,
    CancelAction,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelTraining,
    CancelValidation,
    Event,
    action_of,
    check_meaning,
    strongest,
)
from lightning_plugins.events.loop_control import LoopControl
from lightning_plugins.events.training_loop import TrainingLoop

Listener = Callable[[TrainingLoop, Event], Any]


class EventDispatcher:
    """Turns the hooks of one fit into events.

    Args:
        trainer: The Trainer, in ``on_train_start``.
        listeners: Returns the functions to be told of an event now, in their order.
        add_up: Adds a tensor up over the ranks; ``None`` with one.
        cut_epoch: What a run that is resumed had there.

    Attributes:
        batch_cancelled: Whether the batch at hand counts nowhere.
        cut_epoch: The epoch at hand if its training was cut short, else ``None``; a checkpoint must know, since
            Lightning's counters look as in mid-epoch.
    """

    def __init__(
        self,
        trainer: Trainer,
        listeners: Callable[[Event], Sequence[Listener]],
        add_up: Callable[[Tensor], Tensor] | None,
        cut_epoch: int | None = None,
    ) -> None:
        self.batch_cancelled = False
        resumes_in_it = cut_epoch is not None and cut_epoch == trainer.current_epoch
        self.cut_epoch = cut_epoch if resumes_in_it else None
        self._trainer = trainer
        self._listeners = listeners
        self._add_up = add_up
        self._loop = TrainingLoop(trainer)
        self._control = LoopControl(trainer)
        # what has cancelled more than a batch, until that has ended
        self._leaving: type[CancelAction] | None = CancelEpoch if resumes_in_it else None
        self._trains = False  # between trainingStart and trainingEnd
        self._validates = False
        self._predicted = False
        # the hook at hand, and who was told of it
        self._moment, self._told = "", list[object]()
        self._forward = trainer.lightning_module.register_forward_hook(self._forward_done)
        self._pieces = 0
        self._steps, self._updates, self._silent = trainer.global_step, True, False
        self._control.intercept("training_step", self._training_step)
        self._control.intercept("validation_step", self._validation_step)

    def is_news(self, moment: str, teller: object) -> bool:
        """Return whether a hook, of which each of several callbacks tells, was not told of by another one."""
        if moment != self._moment or teller in self._told:
            self._moment, self._told = moment, []
        self._told.append(teller)
        return len(self._told) == 1

    def close(self) -> None:
        """Leave the module and the Trainer as they were."""
        self._forward.remove()
        self._control.release()

    # the fit, in the order in which it runs

    def fit_starts(self) -> None:
        """Before the first epoch."""
        self._fire(Event.FIT_START)

    def epoch_starts(self) -> None:
        """Before the epoch's first batch is drawn."""
        if not self._fire(Event.EPOCH_START):
            self._trains = True
            self._loop.begin_phase([self._trainer.num_training_batches])
            self._fire(Event.TRAINING_START)

    def training_batch_starts(self, batch: Any, batch_idx: int) -> None:
        """Before the training step."""
        self._control.begin_batch()
        self._validates = False
        self._steps, self._updates = self._trainer.global_step, False
        self.batch_cancelled = self._leaving is not None
        if self._leaving is None:
            self._trains = True  # a run that resumes in mid-epoch has no trainingStart
            self._loop.begin_batch(batch, batch_idx, self._trainer.num_training_batches)
            self._pieces = 0
            self._fire(Event.BATCH_START)
        if self._leaving is not None:
            self.batch_cancelled = True
            self._end_epoch()
            self._control.skip_batch()
        elif self.batch_cancelled:
            self._control.cancel_batch()

    def update_starts(self) -> None:
        """After the backward, before gradients are clipped and the optimizer steps."""
        self._updates = True
        if not self.batch_cancelled and self._fire(Event.UPDATE_START):
            self.batch_cancelled = True
            self._end_epoch()
        if self.batch_cancelled:
            self._control.drop_gradients()

    def training_batch_ends(self, outputs: Any) -> None:
        """After the step, or after none."""
        if not (self._updates or self._silent) and self._trainer.global_step != self._steps:
            self._tell_of_silence()
        if self._leaving is None:
            if self._pieces > 1:  # a batch that ran in pieces: its loss is put together again here
                self._loop.step_done(outputs, self._trainer.accumulate_grad_batches)
            if self._fire(Event.BATCH_END):
                self._end_epoch(after_batch=True)
        if self._control.training_is_over:
            self._training_ends()

    def validation_starts(self) -> None:
        """Before the validation's first batch, also within the epoch."""
        if self._control.training_is_over:
            self._training_ends()
        self._validates = True
        self._loop.begin_phase(self._trainer.num_val_batches)
        if self._leaving is None:
            self._fire(Event.VALIDATION_START)

    def validation_batch_starts(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Before the validation step."""
        self._predicted = False
        self.batch_cancelled = self._leaving is not None
        if self._leaving is None:
            self._loop.begin_batch(batch, batch_idx, self._trainer.num_val_batches[dataloader_idx])
            if self._fire(Event.BATCH_START):
                self.batch_cancelled = True

    def validation_batch_ends(self, outputs: Any) -> None:
        """After the validation step, or after none."""
        if self._leaving is None:
            self._loop.step_done(outputs)
            self._fire(Event.BATCH_END)
        if self._leaving is not None:
            self._control.end_validation()

    def validation_ends(self) -> None:
        """After the validation's metrics are final."""
        if self._leaving in {None, CancelValidation}:
            self._leaving = None
            self._fire(Event.VALIDATION_END)
        self._validates = False
        if self._leaving is not None:  # the epoch, which may have batches left if this validation is within it
            self._end_epoch(after_batch=True)

    def epoch_ends(self) -> None:
        """After the epoch's last phase."""
        self._training_ends()
        self.cut_epoch = None
        if self._leaving is not CancelFit:
            self._leaving = None
            self._fire(Event.EPOCH_END)
        self._control.hold_plateaus()

    def fit_ends(self) -> None:
        """After the last epoch, or instead of it."""
        self._fire(Event.FIT_END)

    def _tell_of_silence(self) -> None:
        self._silent = bool(self._listeners(Event.UPDATE_START))
        if self._silent:
            rank_zero_info(
                f"EventCallback: the Trainer has counted a step without `{Event.UPDATE_START.value}`, which comes with "
                f"Lightning's hook before a step. An `optimizer_step` of the module's own fires it by "
                f"`optimizer.step(closure)`."
            )

    def _training_ends(self) -> None:
        if not self._trains:
            return
        self._trains = self._validates = False
        if self._leaving in {None, CancelTraining}:
            self._leaving = None
            if self._fire(Event.TRAINING_END):
                self._end_epoch()

    def _end_epoch(self, *, after_batch: bool = False) -> None:
        """End the epoch with the batch at hand, as what is left asks for."""
        self.cut_epoch = self._trainer.current_epoch
        self._control.end_epoch(validate=self._leaving is CancelTraining, after_batch=after_batch)

    # what happens within a step

    def _forward_done(self, module: Any, args: Any, output: Any) -> None:
        """Take the model's prediction; in validation it is an event."""
        if self._loop.forward_done(output) and self._validates and not self._predicted:
            self._prediction_ends()
            if self.batch_cancelled:
                raise _LeaveStep

    def _prediction_ends(self) -> None:
        self._predicted = True
        if self._fire(Event.INFERENCE_PREDICTION_END):
            self.batch_cancelled = True

    def _validation_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a validation step, which ends where its batch is cancelled, with nothing."""
        if not self._validates:
            return step(*args, **kwargs)
        try:
            outputs = None if self.batch_cancelled else step(*args, **kwargs)
        except _LeaveStep:
            return None
        if not (self._predicted or self.batch_cancelled):  # `forward` was not called: the step has predicted
            self._loop.step_done(outputs)
            self._prediction_ends()
        return None if self.batch_cancelled else outputs

    def _training_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a training step, and take its result before the update."""
        outputs = step(*args, **kwargs)
        self._pieces += 1
        self._loop.step_done(outputs)
        return outputs

    # events and actions

    def _fire(self, event: Event) -> bool:
        """Let an event take place, and tell whether more than the batch at hand is left because of it."""
        listeners = self._listeners(event)
        action = self._agreed(self._ask(listeners, event)) if listeners else None
        if action is None:
            return False
        check_meaning(action, event, training=not self._validates)
        if action is CancelBatch:
            self.batch_cancelled = True
            return False
        self._leaving = action
        if action is CancelFit:
            self._control.end_fit()
        return True

    def _ask(self, listeners: Sequence[Listener], event: Event) -> type[CancelAction] | None:
        """Call the functions in order; as in the original, one that cancels is the last to hear of the event."""
        for listener in listeners:
            try:
                listener(self._loop, event)
            except CancelAction as cancel:  # noqa: PERF203  # the rest do not hear of it
                return action_of(cancel)
        return None

    def _agreed(self, action: type[CancelAction] | None) -> type[CancelAction] | None:
        """Return what all ranks do: the strongest action of any."""
        if self._add_up is None:
            return action
        votes = torch.tensor([float(action is each) for each in ACTIONS])
        return strongest(self._add_up(votes).tolist())


class _LeaveStep(BaseException):
    """Leaves a validation step whose batch was cancelled in its middle; no ``except Exception`` keeps it."""
