"""TensorBoard's files, read back by tensorboard's own reader and by a real server."""

import errno
import math
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.data import DataLoader

from lightning_plugins import StatisticsRecorder, TensorBoardStatisticsLogger, Tokens
from lightning_plugins.core import append_only_file as files
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.validation import LightningPluginsWarning
from lightning_plugins.statistics.event_file import EventFile
from tests.support.statistics_runs import (
    Classifier,
    Recording,
    WithHyperparameters,
    dataset,
    expected_rows,
    fit,
    loaders,
    resumable,
    trainer_of,
)


def scalars(logger):
    """Return (phase, tag) -> [(step, value)]."""
    found = {}
    for phase in sorted(path.name for path in logger.run_directory.iterdir()):
        accumulator = EventAccumulator(str(logger.run_directory / phase)).Reload()
        for tag in accumulator.Tags()["scalars"]:
            found[phase, tag] = [(event.step, event.value) for event in accumulator.Scalars(tag)]
    return found


def sections(folder):
    """Return title -> tags of what a run says about the Custom Scalars page, as often as it says it."""
    found = []
    for event in EventAccumulator(str(folder)).Reload().Tensors("custom_scalars__config__"):
        layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
        found.append({part.title: [chart.title for chart in part.chart] for part in layout.category})
    return found


def test_both_phases_have_the_same_tags_and_the_right_values():
    logger = TensorBoardStatisticsLogger("tb")
    _, model = fit([logger, StatisticsRecorder(["accuracy", "perplexity"])])
    found = scalars(logger)
    names = ("loss", "accuracy", "perplexity")
    assert set(found) == {
        *(("train", f"batch_{name}") for name in (*names, "loss_step", "lr")),
        *((phase, f"epoch_{name}") for phase in ("train", "validation") for name in names),
    }
    expected = expected_rows(model.seen)
    training = [values for phase, _, values in expected if phase == "train"]
    for name in names:
        assert [step for step, _ in found["train", f"batch_{name}"]] == [1, 2, 3, 4, 5, 6]
        assert [value for _, value in found["train", f"batch_{name}"]] == pytest.approx(
            [values[name] for values in training], rel=1e-6
        )
        ends = {
            phase: [v[name] for p, batch, v in expected if (p, batch) == (phase, last)]
            for phase, last in (("train", 3), ("validation", 2))
        }
        for phase, values in ends.items():
            assert found[phase, f"epoch_{name}"] == [(3, pytest.approx(values[0])), (6, pytest.approx(values[1]))]
    losses = [loss for phase, loss, *_ in model.seen if phase == "train"]
    assert [value for _, value in found["train", "batch_loss_step"]] == pytest.approx(losses, rel=1e-6)
    assert found["train", "batch_lr"] == [(step, pytest.approx(0.1)) for step in range(1, 7)]


def test_a_step_is_one_event_with_all_its_scalars():
    logger = TensorBoardStatisticsLogger("tb")
    fit([logger, StatisticsRecorder(["accuracy", "perplexity"])], max_epochs=1)
    (path,) = (logger.run_directory / "train").iterdir()
    events = list(LegacyEventFileLoader(str(path)).Load())
    assert events[0].file_version == "brain.Event:2"
    # and last what the Custom Scalars page shows
    assert [(event.step, len(event.summary.value)) for event in events[1:]] == [(1, 5), (2, 5), (3, 5), (3, 3), (3, 1)]
    assert all(abs(event.wall_time - time.time()) < 60 for event in events)


