"""Ends callbacks of ours that are taken out of a Trainer while it runs: Lightning tells them nothing any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from lightning_plugins.core.patching import Patches


class Watch:
    """Looks, before each training batch, each validation and the end of a run, which callbacks are still there.

    One for all of ours in a Trainer; with the last of them it ends.

    Args:
        trainer: The Trainer.
    """

    _of: ClassVar[WeakKeyDictionary[Any, Watch]] = WeakKeyDictionary()

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._ends: list[tuple[Any, Callable[[], None]]] = []
        # the Trainer's list, and what was in it when it was last looked at
        self._list: list[Any] = trainer.callbacks
        self._seen = list(self._list)
        self._patches = Patches()
        epoch = trainer.fit_loop.epoch_loop
        for owner, name in ((epoch, "advance"), (epoch.val_loop, "run"), (trainer.strategy, "teardown")):
            self._patches.wrap(owner, name, self._look_first)

    @classmethod
    def begin(cls, trainer: Any, callback: Any, end: Callable[[], None]) -> None:
        """Call ``end`` when a callback is seen to be gone."""
        cls.stop(trainer, callback)
        watch = cls._of.get(trainer) or cls._of.setdefault(trainer, cls(trainer))
        watch._list, watch._seen = trainer.callbacks, list(trainer.callbacks)
        watch._ends.append((callback, end))

    @classmethod
    def stop(cls, trainer: Any, callback: Any) -> None:
        """Watch a callback no more."""
        watch = cls._of.get(trainer)
        if watch is not None:
            watch._ends = [found for found in watch._ends if found[0] is not callback]
            if not watch._ends:
                watch._patches.undo()
                del cls._of[trainer]

    def _look_first(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # mostly it is as it was; a list is compared by what it holds
        if self._trainer.callbacks != self._seen:
            self._look()
        return original(*args, **kwargs)

    def _look(self) -> None:
        there, before = self._trainer.callbacks, self._seen
        if there is not self._list and not any(_is_in(before, callback) for callback in there):
            # a search for a rate or a batch size, and our own validation, put another list there for a while
            return
        self._list, self._seen = there, list(there)
        for callback, end in list(self._ends):
            if not _is_in(there, callback):
                end()


def _is_in(callbacks: list[Any], callback: Any) -> bool:
    return any(found is callback for found in callbacks)
