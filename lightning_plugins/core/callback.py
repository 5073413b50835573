"""The base of every callback: both namespaces, the key and version of its state, its place in the order, its end."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from enum import IntEnum, auto
from typing import Any, ClassVar

from lightning_plugins.core.lightning import (
    CallbackOfBoth,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
)
from lightning_plugins.core.patching import Patches
from lightning_plugins.core.presence import Presence
from lightning_plugins.core.private_names import check_names
from lightning_plugins.core.validation import check_state_version


class Stage(IntEnum):
    """The place of a callback among ours, from first to last within every hook."""

    ACCUMULATION = auto()
    """Makes the gradient of the step complete."""
    GRADIENTS = auto()
    """Changes the complete gradient, as clipping does."""
    RATES = auto()
    """Sets learning rates and other hyper-parameters."""
    WEIGHTS = auto()
    """Follows or exchanges the weights."""
    STATISTICS = auto()
    """Computes values of a batch or a phase."""
    OUTPUT = auto()
    """Writes such values."""
    CHECKPOINTS = auto()
    """Reads or writes checkpoints."""
    EVENTS = auto()
    """Calls the user's functions: after every other callback, before checkpoints are written."""


class _Nothing:
    """A context that does nothing, by functions of C: a batch enters sixty, and ``contextlib.nullcontext`` is felt."""

    # takes whatever it is given, and returns an empty text: an exception goes on
    __enter__ = __exit__ = staticmethod("".format)


_NOTHING = _Nothing()


