"""The CSV logger in a real Trainer, read back by csv and by pandas."""

import math
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pandas
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_plugins import (
    ClassificationReport,
    CSVStatisticsLogger,
    StatisticsRecorder,
    TensorBoardStatisticsLogger,
)
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.support.statistics_runs import (
    Classifier,
    expected_rows,
    fit,
    loaders,
    read,
    trainer_of,
    without_time,
)

METRICS = ["accuracy", "top5_accuracy", "perplexity"]


def test_a_row_per_batch_equals_a_recomputation():
    _, model = fit([StatisticsRecorder(METRICS), CSVStatisticsLogger("log.csv")])
    rows = read("log.csv")
    assert list(rows[0]) == ["epoch", "batch", "phase", "step", "lr", "loss", *METRICS, "loss_step", "time"]
    expected = expected_rows(model.seen)
    assert len(rows) == len(expected) == 10
    for row, (phase, batch, values) in zip(rows, expected, strict=True):
        assert (row["phase"], row["batch"]) == (phase, str(batch))
        assert row["lr"] == ("0.1" if phase == "train" else "")
        assert {name: float(row[name]) for name in values} == pytest.approx(values, rel=1e-6)
    assert [float(row["loss_step"]) for row in rows] == pytest.approx([loss for _, loss, *_ in model.seen], rel=1e-6)
    assert [row["epoch"] for row in rows] == ["1"] * 5 + ["2"] * 5
    assert [row["step"] for row in rows] == list("1233345666")
    times = [float(row["time"]) for row in rows]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < 60


def test_pandas_reads_it_with_the_types_one_would_choose():
    fit([StatisticsRecorder(METRICS), CSVStatisticsLogger("log.csv")])
    frame = pandas.read_csv("log.csv")
    assert frame[["epoch", "batch", "step"]].dtypes.unique().tolist() == [np.dtype("int64")]
    assert frame[["loss", *METRICS, "lr", "time"]].dtypes.unique().tolist() == [np.dtype("float64")]
    last = frame[frame.phase == "validation"].groupby("epoch").last()
    assert len(last) == 2
    assert last.perplexity.to_numpy() == pytest.approx(np.exp(last.loss))


def test_every_digit_survives():
    recorder = StatisticsRecorder(["accuracy"])
    trainer, _ = fit([recorder, CSVStatisticsLogger("log.csv")])
    assert float(read("log.csv")[-1]["loss"]) == float(trainer.callback_metrics["val_loss"])


def test_s4tf_layout_is_s4tfs():
    metrics = ["accuracy", "top5_accuracy", "perplexity"]
    _, model = fit([StatisticsRecorder(metrics), CSVStatisticsLogger("log.csv", layout="s4tf")])
    lines = Path("log.csv").read_text().splitlines()
    assert lines[0] == "epoch, batch, loss, accuracy, top5Accuracy, perplexity"
    values = expected_rows(model.seen)[0][2]
    numbers = ", ".join(str(np.float32(values[name])) for name in ("accuracy", "top5_accuracy"))
    assert lines[1].startswith("1/2, 1/3, ")
    assert f", {numbers}, " in lines[1]
    assert [line.split(", ")[:2] for line in lines[1:]] == [
        [f"{epoch}/2", f"{batch}/{of}"] for epoch in (1, 2) for of in (3, 2) for batch in range(1, of + 1)
    ]


def test_s4tf_layout_of_a_run_without_an_end():
    model = Classifier()
    fit([CSVStatisticsLogger("log.csv", layout="s4tf")], model, max_epochs=-1, max_steps=2)
    assert [row["epoch"] for row in read("log.csv")] == ["1/?"] * 2


def test_every_epoch_has_training_and_validation_in_one_row():
    _, model = fit(
        [CSVStatisticsLogger("log.csv", every="epoch"), StatisticsRecorder(["accuracy"])],
        max_epochs=4,
        check_val_every_n_epoch=2,
    )
    rows = read("log.csv")
    assert list(rows[0]) == [
        "epoch",
        "batch",
        "step",
        "lr",
        "train_loss",
        "train_accuracy",
        "time",
        "val_loss",
        "val_accuracy",
    ]
    assert [row["epoch"] for row in rows] == list("1234")
    assert [row["batch"] for row in rows] == ["3"] * 4
    assert [bool(row["val_loss"]) for row in rows] == [False, True, False, True]  # blank, never stale
    losses = [loss for phase, loss, *_ in model.seen if phase == "train"]
    expected = [sum(losses[first : first + 3]) / 3 for first in (0, 3, 6, 9)]
    assert [float(row["train_loss"]) for row in rows] == pytest.approx(expected)
    assert pandas.read_csv("log.csv").val_accuracy.notna().tolist() == [False, True, False, True]


