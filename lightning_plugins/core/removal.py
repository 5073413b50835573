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
        # the Trainer's list when it was last looked at
        self._seen: list[Any] = []
        self._patches = Patches()
        epoch = trainer.fit_loop.epoch_loop
        for owner, name in ((epoch, "advance"), (epoch.val_loop, "run"), (trainer.strategy, "teardown")):
            self._patches.wrap(owner, name, self._look_first)

    @classmethod
    def begin(cls, trainer: Any, callback: Any, end: Callable[[], None]) -> None:
        """Call ``end`` when a callback is seen to be gone."""
        cls.stop(trainer, callback)
        if trainer not in cls._of:
            cls._of[trainer] = cls(trainer)
        cls._of[trainer]._ends.append((callback, end))

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
        there = self._trainer.callbacks
        # mostly it is as it was; a list is compared by what it holds
        if there != self._seen:
            self._seen = list(there)
            for callback, end in list(self._ends):
                if not any(found is callback for found in there):
                    end()
        return original(*args, **kwargs)
