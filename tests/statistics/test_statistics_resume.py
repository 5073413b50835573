"""Runs killed with signal 9 at awkward moments and resumed: what they leave is what an uninterrupted run leaves."""

import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import pytorch_lightning as classic
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_plugins import CSVStatisticsLogger, StatisticsRecorder, TensorBoardStatisticsLogger
from tests.support.statistics_runs import ClassicClassifier, fit, read, resumable, without_time

EPOCHS = 4


class Killer(pl.Callback):
    """Kills the process without a word."""

    def __init__(self, hook, at):
        self.hook, self.at, self.count = hook, at, 0

    def _count(self, hook):
        self.count += hook == self.hook
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, *args):
        self._count("train batch start")

    def on_validation_batch_end(self, trainer, *args):
        if not trainer.sanity_checking:
            self._count("validation batch end")

    def on_train_epoch_end(self, *args):
        self._count("epoch end")


def run(folder, *, checkpoint, killer=None, ckpt_path=None, **options):
    callbacks = [
        StatisticsRecorder(["accuracy", torchmetrics.classification.MulticlassAccuracy(8)]),
        CSVStatisticsLogger(folder / "log.csv", flush_seconds=0),
        CSVStatisticsLogger(folder / "epochs.csv", every="epoch"),
        TensorBoardStatisticsLogger(folder / "tb"),
        ModelCheckpoint(folder / "checkpoints", save_top_k=-1, **checkpoint),
    ]
    callbacks += [killer] if killer else []
    settings = {"max_epochs": EPOCHS, "enable_checkpointing": True, "data": resumable()} | options
    return fit(callbacks, ckpt_path=ckpt_path, **settings)


def killed(folder, killer, **options):
    """Run in a process of its own until it is killed; return its newest checkpoint."""
    child = os.fork()
    if not child:
        try:
            run(folder, killer=killer, **options)
        finally:
            os._exit(1)  # it should not have got here
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    return max((folder / "checkpoints").iterdir(), key=lambda path: torch.load(path, weights_only=True)["global_step"])


def scalars(root):
    """Return (phase, tag) -> what tensorboard's own reader finds."""
    (run_folder,) = root.iterdir()
    found = {}
    for phase in ("train", "validation"):
        accumulator = EventAccumulator(str(run_folder / phase)).Reload()
        for tag in accumulator.Tags()["scalars"]:
            found[phase, tag] = [(event.step, event.value) for event in accumulator.Scalars(tag)]
    return found


BY_STEPS = {"every_n_train_steps": 2}
BY_VALIDATION = {"every_n_epochs": 1, "save_on_train_epoch_end": False}
BY_EPOCH = {"every_n_epochs": 1, "save_on_train_epoch_end": True}


@pytest.mark.parametrize(
    ("checkpoint", "hook", "at", "options"),
    [
        (BY_STEPS, "train batch start", 6, {}),
        (BY_STEPS, "train batch start", 10, {}),
        ({"every_n_train_steps": 4}, "validation batch end", 3, {}),
        (BY_VALIDATION, "train batch start", 6, {}),
        (BY_VALIDATION, "train batch start", 7, {}),
        (BY_VALIDATION, "epoch end", 2, {}),
        (BY_VALIDATION, "validation batch end", 3, {}),
        (BY_EPOCH, "train batch start", 6, {}),
        (BY_EPOCH, "validation batch end", 4, {}),
        (BY_VALIDATION, "train batch start", 9, {"accumulate_grad_batches": 2}),
        (BY_EPOCH, "train batch start", 9, {"val_check_interval": 2}),
    ],
)
def test_a_killed_and_resumed_run_leaves_what_an_uninterrupted_one_leaves(tmp_path, checkpoint, hook, at, options):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, checkpoint=checkpoint, **options)
    newest = killed(broken, Killer(hook, at), checkpoint=checkpoint, **options)
    rows_before = read(broken / "log.csv")
    assert without_time(broken / "log.csv") != without_time(whole / "log.csv")
    run(broken, checkpoint=checkpoint, ckpt_path=newest, **options)
    assert without_time(broken / "log.csv") == without_time(whole / "log.csv")
    assert without_time(broken / "epochs.csv") == without_time(whole / "epochs.csv")
    assert scalars(broken / "tb") == scalars(whole / "tb")
    times = [float(row["time"]) for row in read(broken / "log.csv")]
    assert times == sorted(times)
    kept = sum(len(read(path)) for path in broken.glob("log.replaced.*.csv"))
    rows_at_checkpoint = len(rows_before) - kept
    assert rows_before[:rows_at_checkpoint] == read(broken / "log.csv")[:rows_at_checkpoint]  # nothing was destroyed


def test_the_comparison_would_notice_sums_that_were_not_restored(tmp_path, monkeypatch):
    monkeypatch.setattr(StatisticsRecorder, "load_state_dict", lambda self, state: None)
    run(tmp_path / "whole", checkpoint=BY_STEPS)
    newest = killed(tmp_path / "broken", Killer("train batch start", 6), checkpoint=BY_STEPS)
    run(tmp_path / "broken", checkpoint=BY_STEPS, ckpt_path=newest)
    assert without_time(tmp_path / "broken" / "log.csv") != without_time(tmp_path / "whole" / "log.csv")


