"""Ends callbacks of ours that are taken out of a Trainer while it runs: Lightning tells them nothing any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_plugins.core.patching import Patches


class Presence:
    """Looks, before each training batch, each validation and the end of a run, which callbacks are still there.

    One for all of ours in a Trainer; with the last of them it ends.

    Args:
        trainer: The Trainer.
    """

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

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of a callback is in no run

    def belongs_to(self, trainer: Any) -> bool:
        """Return whether it is that of a Trainer."""
        return self._trainer is trainer

    def begin(self, callback: Any, end: Callable[[], None]) -> None:
        """Call ``end`` when a callback is seen to be gone."""
        self._list, self._seen = self._trainer.callbacks, list(self._trainer.callbacks)
        self._ends = [*(found for found in self._ends if found[0] is not callback), (callback, end)]

    def stop(self, callback: Any) -> None:
        """Watch a callback no more."""
        self._ends = [found for found in self._ends if found[0] is not callback]
        if not self._ends:
            self._patches.undo()

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
