"""The progress bars show running statistics, and a step reads the device only when something is shown or written."""

import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader

from lightning_plugins import StatisticsRecorder
from lightning_plugins.statistics.recording import Recording as RunRecording
from tests.support.statistics_runs import (
    METRICS,
    Recording,
    dataset,
    fit,
)

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class _Bar(TQDMProgressBar):
    shown: list

    def get_metrics(self, trainer, pl_module):
        metrics = super().get_metrics(trainer, pl_module)
        self.shown.append(metrics)
        return metrics


def test_tqdm_shows_running_statistics_and_reads_the_device_only_when_it_redraws(monkeypatch, capsys):
    bar = _Bar(refresh_rate=3)
    bar.shown = []
    reads = _count_reads(monkeypatch)
    recorder = StatisticsRecorder(["accuracy"], progress_bar=["loss", "accuracy"])
    fit([recorder, bar], data=(DataLoader(dataset(90), batch_size=10), None), max_epochs=1, enable_progress_bar=True)
    assert {"loss", "accuracy"} <= bar.shown[0].keys()
    assert all(isinstance(metrics["loss"], float) for metrics in bar.shown)
    assert sum(reads.values()) <= 4  # batches 3, 6 and 9; the last one also ends the phase
    assert "accuracy=" in capsys.readouterr().out


def test_rich_shows_running_statistics(capsys):
    recorder = StatisticsRecorder(["accuracy"], progress_bar=["accuracy"])
    fit([recorder, RichProgressBar()], max_epochs=1, enable_progress_bar=True)
    assert "accuracy" in capsys.readouterr().out


def test_rich_reads_the_device_only_as_often_as_it_redraws(monkeypatch):
    reads = _count_reads(monkeypatch)
    at_batch = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            at_batch.append(sum(reads.values()))
            monkeypatch.setattr(RunRecording, "_elapsed", lambda self: 0.1 * (batch_idx + 1))

    monkeypatch.setattr(RunRecording, "_elapsed", lambda self: 0.0)
    bar = RichProgressBar(refresh_rate=1)  # once per second, which ten of these batches take
    every_batch = hasattr(bar, "_should_update")  # what the rate means in Lightning 2.6.0
    data = DataLoader(dataset(200), batch_size=10), None
    fit([StatisticsRecorder(["accuracy"]), bar, Spy()], data=data, max_epochs=1, enable_progress_bar=True)
    assert at_batch[:19] == (list(range(1, 20)) if every_batch else [1] * 10 + [2] * 9)


def _count_reads(monkeypatch):
    """Count every way in which a tensor's value reaches the host."""
    counts = {}
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counting(self, *args, _name=name, _original=original, **kwargs):
            counts[_name] = counts.get(_name, 0) + _from_recorder()
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counting)
    original_to = torch.Tensor.to

    def to(self, *args, **kwargs):
        counts["to"] = counts.get("to", 0) + (bool(args) and args[0] == "cpu" and _from_recorder())
        return original_to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    # what is on the host already may be read as often as one likes
    return _Only(counts)


class _Only(dict):
    def __init__(self, counts):
        self.counts = counts

    def values(self):
        return [self.counts.get("to", 0), self.counts.get("item", 0), self.counts.get("__bool__", 0)]


def _from_recorder():
    """Say whether the statistics read, directly or within six calls."""
    frame = sys._getframe(2)
    for _ in range(6):
        if frame is None:
            return False
        if "lightning_plugins/statistics" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def test_a_step_that_does_not_flush_reads_nothing_from_the_device(monkeypatch):
    reads = _count_reads(monkeypatch)
    at_batch = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            at_batch.append(sum(reads.values()))

    recorder = StatisticsRecorder(METRICS)
    recorder.subscribe(Recording(flush_seconds=1000))
    fit([recorder, Spy()], data=(DataLoader(dataset(200), batch_size=10), None), max_epochs=1)
    assert at_batch[:19] == [0] * 19
    assert at_batch[19] == 1  # the epoch's last batch: one transfer for twenty rows of five sums


def test_rows_are_handed_out_together_when_their_time_has_come():
    recorder = StatisticsRecorder(["accuracy"])
    patient, hasty = Recording(flush_seconds=1000), Recording(flush_seconds=0)
    recorder.subscribe(patient)
    fit([recorder])
    assert patient.writes == 4  # phase ends
    again = StatisticsRecorder(["accuracy"])
    again.subscribe(hasty)
    fit([again])
    assert hasty.writes == 10
    assert [row.values for row in hasty.rows] == [row.values for row in patient.rows]
