"""What events cost: per batch of a tiny model, beside the same function in Lightning's own hooks.

Measured as ``whole_stack`` does: one epoch from its first batch to the end of its last.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch

from benchmarks.harness import quiet, report, table
from benchmarks.whole_stack import BARE, Made, Tiny, measure
from lightning_plugins import Event, EventCallback, StatisticsRecorder


def nothing(loop, event):
    """Do nothing: what is left is the cost of being called."""


def read(loop, event):
    """Look at what most functions look at."""
    return loop.batch_index, loop.last_loss, loop.last_input


class EmptyHooks(pl.Callback):
    """A callback of Lightning in the hooks of the four events that a training batch has."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pass

    def on_after_backward(self, trainer, pl_module):
        pass

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pass

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pass


def callbacks() -> dict[str, Callable[[], list[pl.Callback]]]:
    late = [Event.BATCH_END]
    return {
        BARE: list,
        "an empty callback of Lightning": lambda: [pl.Callback()],
        "one with four empty hooks": lambda: [EmptyHooks()],
        "EventCallback, batchEnd": lambda: [EventCallback(nothing, events=late)],
        "EventCallback, batchEnd, reads loop": lambda: [EventCallback(read, events=late)],
        "EventCallback, all events": lambda: [EventCallback(nothing)],
        "EventCallback, all events, reads loop": lambda: [EventCallback(read)],
        "three of them": lambda: [EventCallback(partial(nothing)) for _ in range(2)] + [EventCallback(read)],
        "StatisticsRecorder": lambda: [StatisticsRecorder()],
        "StatisticsRecorder; EventCallback, batchEnd": lambda: [
            StatisticsRecorder(),
            EventCallback(nothing, events=late),
        ],
    }


def candidate(make: Callable[[], list[pl.Callback]], folder: Path) -> Made:
    return Tiny, {"callbacks": make()}


def main(*, quick: bool = False) -> None:
    torch.set_num_threads(1)
    quiet()
    steps, rounds = (20, 2) if quick else (600, 15)
    step, _ = measure({name: partial(candidate, make) for name, make in callbacks().items()}, steps, rounds)
    report("events", [table("A batch of 4 x Linear(8, 8)", step, base=BARE)], {"step": step}, keep=not quick)


if __name__ == "__main__":
    main()
