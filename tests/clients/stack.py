"""Every technique at once, as a user of a client would put them into its Trainer."""

import csv
from collections import Counter
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_plugins import (
    EMA,
    CheckpointAveraging,
    CSVStatisticsLogger,
    EventCallback,
    GradientAccumulation,
    LearningRateScheduler,
    PostHocEMA,
    StatisticsRecorder,
    TensorBoardStatisticsLogger,
    WarmupCosine,
)

DECAY, SIGMA_REL, WINDOW = 0.9, 0.1, 3


def chart(root, phase, tag="epoch_loss"):
    """The points of one chart: place on the x axis and value."""
    (folder,) = root.glob(f"*/{phase}")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


class Diary:
    """Counts what it hears of, and notes the training losses that it is shown."""

    def __init__(self):
        self.heard, self.losses = Counter(), []

    def __call__(self, loop, event):
        self.heard[event.value] += 1
        if event.value == "batchEnd" and loop.trainer.training:
            self.losses.append(float(loop.last_loss))


class Stack:
    """The callbacks by name, and what they wrote."""

    def __init__(self, path: Path, *, warmup, total=None, count="samples", **options):
        self.path = path
        self.accumulation = GradientAccumulation(WINDOW, count=count)
        self.scheduler = LearningRateScheduler(WarmupCosine(warmup, total=total), **options)
        self.ema = EMA(DECAY)
        self.post_hoc = PostHocEMA((SIGMA_REL,), every_n_steps=2, dirpath=str(path / "posthoc"))
        self.averaging = CheckpointAveraging(last=2)
        self.diary = Diary()
        self.callbacks = [
            self.accumulation,
            self.scheduler,
            self.ema,
            self.post_hoc,
            StatisticsRecorder(),
            CSVStatisticsLogger(str(path / "log.csv")),
            TensorBoardStatisticsLogger(str(path / "tensorboard")),
            self.averaging,
            EventCallback(self.diary),
        ]

    def rows(self, phase, name="log.csv"):
        with (self.path / name).open() as file:
            return [row for row in csv.DictReader(file) if row["phase"] == phase]

    def chart(self, phase):
        return chart(self.path / "tensorboard", phase)