def test_killed_twice_and_resumed_twice(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, checkpoint=BY_VALIDATION)
    newest = killed(broken, Killer("train batch start", 6), checkpoint=BY_VALIDATION)
    newest = killed(broken, Killer("train batch start", 6), checkpoint=BY_VALIDATION, ckpt_path=newest)
    run(broken, checkpoint=BY_VALIDATION, ckpt_path=newest)
    assert without_time(broken / "log.csv") == without_time(whole / "log.csv")
    assert scalars(broken / "tb") == scalars(whole / "tb")
    assert len(list(broken.glob("log.replaced.*.csv"))) == 2


def test_callbacks_added_to_a_resumed_run_begin_with_it_and_say_so(tmp_path, caplog):
    checkpoint = ModelCheckpoint(tmp_path, filename="first")
    fit([checkpoint], enable_checkpointing=True, max_epochs=1)
    added = [StatisticsRecorder(["accuracy"]), CSVStatisticsLogger("log.csv"), TensorBoardStatisticsLogger("tb")]
    again = ModelCheckpoint(tmp_path, filename="second")
    caplog.set_level("INFO")
    fit([*added, again], ckpt_path=tmp_path / "first.ckpt", enable_checkpointing=True)
    assert [row["epoch"] for row in read("log.csv")] == ["2"] * 5
    said = [record.message for record in caplog.records if "the checkpoint has no state of it" in record.message]
    assert said == [
        f"{name}: the checkpoint has no state of it, so it begins at step 3."
        for name in ("CSVStatisticsLogger", "TensorBoardStatisticsLogger")
    ]
    assert len(scalars(Path("tb"))["train", "batch_loss"]) == 3


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_callbacks_taken_from_a_resumed_run_leave_no_trace(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="first")
    fit([checkpoint, StatisticsRecorder(), CSVStatisticsLogger("log.csv")], enable_checkpointing=True, max_epochs=1)
    before = Path("log.csv").read_bytes()
    fit([], ckpt_path=tmp_path / "first.ckpt")
    assert Path("log.csv").read_bytes() == before


def test_a_checkpoint_holds_plain_values_only(tmp_path):
    run(tmp_path, checkpoint=BY_VALIDATION)
    states = torch.load(max((tmp_path / "checkpoints").iterdir()), weights_only=True)["callbacks"]
    ours = {key: state for key, state in states.items() if "Statistics" in key}
    assert len(ours) == 4
    assert all(state["version"] == 1 for state in ours.values())


def test_checkpoints_cross_the_two_packages(tmp_path):
    def callbacks(name):
        return [StatisticsRecorder(["accuracy"]), CSVStatisticsLogger(name)]

    trainer, _ = fit(callbacks("log.csv"), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "unified.ckpt")
    fit(callbacks("log.csv"), ClassicClassifier, package=classic, ckpt_path=tmp_path / "unified.ckpt")
    fit(callbacks("whole.csv"))
    assert without_time("log.csv") == without_time("whole.csv")


def as_release_0_1_0_wrote_it(path):
    """Change a checkpoint into one of release 0.1.0: other keys, and counts of labels without a layout."""
    checkpoint = torch.load(path, weights_only=True)
    states = checkpoint["callbacks"]
    for key in [key for key in states if "Statistics" in key]:
        states[f"{key[:-1].replace('(', '{', 1)}}}"] = state = states.pop(key)
        if "train" in state:
            del state["train"]["layout"], state["train"]["reading"]
    torch.save(checkpoint, path)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_release_0_1_0_goes_on_with_one_line_about_its_counts(tmp_path, caplog):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        run(folder, checkpoint={"every_n_train_steps": 2}, max_epochs=2)
    path = next((resumed / "checkpoints").glob("*step=2.ckpt"))
    as_release_0_1_0_wrote_it(path)
    caplog.clear()
    run(resumed, checkpoint={"every_n_train_steps": 2}, max_epochs=2, ckpt_path=path)
    assert sum("the checkpoint is of release 0.1.0" in line for line in caplog.messages) == 1
    assert not any("the checkpoint has no state of it" in line for line in caplog.messages)
    expected, found = read(whole / "log.csv"), read(resumed / "log.csv")
    for name in ("epoch", "batch", "phase", "step", "lr", "loss", "loss_step", "multiclass_accuracy"):
        assert [row[name] for row in found] == [row[name] for row in expected], name
    # the counts of labels begin anew in the epoch that was under way, and are right from the next phase on
    differs = [
        (row["epoch"], row["phase"]) for row, other in zip(found, expected, strict=True)
        if row["accuracy"] != other["accuracy"]
    ]  # fmt: skip
    assert set(differs) <= {("1", "train")}
    assert len(list((resumed / "tb").iterdir())) == 1
