"""Sees every checkpoint that a run's strategy writes and reads, and gives each the sets that it should have.

Lightning asks no callback when it writes a weights-only file or loads weights through the strategy, so the strategy's
methods are wrapped.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning_plugins.core.distributed_sets import marking, write_beside
from lightning_plugins.core.patching import Patches


def watch_files(
    patches: Patches,
    strategy: Any,
    *,
    before_writing: Callable[[dict[str, Any]], None],
    before_reading: Callable[[Any], None],
    loading: Callable[[dict[str, Any]], AbstractContextManager[None]],
) -> None:
    """Watch a strategy until it is torn down, which comes after every other exit of a run.

    Args:
        patches: Takes what is replaced.
        strategy: The Trainer's.
        before_writing: Called with a checkpoint that is about to be written.
        before_reading: Called with the path of one that is about to be read.
        loading: Entered with a checkpoint while its weights are loaded.
    """

    def save(original: Callable[..., None], checkpoint: dict[str, Any], filepath: Any, *rest: Any, **more: Any) -> None:
        before_writing(checkpoint)
        # also where there are no sets: those of an earlier file of that name must go
        write_beside(strategy, checkpoint, filepath)
        with marking(strategy, checkpoint):
            original(checkpoint, filepath, *rest, **more)

    def read(original: Callable[..., Any], checkpoint_path: Any, *rest: Any, **more: Any) -> Any:
        before_reading(checkpoint_path)
        return original(checkpoint_path, *rest, **more)

    def load(original: Callable[..., Any], checkpoint: dict[str, Any], *rest: Any, **more: Any) -> Any:
        with loading(checkpoint):
            return original(checkpoint, *rest, **more)

    def tear_down(original: Callable[[], None]) -> None:
        patches.undo()
        original()

    patches.undo()
    patches.wrap(strategy, "save_checkpoint", save)
    patches.wrap(strategy, "load_checkpoint", read)
    patches.wrap(strategy, "load_model_state_dict", load)
    patches.wrap(strategy, "teardown", tear_down)