def test_an_epochs_row_keeps_its_place_when_only_its_cells_were_restored():
    logger, recorder = CSVStatisticsLogger("log.csv", every="epoch"), StatisticsRecorder(["accuracy"])

    class Forgetting(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            logger._train = None  # as after a resume between training and validation

    fit([logger, recorder, Forgetting()])
    assert [(row["batch"], row["lr"]) for row in read("log.csv")] == [("3", "0.1")] * 2


def test_every_epoch_in_s4tf_layout():
    fit([CSVStatisticsLogger("log.csv", every="epoch", layout="s4tf"), StatisticsRecorder(["accuracy"])])
    rows = read("log.csv")
    assert [(row["epoch"], row["batch"]) for row in rows] == [("1/2", "3/3"), ("2/2", "3/3")]
    assert list(rows[0])[2:] == ["train_loss", "train_accuracy", "val_loss", "val_accuracy"]


def test_columns_choose_and_order():
    logger = CSVStatisticsLogger("log.csv", columns=["accuracy", "batch", "loss", "step"])
    fit([StatisticsRecorder(METRICS), logger])
    assert list(read("log.csv")[0]) == ["epoch", "batch", "accuracy", "loss", "step"]


def test_columns_that_the_recorder_does_not_have_are_refused_with_the_nearest():
    with pytest.raises(MisconfigurationException, match=r"`columns` must name .*'acuracy'; did you mean 'accuracy'\?"):
        fit([StatisticsRecorder(METRICS), CSVStatisticsLogger("log.csv", columns=["acuracy"])])
    logger = CSVStatisticsLogger("log.csv", columns=["zzz"], every="epoch", layout="s4tf")
    with pytest.raises(MisconfigurationException, match=r"'val_top5Accuracy', .*got 'zzz'\."):
        fit([StatisticsRecorder(METRICS), logger])
    assert not Path("log.csv").exists()


def test_a_column_that_stays_empty_is_said_at_the_end():
    """Without a recorder the names are not known before the module has logged them."""
    with pytest.warns(LightningPluginsWarning, match=r"`columns` names 'losss', .* logged; did you mean 'loss'\?"):
        fit([CSVStatisticsLogger("log.csv", columns=["loss", "losss"])])
    assert read("log.csv")[0]["loss"]


def test_without_a_recorder_there_is_the_loss_and_what_the_module_logs():
    class Logging(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_margin", loss * 2)
            self.log("both", loss * 3, on_step=True, on_epoch=True, prog_bar=True)
            return loss

        def validation_step(self, batch, batch_idx):
            loss = super().validation_step(batch, batch_idx)
            self.log("val_margin", loss * 2)
            return loss

    first, second = CSVStatisticsLogger("log.csv"), CSVStatisticsLogger("epochs.csv", every="epoch")
    trainer, model = fit([first, second], Logging)
    rows = read("log.csv")
    assert list(rows[0]) == [
        "epoch",
        "batch",
        "phase",
        "step",
        "lr",
        "loss",
        "train_margin",
        "both",
        "loss_step",
        "time",
        "val_margin",
    ]
    training = [loss for phase, loss, *_ in model.seen if phase == "train"]
    assert [float(row["train_margin"]) for row in rows if row["phase"] == "train"] == pytest.approx(
        [2 * loss for loss in training]
    )
    assert [float(row["both"]) for row in rows if row["both"]] == pytest.approx([3 * loss for loss in training])
    ends = [row for row in rows if row["val_margin"]]
    assert [(row["phase"], row["batch"]) for row in ends] == [("validation", "2")] * 2
    assert float(ends[-1]["val_margin"]) == pytest.approx(float(trainer.callback_metrics["val_margin"]))
    epochs = read("epochs.csv")
    assert float(epochs[-1]["val_val_margin"]) == pytest.approx(float(trainer.callback_metrics["val_margin"]))
    assert [type(callback).__name__ for callback in trainer.callbacks] == ["CSVStatisticsLogger"] * 2
    assert trainer.callback_metrics.keys() == {"train_margin", "both", "both_step", "both_epoch", "val_margin"}


def test_a_fresh_fit_moves_an_existing_file_aside_with_one_line(caplog):
    Path("log.csv").write_text("precious\n")
    with caplog.at_level("INFO"):
        fit([CSVStatisticsLogger("log.csv")])
    assert Path("log.1.csv").read_text() == "precious\n"
    assert len(read("log.csv")) == 10
    lines = [record.message for record in caplog.records if "was moved to" in record.message]
    assert lines == ["CSVStatisticsLogger: an earlier log.csv was moved to log.1.csv."]
    fit([CSVStatisticsLogger("log.csv")])
    assert len(read("log.2.csv")) == 10


def test_a_second_fit_of_the_same_callback_goes_on():
    logger, recorder = CSVStatisticsLogger("log.csv"), StatisticsRecorder()
    fit([logger, recorder])
    fit([logger, recorder])
    rows = read("log.csv")
    assert len(rows) == 20
    times = [float(row["time"]) for row in rows]
    assert times == sorted(times)
    assert not Path("log.1.csv").exists()


def test_a_second_fit_of_the_same_callback_from_a_checkpoint_writes_no_row_twice(tmp_path):
    logger, recorder = CSVStatisticsLogger("log.csv"), StatisticsRecorder()
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit([logger, recorder, checkpoint], enable_checkpointing=True, max_epochs=1)
    fit([logger, recorder, checkpoint], ckpt_path=tmp_path / "epoch=0.ckpt", enable_checkpointing=True)
    whole = without_time("log.csv")
    fit([logger, recorder, checkpoint], ckpt_path=tmp_path / "epoch=0.ckpt", enable_checkpointing=True)
    assert without_time("log.csv") == whole
    assert len(whole) == 1 + 10


def test_validate_test_and_fast_dev_run_write_nothing():
    logger = CSVStatisticsLogger("log.csv")
    trainer = trainer_of(pl, [logger, StatisticsRecorder()])
    trainer.validate(Classifier(), loaders()[1], verbose=False)
    trainer.test(Classifier(), loaders()[1], verbose=False)
    fit([logger], fast_dev_run=True)
    assert not list(Path().iterdir())


def test_construction_touches_no_file():
    CSVStatisticsLogger("deep/down/log.csv")
    assert not list(Path().iterdir())


def test_the_default_path_makes_its_directory():
    fit([CSVStatisticsLogger()])
    assert len(read("run/log.csv")) == 10


def test_wrong_arguments_are_refused_at_construction():
    with pytest.raises(ValueError, match=r"`path` must end in '\.csv', got 'log\.tsv'"):
        CSVStatisticsLogger("log.tsv")
    with pytest.raises(TypeError, match="`path` must be a path, got 3"):
        CSVStatisticsLogger(3)
    with pytest.raises(TypeError, match="`columns` must be a list of names, got 'loss'"):
        CSVStatisticsLogger(columns="loss")
    with pytest.raises(ValueError, match="`columns` must be distinct"):
        CSVStatisticsLogger(columns=["loss", "loss"])
    with pytest.raises(ValueError, match="`every` must be one of 'batch', 'epoch', got 'step'"):
        CSVStatisticsLogger(every="step")
    with pytest.raises(ValueError, match="`layout` must be one of 'numbers', 's4tf', got 'keras'"):
        CSVStatisticsLogger(layout="keras")
    with pytest.raises(ValueError, match="`flush_seconds` must be at least 0, got -1"):
        CSVStatisticsLogger(flush_seconds=-1)


@pytest.mark.parametrize("path", ["file/log.csv", "folder.csv"])
def test_a_path_that_cannot_be_written_is_refused_at_setup(path):
    Path("file").write_text("")
    Path("folder.csv").mkdir()
    with pytest.raises(MisconfigurationException, match="`path` must be a file that can be written, got '"):
        fit([CSVStatisticsLogger(path)])


def test_two_loggers_on_one_path_are_refused(tmp_path):
    with pytest.raises((MisconfigurationException, RuntimeError), match="Two CSVStatisticsLogger callbacks write to"):
        fit([CSVStatisticsLogger("log.csv"), CSVStatisticsLogger(tmp_path / "x" / ".." / "log.csv")])
    keys = {CSVStatisticsLogger("a.csv").state_key, CSVStatisticsLogger("b.csv").state_key}
    assert len(keys) == 2


@pytest.mark.parametrize(
    "two",
    [
        lambda: [TensorBoardStatisticsLogger("a", name="run"), TensorBoardStatisticsLogger("b/../a", name="run")],
        lambda: [ClassificationReport(2, path=["x.json", "r.txt"]), ClassificationReport(2, path="./r.txt")],
    ],
)
def test_two_that_write_anything_else_to_one_place_are_refused_as_well(two):
    with pytest.raises(
        MisconfigurationException, match=r"Two \w+ callbacks write to '.*'; give each its own `(root|path)`"
    ):
        fit(two())


def test_nan_and_infinity_are_written_as_such():
    class Diverging(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * [1.0, math.inf, math.nan][batch_idx]

    fit([StatisticsRecorder(["perplexity"]), CSVStatisticsLogger("log.csv")], Diverging, max_epochs=1)
    assert [row["loss"] for row in read("log.csv")][1:3] == ["inf", "nan"]
    assert np.isinf(pandas.read_csv("log.csv").perplexity[1])


def test_rows_are_on_disk_whenever_a_checkpoint_is_cut(tmp_path):
    lines = []

    class Spy(ModelCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            super()._save_checkpoint(trainer, filepath)
            lines.append(len(read("log.csv")))

    checkpoint = Spy(tmp_path / "c", every_n_train_steps=2, save_top_k=-1)
    fit([CSVStatisticsLogger("log.csv", flush_seconds=1000), checkpoint], enable_checkpointing=True)
    assert lines == [2, 6, 8]  # after steps 2, 4 and 6; two validation rows after step 3


def test_an_exception_loses_no_row_and_undoes_everything():
    class Dying(Classifier):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 4:
                raise KeyError("out of luck")
            return super().training_step(batch, batch_idx)

    logger = CSVStatisticsLogger("log.csv", flush_seconds=1000)
    trainer = trainer_of(pl, [logger])
    with pytest.raises(KeyError, match="out of luck"):
        trainer.fit(Dying(), *loaders())
    assert [row["batch"] for row in read("log.csv")] == ["1", "2", "3", "1", "2", "1"]
    assert trainer.callbacks == [logger]
    assert logger._recording is None


def test_a_keyboard_interrupt_loses_no_row():
    class Interrupted(Classifier):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 2:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    with pytest.raises(SystemExit):
        fit([StatisticsRecorder(), CSVStatisticsLogger("log.csv", flush_seconds=1000)], Interrupted)
    assert len(read("log.csv")) == 2


def test_a_callback_is_written_by_lightnings_cli(package):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--callbacks", type=list[package.Callback])
    text = """
callbacks:
- class_path: lightning_plugins.StatisticsRecorder
  init_args:
    metrics: [accuracy, {class_path: torchmetrics.classification.MulticlassF1Score, init_args: {num_classes: 3}}]
- class_path: lightning_plugins.CSVStatisticsLogger
  init_args: {path: runs/log.csv, columns: [loss], every: epoch}
- class_path: lightning_plugins.TensorBoardStatisticsLogger
  init_args: {root: runs/tb, axis: samples}
- class_path: lightning_plugins.ClassificationReport
  init_args: {num_classes: 3, target_names: [a, b, c], path: [a.txt, b.json]}
"""
    Path("config.yaml").write_text(text)
    parsed = parser.instantiate(parser.parse_object(_yaml(text)))
    assert parsed.callbacks[0].names == ("loss", "accuracy", "multiclass_f1_score")
    assert parsed.callbacks[1].columns == ("epoch", "batch", "loss")
    assert parsed.callbacks[3].paths == ("a.txt", "b.json")


def _yaml(text):
    import yaml

    return yaml.safe_load(text)


def test_a_module_of_the_other_package_is_logged_too(package):
    class Model(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 8)

        def training_step(self, batch, batch_idx):
            loss = torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
            self.log("logged", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = trainer_of(package, [CSVStatisticsLogger("log.csv")], max_epochs=1)
    trainer.fit(Model(), loaders()[0])
    rows = read("log.csv")
    losses = [float(row["loss"]) * float(row["batch"]) for row in rows]
    own = [losses[0], losses[1] - losses[0], losses[2] - losses[1]]
    assert [float(row["logged"]) for row in rows] == pytest.approx(own)
