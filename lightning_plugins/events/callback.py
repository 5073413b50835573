"""The callback that calls functions of (loop, event)."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch.optim import Optimizer

from lightning_plugins.core.callback import Callback, Stage
from lightning_plugins.core.lightning import LightningModule, Trainer, sum_over_ranks
from lightning_plugins.core.validation import a_list, check_state_version, shown, takes, whole_number
from lightning_plugins.events.dispatcher import EventDispatcher
from lightning_plugins.events.events import Event
from lightning_plugins.events.training_loop import TrainingLoop

_CHECKPOINT_KEY = "lightning_plugins_events"


class EventCallback(Callback):
    """Calls ``function(loop, event)`` at the events of a fit; the function may read the run, change it or cancel.

    The events are those of :class:`Event`; ``loop`` is a :class:`~lightning_plugins.events.TrainingLoop`. The function
    cancels a part of the fit by raising :class:`CancelBatch`, :class:`CancelTraining`, :class:`CancelValidation`,
    :class:`CancelEpoch` or :class:`CancelFit`; the Trainer, the module's mode, averages, schedules and statistics stay
    consistent. The sanity check, ``validate``, ``test`` and ``predict`` have no events.

    When:
        After the other callbacks' hooks of the same moment and before checkpoints are written, in any order of the
        list: statistics are those of the batch that ends, gradients at ``UPDATE_START`` are those of the whole window.
        Several callbacks are told of an event in their order, up to one that cancels.

    Checkpoint:
        Only that the epoch at hand was cut short, so that a resumed run does not go on with it. A run that resumes in
        mid-epoch has no ``EPOCH_START`` and ``TRAINING_START`` for that epoch.

    Distributed:
        The functions run on every rank; an action of one rank counts on all, the strongest if they differ.

    Cost:
        About one hook's per event. With several processes one reduction of five numbers, with a wait for its result,
        at each event that has a function: name the ``events`` you need.

    Does not compose with:
        An optimizer that runs its closure several times (LBFGS) has an ``UPDATE_START`` each time. Under
        ``MicroBatching``, ``last_loss`` at ``UPDATE_START`` is that of the last micro-batch.

    Args:
        function: Called with the loop and the event; what it returns is ignored. A function of a module's top level, so
            that the callback can be pickled.
        events: The events to call it for, as :class:`Event`, values (``"batchEnd"``) or names (``"BATCH_END"``);
            ``None``: all twelve.

    Raises:
        TypeError: If ``function`` cannot be called.
        ValueError: If ``events`` is empty or names something else; in the run, if an action is raised where it has no
            meaning.

    Example:
        >>> def stop_when_good_enough(loop, event):
        ...     if loop.last_statistics["loss"] < 0.1:
        ...         raise CancelFit
        >>> EventCallback(stop_when_good_enough, events=[Event.VALIDATION_END]).events
        (<Event.VALIDATION_END: 'validationEnd'>,)

    References:
        Swift for TensorFlow, swift-models, ``TrainingLoop`` callbacks. Differs: ``last_output`` and ``last_loss`` are
        never the previous batch's, so that a cancelled batch is not counted twice; an action without a meaning names
        itself; ranks agree.
    """

    stage: ClassVar[Stage] = Stage.EVENTS

    def __init__(
        self, function: Callable[[TrainingLoop, Event], Any], *, events: Iterable[Event | str] | None = None
    ) -> None:
        takes("function", function, "loop", "event")
        if isinstance(events, str):  # an Event is one too
            events = (events,)
        self.function = function
        given = Event if events is None else a_list("events", events, "a list of events")
        self.events = tuple(dict.fromkeys(Event.named(name) for name in given))
        if not self.events:
            raise ValueError("`events` must name at least one event, got none. Leave it out for all of them.")
        names = "all" if events is None else ",".join(event.value for event in self.events)
        super().__init__(function=_name_of(function), events=names)
        self._cut_epoch: int | None = None
        # one for all such callbacks of a Trainer, while a fit runs
        self._dispatcher: EventDispatcher | None = None

    def __call__(self, loop: TrainingLoop, event: Event) -> Any:
        """Call the function, so that a decorated one can be used as before."""
        return self.function(loop, event)

    @property
    def batch_cancelled(self) -> bool:
        """Whether the batch at hand was cancelled, so that nothing counts it."""
        return self._dispatcher is not None and self._dispatcher.batch_cancelled

    # hooks, in the order in which they fire

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin; not before, since a resumed run knows only now where it stands."""
        if self._dispatcher is None:
            dispatcher = EventDispatcher(
                trainer, functools.partial(_listeners, trainer), sum_over_ranks(trainer), self._cut_epoch
            )
            for callback in _all_of(trainer):
                callback._dispatcher = dispatcher
        self._take_place("fit_starts")
        self._cut_epoch = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """``EPOCH_START`` and ``TRAINING_START``."""
        self._take_place("epoch_starts")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """``BATCH_START``."""
        self._take_place("training_batch_starts", batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """``UPDATE_START``."""
        self._take_place("update_starts")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """``BATCH_END``, and ``TRAINING_END`` after the epoch's last batch."""
        self._take_place("training_batch_ends", outputs)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """``VALIDATION_START``; before it ``TRAINING_END`` if the last batch did not know that it was."""
        self._take_place("validation_starts")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """``BATCH_START``."""
        self._take_place("validation_batch_starts", batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """``BATCH_END``; ``INFERENCE_PREDICTION_END`` came within the step."""
        self._take_place("validation_batch_ends", outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """``VALIDATION_END``."""
        self._take_place("validation_ends")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """``EPOCH_END``."""
        self._take_place("epoch_ends")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """``FIT_END``."""
        self._take_place("fit_ends")
        self.release(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save that the epoch was cut short: Lightning's counters look as in its middle."""
        if self._dispatcher is not None and self._dispatcher.cut_epoch is not None:
            checkpoint[_CHECKPOINT_KEY] = {"version": self.state_version, "cut_epoch": self._dispatcher.cut_epoch}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take that from a checkpoint."""
        saved = check_state_version(type(self).__name__, checkpoint.get(_CHECKPOINT_KEY, {}), self.state_version)
        epoch = saved.get("cut_epoch")
        self._cut_epoch = None if epoch is None else whole_number("cut_epoch", epoch)

    def release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module and the Trainer as they were; after an exception, ``FIT_END`` does not come."""
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is not None and not any(found._dispatcher is dispatcher for found in _all_of(trainer)):
            dispatcher.close()

    def _take_place(self, moment: str, *what: Any) -> None:
        """Let the events of a hook take place, once for all such callbacks: when the first of them is told."""
        dispatcher = self._dispatcher
        if dispatcher is not None and dispatcher.is_news(moment, self):
            getattr(dispatcher, moment)(*what)

    # pickling

    def __getstate__(self) -> dict[str, Any]:
        """Remember a decorated function by its name, which leads to this callback and not to the function."""
        state = {**self.__dict__, "_dispatcher": None}
        if getattr(_by_name(self.function), "function", None) is self.function:
            state["function"] = _Decorated(self.function.__module__, self.function.__qualname__)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Find a decorated function again."""
        function = state["function"]
        self.__dict__.update(state, function=function.find() if isinstance(function, _Decorated) else function)


def on_events(*events: Event | str) -> Callable[[Callable[[TrainingLoop, Event], Any]], EventCallback]:
    """Make a callback of a function of (loop, event), called for ``events`` only.

    Args:
        events: As in :class:`EventCallback`; at least one.

    Returns:
        A decorator that returns an :class:`EventCallback`, ready for a Trainer's list.

    Raises:
        TypeError: If it stands without parentheses.
        ValueError: If there is none, or one that does not exist.

    Example:
        >>> @on_events(Event.EPOCH_END)
        ... def say_so(loop, event):
        ...     print(f"epoch {loop.epoch_index + 1} of {loop.epoch_count}")
        >>> say_so.events
        (<Event.EPOCH_END: 'epochEnd'>,)
    """
    if len(events) == 1 and callable(events[0]) and not isinstance(events[0], Event):
        raise TypeError(
            f"`on_events` must be called with the events to hear of, got {shown(events[0])}. "
            "Write @on_events(Event.BATCH_END), or EventCallback(function) for all of them."
        )
    chosen = tuple(Event.named(event) for event in events)
    return lambda function: EventCallback(function, events=chosen)


def _all_of(trainer: Trainer) -> list[EventCallback]:
    """Return a Trainer's callbacks of events as they are now: functions may take one out."""
    return [found for found in trainer.callbacks if isinstance(found, EventCallback)]  # type: ignore[attr-defined]


def _listeners(trainer: Trainer, event: Event) -> list[Callable[[TrainingLoop, Event], Any]]:
    """Return the functions to be told of an event, in their order; of those that were there when the fit began."""
    return [found.function for found in _all_of(trainer) if event in found.events and found._dispatcher is not None]


class _Decorated:
    """The name of a function whose place in its module an :class:`EventCallback` has taken."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def find(self) -> Callable[[TrainingLoop, Event], Any]:
        """Return the function."""
        __import__(self.module)
        callback: EventCallback = operator.attrgetter(self.name)(sys.modules[self.module])
        return callback.function


def _by_name(function: Any) -> Any:
    """Return what stands in a function's module under its name."""
    try:
        return operator.attrgetter(function.__qualname__)(sys.modules[function.__module__])
    except (AttributeError, KeyError):
        return None


def _name_of(function: Any) -> str:
    """Return a name for ``function`` that is the same in another process."""
    if isinstance(function, functools.partial):
        return _name_of(function.func)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