@pytest.mark.parametrize(
    ("axis", "batches", "ends"),
    [
        ("step", [1, 2, 3, 4, 5, 6], [3, 6]),
        ("samples", [16, 32, 40, 56, 72, 80], [40, 80]),
        ("epoch", None, [1, 2]),
        ("time", [0] * 6, [0, 0]),
    ],
)
def test_the_x_axis_is_chosen(axis, batches, ends):
    logger = TensorBoardStatisticsLogger("tb", axis=axis)
    fit([logger, StatisticsRecorder()])
    found = scalars(logger)
    assert [step for step, _ in found["validation", "epoch_loss"]] == ends
    assert [step for step, _ in found["train", "epoch_loss"]] == ends
    if batches is None:
        assert ("train", "batch_loss") not in found
        assert [value for _, value in found["train", "epoch_lr"]] == pytest.approx([0.1, 0.1])
    else:
        assert [step for step, _ in found["train", "batch_loss"]] == batches


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_samples_are_counted_as_accumulation_counts_them():
    """Lists of pictures of several sizes have two readings, so that `count` is asked for; tokens are a function."""
    samples = [{"x": x, "labels": torch.tensor([y, -100, y])} for x, y in dataset(40, seed=1)]
    data = DataLoader(samples, batch_size=16), None

    class Tokened(Classifier):
        def _step(self, phase, batch):
            return super()._step(phase, (batch["x"], batch["labels"][:, 0]))

    logger = TensorBoardStatisticsLogger("tb", axis="samples", count=Tokens("labels"))
    fit([logger], Tokened, data=data, max_epochs=1)
    assert [step for step, _ in scalars(logger)["train", "batch_loss"]] == [32, 64, 80]

    class Pictures(Classifier):
        def training_step(self, batch, batch_idx):
            return self.layer.weight.sum()

    pictures = [[[torch.zeros(3, 4, 4), torch.zeros(3, 5, 5)], [torch.zeros(2), torch.zeros(2)]] for _ in range(3)]
    data = DataLoader(pictures, batch_size=None), None
    with pytest.raises(ValueError, match="`count`"):
        fit([TensorBoardStatisticsLogger("tb", axis="samples")], Pictures, data=data, max_epochs=1)
    logger = TensorBoardStatisticsLogger("tb", axis="samples", count=lambda batch: len(batch[0]))
    fit([logger, StatisticsRecorder()], Pictures, data=data, max_epochs=1)
    assert [step for step, _ in scalars(logger)["train", "batch_loss"]] == [2, 4, 6]
    fit([StatisticsRecorder(), TensorBoardStatisticsLogger("tb")], Pictures, data=data, max_epochs=1)  # nothing asks
    with pytest.raises(TypeError, match="`count` must be"):
        TensorBoardStatisticsLogger(count=3)


def test_a_run_has_the_name_that_it_was_given():
    loggers, names = (
        [TensorBoardStatisticsLogger("tb", name="large/first") for _ in range(3)],
        ["first", "first-1", "first-2"],
    )
    for logger in loggers:
        fit([logger], WithHyperparameters, max_epochs=1)
    assert [logger.run_directory for logger in loggers] == [Path("tb/large") / name for name in names]
    assert sorted(path.name for path in Path("tb/large").iterdir()) == names
    assert sorted(path.name for path in Path("tb/large/first").iterdir()) == ["train", "validation"]  # and no third
    for name in ("../up", "/root", "a/../b", "", ".", "a\nb", "a/", 3):
        with pytest.raises((ValueError, TypeError), match="`name` must be a plain name"):
            TensorBoardStatisticsLogger(name=name)


def test_a_checkpoint_from_before_the_first_fit_names_no_run(tmp_path):
    trainer, model = trainer_of(pl, [TensorBoardStatisticsLogger("tb")], max_epochs=1), WithHyperparameters()
    trainer.validate(model, loaders()[1], verbose=False)
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    logger = TensorBoardStatisticsLogger("tb")
    fit([logger], WithHyperparameters, max_epochs=1, ckpt_path=tmp_path / "early.ckpt")
    assert logger.run_directory.parent == Path("tb")
    assert sorted(path.name for path in logger.run_directory.iterdir()) == ["train", "validation"]


def test_without_a_validation_there_is_no_run_of_it():
    logger = TensorBoardStatisticsLogger("tb")
    fit([logger], WithHyperparameters, max_epochs=1, limit_val_batches=0)
    assert [path.name for path in logger.run_directory.iterdir()] == ["train"]


def test_under_accumulation_there_is_one_point_per_optimizer_step():
    logger = TensorBoardStatisticsLogger("tb")
    fit([logger, StatisticsRecorder()], accumulate_grad_batches=2)
    assert [step for step, _ in scalars(logger)["train", "batch_loss"]] == [1, 2, 3, 4]


def test_a_recorder_of_epochs_gives_no_batch_charts():
    logger = TensorBoardStatisticsLogger("tb")
    fit([logger, StatisticsRecorder(every="epoch")])
    assert set(scalars(logger)) == {("train", "epoch_loss"), ("validation", "epoch_loss")}