class Callback(CallbackOfBoth):
    """Base of every callback here.

    A subclass sets :attr:`stage` and, where it has a state, :attr:`state_version`, :meth:`get_state` and
    :meth:`set_state`. Whatever it replaces goes through :attr:`patches`; whatever else has to be undone, it undoes in
    :meth:`release`. Every end of a run comes there: the normal one, an exception and Ctrl-C; and a callback that is
    taken out of ``trainer.callbacks`` in mid-run, after :meth:`leave`.

    Attributes:
        state_key: Where a checkpoint keeps the state: the class and the arguments that tell two instances apart.
        stage: Its place in the order; equal ones keep the user's order.
        state_version: The version of what :meth:`get_state` returns, at least 1.
        patches: What it has replaced in foreign objects.
    """

    # a plain attribute where Lightning has a property: it is read at every hook
    state_key: str = ""
    stage: ClassVar[Stage]
    state_version: ClassVar[int] = 1

    def __init__(self, **identity: Any) -> None:
        """Remember what tells two instances apart.

        Args:
            **identity: Names and values that appear in the state's key.
        """
        super().__init__()
        told = ", ".join(f"{name}={value!r}" for name, value in identity.items())
        # not by assignment, which a subclass with a property of its own would refuse
        vars(self)["state_key"] = f"{type(self).__qualname__}({told})"
        self._told_apart_by = tuple(identity)
        self.patches = Patches()
        self._remaining_end: Callable[[], None] | None = None
        # one for all of ours in a Trainer, during a run
        self._presence: Presence | None = None

    # -- hooks, in the order in which they fire

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look up the foreign names that are needed, refuse a second one, and take the place in the order.

        Raises:
            MisconfigurationException: If the Trainer has two callbacks whose states a checkpoint could not tell apart,
                or one callback twice.
        """
        check_names(trainer, _technique(type(self)))
        self._refuse_twin(trainer.callbacks)  # type: ignore[attr-defined]
        callbacks = in_order(trainer.callbacks, trainer.checkpoint_callbacks)  # type: ignore[attr-defined]
        if callbacks != trainer.callbacks:  # type: ignore[attr-defined]
            trainer.callbacks = callbacks  # type: ignore[attr-defined]  # a new list: Lightning is going through the old one
        profiler: Any = trainer.profiler  # type: ignore[attr-defined]
        if type(profiler).__name__ == "PassThroughProfiler" and "profile" not in vars(profiler):
            # it does nothing, but by a generator: a microsecond and more for every hook of every callback
            self.patches.replace(profiler, "profile", lambda action_name: _NOTHING)  # noqa: ARG005, a name that may be given
        known = [found._presence for found in callbacks if isinstance(found, Callback) and found._presence is not None]
        self._presence = next((found for found in known if found.belongs_to(trainer)), None) or Presence(trainer)
        self._presence.begin(self, lambda: self._was_removed(trainer, pl_module))

    def _refuse_twin(self, callbacks: list[Any]) -> None:
        stateless = type(self).get_state is Callback.get_state and type(self).state_dict is Callback.state_dict
        if stateless and sum(found is self for found in callbacks) > 1:
            raise MisconfigurationException(
                f"A callback must be in a Trainer once, got the same {type(self).__name__} twice. Remove one."
            )
        if stateless or [getattr(found, "state_key", "") for found in callbacks].count(self.state_key) < 2:
            return
        arguments = [f"`{name}`" for name in self._told_apart_by if name in inspect.signature(type(self)).parameters]
        rule = f"{arguments[0]} must differ" if arguments else "There must be one callback of a kind"
        other = f"Give one of them another {' or '.join(arguments)}, or remove" if arguments else "Remove"
        raise MisconfigurationException(f"{rule} among a Trainer's callbacks, got {self.state_key} twice. {other} it.")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo everything: Lightning calls no ``teardown`` after an exception or Ctrl-C."""
        self._end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo everything."""
        self._end(trainer, pl_module)

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        presence, self._presence = self._presence, None
        if presence is not None:
            presence.stop(self)
        try:
            self.release(trainer, pl_module)
        finally:
            self._remaining_end = None
            self.patches.undo()

    def _was_removed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a callback that was taken out of ``trainer.callbacks`` in mid-run."""
        rank_zero_info(f"{self.state_key} is no longer among the Trainer's callbacks: what it did ends here.")
        try:
            self.leave(trainer, pl_module)
        finally:
            self._end(trainer, pl_module)

    def leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo what is there until the run ends, when the callback is taken out of the Trainer before that."""

    def release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo what :attr:`patches` does not know of. May be called twice, and before anything was begun."""

    # -- state

    def get_state(self) -> dict[str, Any]:
        """Return the state as plain numbers, texts and tensors; empty when there is none to keep."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`get_state` has returned in this or another process."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state and its version."""
        state = self.get_state()
        return {"version": self.state_version, **state} if state else {}

    # Lightning takes it for its own then, and leaves it to `setup` to refuse two of one key: in its words, and for
    # callbacks without a state not at all
    functools.update_wrapper(state_dict, CallbackOfBoth.state_dict, assigned=(), updated=())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state.

        Raises:
            ValueError: If it is of another version than this release writes.
        """
        self.set_state(check_state_version(type(self).__name__, state_dict, self.state_version))

    # -- for subclasses

    def when_nothing_is_left(self, trainer: Trainer, finish: Callable[[], None]) -> None:
        """Call ``finish`` in a fit that finds nothing left to train, where Lightning calls no hook.

        A run that was killed while it ended has its last checkpoint behind it. Resumed from there, Lightning's loop
        returns at once, without ``on_train_start`` and ``on_train_end``, and what callbacks do at the end would never
        be done.

        Args:
            trainer: The Trainer, in ``on_fit_start``.
            finish: What there is to do; everything is still on its device. :meth:`training_starts` calls it off.
        """
        self._remaining_end = finish

        def run(original: Callable[[], None]) -> None:
            original()
            left, self._remaining_end = self._remaining_end, None
            if left is not None and trainer.global_step and trainer.limit_train_batches != 0:  # else there was no run
                left()

        self.patches.wrap(trainer.fit_loop, "run", run)

    def training_starts(self) -> None:
        """Call off what :meth:`when_nothing_is_left` announced: there is something left to train."""
        self._remaining_end = None


def in_order(callbacks: list[Any], checkpoint_writers: list[Any]) -> list[Any]:
    """Return a Trainer's callbacks with ours in the order of their stages, in the places that ours have.

    Others stay where they are. Those of the stage ``EVENTS`` stand behind all but those that write checkpoints.
    """
    late = [found for found in callbacks if isinstance(found, Callback) and found.stage is Stage.EVENTS]
    rest = [found for found in callbacks if found not in late]
    ours = iter(sorted((found for found in rest if isinstance(found, Callback)), key=lambda found: found.stage))
    rest = [next(ours) if isinstance(found, Callback) else found for found in rest]
    place = next((index for index, found in enumerate(rest) if found in checkpoint_writers), len(rest))
    return [*rest[:place], *late, *rest[place:]]


def _technique(kind: type) -> str:
    """Return the folder of the technique that a class, or the nearest of its bases, belongs to."""
    ours = (base.__module__.split(".") for base in kind.__mro__ if base.__module__.startswith("lightning_plugins."))
    return next((path[1] for path in ours), "")
