"""Where a run's files are cut: the two methods of a strategy through which every checkpoint goes.

Lightning asks no callback when it writes a weights-only file. The strategy, though, is asked for the module's state
dict by every file, and is handed every file to write. Both methods are wrapped on that one strategy object for the
length of a run and unwrapped when the strategy is torn down, which happens after every other exit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class CheckpointSeam:
    """Hands every state dict and every checkpoint of a run to two functions before it is written.

    Args:
        strategy: The Trainer's strategy.
        on_state_dict: Changes the state dict in place; under sharding called on every rank, with an empty one on most.
        on_checkpoint: Changes the whole checkpoint in place, last thing before it is written.
    """

    def __init__(
        self,
        strategy: Any,
        on_state_dict: Callable[[dict[str, Any]], None],
        on_checkpoint: Callable[[dict[str, Any]], None],
    ) -> None:
        self._strategy = strategy
        self._wrapped: dict[str, Callable[..., Any]] = {}
        self._before: dict[str, Any] = {}  # wrappers of others that lay on the object already
        state_dict, save, teardown = strategy.lightning_module_state_dict, strategy.save_checkpoint, strategy.teardown

        def lightning_module_state_dict() -> dict[str, Any]:
            state: dict[str, Any] = state_dict()
            if self._wrapped:
                on_state_dict(state)
            return state

        def save_checkpoint(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            if self._wrapped:
                on_checkpoint(checkpoint)
            save(checkpoint, *args, **kwargs)

        def torn_down() -> None:
            self.remove()
            teardown()

        for wrapper in (lightning_module_state_dict, save_checkpoint):
            self._wrap(wrapper.__name__, wrapper)
        self._wrap("teardown", torn_down)

    @property
    def active(self) -> bool:
        """Whether the run's files still come through here."""
        return bool(self._wrapped)

    def remove(self) -> None:
        """Give the strategy its own methods back."""
        wrapped, self._wrapped = self._wrapped, {}  # a wrapper that somebody else has wrapped in turn becomes inert
        for name, wrapper in wrapped.items():
            if vars(self._strategy).get(name) is wrapper:
                delattr(self._strategy, name)
                vars(self._strategy).update({name: self._before[name]} if name in self._before else {})

    def _wrap(self, name: str, wrapper: Callable[..., Any]) -> None:
        self._wrapped[name] = wrapper
        if name in vars(self._strategy):
            self._before[name] = vars(self._strategy)[name]
        setattr(self._strategy, name, wrapper)