def test_without_a_recorder_what_the_module_logs_shares_its_tags():
    class Logging(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_margin", loss * 2, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch, batch_idx):
            loss = super().validation_step(batch, batch_idx)
            self.log("val_margin", loss * 2)
            self.log("val_loss", loss)

    logger = TensorBoardStatisticsLogger("tb")
    trainer, _ = fit([logger], Logging)
    found = scalars(logger)
    assert ("validation", "epoch_margin") in found
    assert found["validation", "epoch_margin"][-1][1] == pytest.approx(float(trainer.callback_metrics["val_margin"]))
    assert found["train", "epoch_margin"][-1][1] == pytest.approx(float(trainer.callback_metrics["train_margin"]))
    # a validation that returns no loss but logs one has it on the same chart
    assert found["validation", "epoch_loss"][-1][1] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    # and every tag has its place in the sections of the Custom Scalars page, said once
    for phase, titles in (("train", ["epochs", "batches"]), ("validation", ["epochs"])):
        (said,) = sections(logger.run_directory / phase)
        assert list(said) == titles
        assert sorted(tag for tags in said.values() for tag in tags) == sorted(t for p, t in found if p == phase)


def test_every_run_has_a_directory_of_its_own():
    loggers = [TensorBoardStatisticsLogger("tb") for _ in range(3)]
    for logger in loggers:
        fit([logger], max_epochs=1)
    assert len({logger.run_directory for logger in loggers}) == 3
    assert len(list(Path("tb").iterdir())) == 3
    assert TensorBoardStatisticsLogger("tb").run_directory is None


def test_a_second_fit_goes_on():
    logger, recorder = TensorBoardStatisticsLogger("tb", axis="samples"), StatisticsRecorder()
    fit([logger, recorder])
    fit([logger, recorder])
    assert [step for step, _ in scalars(logger)["validation", "epoch_loss"]] == [40, 80, 120, 160]
    assert len(list(Path("tb").iterdir())) == 1


def test_validate_test_fast_dev_run_and_construction_write_nothing():
    logger = TensorBoardStatisticsLogger("tb")
    trainer = trainer_of(pl, [logger, StatisticsRecorder()])
    trainer.validate(Classifier(), loaders()[1], verbose=False)
    trainer.test(Classifier(), loaders()[1], verbose=False)
    fit([logger], fast_dev_run=True)
    assert not Path("tb").exists()


def test_a_resumed_run_goes_on_in_its_directory_and_voids_what_came_after(tmp_path):
    def checkpoint():
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)

    first = TensorBoardStatisticsLogger("tb")
    fit([first, StatisticsRecorder(), checkpoint()], enable_checkpointing=True, data=resumable())
    again, recorder = TensorBoardStatisticsLogger("tb"), StatisticsRecorder()
    recorder.subscribe(reader := Recording())
    fit(
        [again, recorder, checkpoint()],
        ckpt_path=tmp_path / "step=2.ckpt",
        enable_checkpointing=True,
        data=resumable(),
        max_epochs=3,
    )
    assert again.run_directory == first.run_directory
    assert [len(list(folder.iterdir())) for folder in sorted(again.run_directory.iterdir())] == [2, 2]
    found = scalars(again)
    assert [step for step, _ in found["train", "batch_loss"]] == list(range(1, 10))
    written = [row.values["loss"] for row in reader.rows if row.phase == "train"]
    assert [value for _, value in found["train", "batch_loss"]][2:] == pytest.approx(written)
    assert [step for step, _ in found["validation", "epoch_loss"]] == [3, 6, 9]


def test_nan_and_infinity_are_written_as_such():
    class Diverging(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * [1.0, math.inf, math.nan][batch_idx]

    logger = TensorBoardStatisticsLogger("tb")
    fit([logger], Diverging, max_epochs=1)
    values = [value for _, value in scalars(logger)["train", "batch_loss"]]
    assert values[1] == math.inf
    assert math.isnan(values[2])


def test_a_file_that_was_closed_is_gone_on_with_and_voids_nothing_of_itself(tmp_path):
    file = EventFile(tmp_path, purge_from=2)
    for step in (1, 2, 3):
        file.add([(step, 10.0 + step, {"loss": float(step)})])
        file.close()
    assert len(list(tmp_path.iterdir())) == 1
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")] == [1, 2, 3]


def test_a_full_disk_costs_one_warning_and_no_event(tmp_path, monkeypatch):
    original, full = files.AppendOnlyFile.append, [False]

    def append(self, data):
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, data)

    monkeypatch.setattr(files.AppendOnlyFile, "append", append)
    file = EventFile(tmp_path)
    file.add([(1, 0.0, {"loss": 1.0})])
    full[0] = True
    with pytest.warns(LightningPluginsWarning, match="could not be written .*No space left.*the events wait in memory"):
        file.add([(2, 0.0, {"loss": 2.0})])
    file.add([(3, 0.0, {"loss": 3.0})])
    full[0] = False
    file.add([(4, 0.0, {"loss": 4.0})])
    full[0] = True
    with pytest.warns(LightningPluginsWarning, match="could not be written"):
        file.add([(5, 0.0, {"loss": 5.0})])
    with pytest.warns(LightningPluginsWarning, match=r"1 events for .* could not be written\."):
        file.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="`axis` must be one of 'step', 'epoch', 'samples', 'time', got 'hours'"):
        TensorBoardStatisticsLogger(axis="hours")
    with pytest.raises(TypeError, match="`root` must be a path, got 3"):
        TensorBoardStatisticsLogger(3)
    with pytest.raises(ValueError, match="`root` must be a local directory, got 's3://bucket/tb'"):
        TensorBoardStatisticsLogger("s3://bucket/tb")
    Path("file").write_text("")
    with pytest.raises(
        MisconfigurationException,
        match=r"`root` must be a directory that .* got 'file/tb': .*file is a file",
    ):
        fit([TensorBoardStatisticsLogger("file/tb")])
