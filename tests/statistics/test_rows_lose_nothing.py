"""Whatever the module logs is in every file, with a recorder and without; and what belongs in no row is in none."""

import copy
import csv
import pickle
import re
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pandas
import pytest
import torchmetrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_plugins import (
    ClassificationReport,
    CSVStatisticsLogger,
    StatisticsRecorder,
    TensorBoardStatisticsLogger,
)
from tests.support.statistics_runs import Classifier, Recording, dataset, expected_rows, fit, loaders, read

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Logging(Classifier):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_margin", loss * 2)
        self.log("accuracy", loss * 5)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = super().validation_step(batch, batch_idx)
        self.log("val_acc", loss * 3)
        self.log("val_loss", loss)
        return loss


def several_loaders():
    train, validation = loaders()
    return train, [validation, DataLoader(dataset(24, seed=9), batch_size=8)]


def tags(logger, phase):
    accumulator = EventAccumulator(str(logger.run_directory / phase)).Reload()
    return {tag: [event.value for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


@pytest.mark.parametrize("recorder", [[], [StatisticsRecorder(["accuracy"])]], ids=["without", "with"])
def test_what_the_module_logs_stays(recorder):
    board = TensorBoardStatisticsLogger("tb")
    trainer, model = fit([*copy.deepcopy(recorder), CSVStatisticsLogger("log.csv"), board], Logging)
    frame = pandas.read_csv("log.csv")
    training = [loss for phase, loss, *_ in model.seen if phase == "train"]
    assert frame[frame.phase == "train"].train_margin.to_numpy() == pytest.approx(2 * np.array(training))
    name = "logged_accuracy" if recorder else "accuracy"
    assert frame[frame.phase == "train"][name].to_numpy() == pytest.approx(5 * np.array(training))
    last = frame[frame.phase == "validation"].groupby("epoch").last()
    assert last.val_acc.to_numpy()[-1] == pytest.approx(float(trainer.callback_metrics["val_acc"]))
    found = tags(board, "validation")
    assert found["epoch_acc"][-1] == pytest.approx(last.val_acc.to_numpy()[-1])
    # weighted by batch size, as Lightning's is, it is another number than the recorder's own
    assert found["epoch_val_loss"][-1] == pytest.approx(last.val_loss.to_numpy()[-1])
    assert found["epoch_loss"][-1] == pytest.approx(last.loss.to_numpy()[-1])
    assert "batch_margin" in tags(board, "train")


@pytest.mark.parametrize("recorder", [[], [StatisticsRecorder(["accuracy"])]], ids=["without", "with"])
@pytest.mark.parametrize("every", ["batch", "epoch"])
def test_several_validation_loaders_have_what_the_module_logs_for_each(recorder, every):
    board = TensorBoardStatisticsLogger("tb")
    callbacks = [*copy.deepcopy(recorder), CSVStatisticsLogger("log.csv", every=every), board]
    trainer, _ = fit(callbacks, Logging, data=several_loaders(), max_epochs=1)
    row = read("log.csv")[-1]
    for loader in (0, 1):
        name = f"val_acc/dataloader_idx_{loader}"
        expected = float(trainer.callback_metrics[name])
        assert float(row[name if every == "batch" else f"val_{name}"]) == pytest.approx(expected)
        assert tags(board, "validation")[f"epoch_acc/dataloader_idx_{loader}"] == [pytest.approx(expected)]


class Quiet(Classifier):
    """Returns nothing from its validation, as chemprop and scvi-tools do."""

    name = "val_loss"

    def validation_step(self, batch, batch_idx):
        self.log(self.name, super().validation_step(batch, batch_idx))


@pytest.mark.parametrize("name", ["val_loss", "val/loss", "loss", "validation_loss"])
@pytest.mark.parametrize("recorder", [[], [StatisticsRecorder()], [StatisticsRecorder(["accuracy"])]])
def test_a_validation_that_returns_nothing_has_the_loss_that_it_logs(name, recorder, caplog):
    caplog.set_level("INFO")
    model = Quiet()
    model.name = name
    trainer, _ = fit([*copy.deepcopy(recorder), CSVStatisticsLogger("log.csv")], model)
    rows = [row for row in read("log.csv") if row["phase"] == "validation"]
    assert [row["batch"] for row in rows] == ["1", "2"] * 2
    losses, sizes = np.array([part[1] for part in model.seen if part[0] == "validation"]), [16, 4]
    epochs = losses.reshape(2, 2)
    running = [value for epoch in epochs for value in (epoch[0], np.average(epoch, weights=sizes))]
    assert [float(row["loss"]) for row in rows] == pytest.approx(running, rel=1e-6)
    assert float(rows[-1]["loss"]) == pytest.approx(float(trainer.callback_metrics[name]))
    if recorder:
        assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(running[-1], rel=1e-6)
    assert "logs none" not in caplog.text


def test_the_losses_that_several_validation_loaders_log_are_kept_apart_and_together():
    class Two(Quiet):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch, batch_idx)

    recorder = StatisticsRecorder()
    recorder.subscribe(reader := Recording())
    _, model = fit([recorder], Two(), data=several_loaders(), max_epochs=1, num_sanity_val_steps=0)
    parts = [(part[1], len(part[3])) for part in model.seen if part[0] == "validation"]
    found, half = reader.ends[-1].values, len(parts) // 2
    for suffix, own in (("", parts), ("/dataloader_idx_0", parts[:half]), ("/dataloader_idx_1", parts[half:])):
        losses, sizes = zip(*own, strict=True)
        assert found[f"loss{suffix}"] == pytest.approx(np.average(losses, weights=sizes), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "options"),
    [
        ("val_margin", float, {}),
        ("val_loss", float, {"on_step": True, "on_epoch": False}),
        ("val_loss", float, {"reduce_fx": "max"}),
        ("val_loss", torchmetrics.MeanMetric, {}),
    ],
    ids=["another name", "for a batch alone", "no mean", "a metric"],
)
def test_what_is_logged_and_no_mean_of_losses_is_not_taken_for_one(name, value, options, caplog):
    caplog.set_level("INFO")

    class Other(Classifier):
        def __init__(self):
            super().__init__()
            self.value = value() if value is not float else None

        def validation_step(self, batch, batch_idx):
            loss = super().validation_step(batch, batch_idx)
            if self.value is not None:
                self.value.update(loss)
            self.log(name, loss if self.value is None else self.value, **options)

    fit([CSVStatisticsLogger("log.csv")], Other(), max_epochs=1)
    rows = [row for row in read("log.csv") if row["phase"] == "validation"]
    assert [row["loss"] for row in rows] == ["", ""]
    assert "the step returns no loss and logs none, so validation has none either" in caplog.text


def test_a_training_by_hand_that_returns_no_loss_says_so_once(caplog):
    caplog.set_level("INFO")

    class ByHand(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            self.optimizers().step()
            self.log("train_mine", loss)

    fit([CSVStatisticsLogger("log.csv")], ByHand())
    rows = [row for row in read("log.csv") if row["phase"] == "train"]
    assert all(row["loss"] == "" and row["train_mine"] for row in rows)
    assert caplog.text.count("the training step returns no loss, so training has none") == 1


def test_of_two_losses_that_a_validation_logs_its_own_is_taken():
    class Both(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("loss", 7.0)
            self.log("val_loss", 3.0)

    fit([CSVStatisticsLogger("log.csv")], Both(), max_epochs=1)
    assert [float(row["loss"]) for row in read("log.csv") if row["phase"] == "validation"] == [3.0, 3.0]


def test_a_validation_that_does_nothing_that_is_seen_counts_nowhere_and_says_so(caplog):
    class Hidden(Classifier):
        def validation_step(self, batch, batch_idx):
            self.layer(batch[0])

    caplog.set_level("INFO")
    for options, batches in (({}, []), ({"predictions": lambda outputs, batch: batch[0]}, [1, 2])):
        caplog.clear()
        recorder = StatisticsRecorder(["accuracy"], **options)
        recorder.subscribe(reader := Recording())
        fit([recorder], Hidden(), max_epochs=1, num_sanity_val_steps=0)
        said = [record.message for record in caplog.records if "does not call the module" in record.message]
        assert len(said) == (not batches)
        assert [row.batch for row in reader.rows if row.phase == "validation"] == batches


def test_a_loss_that_a_later_validation_logs_under_another_name_is_found():
    class Renaming(Quiet):
        def validation_step(self, batch, batch_idx):
            self.name = "loss" if self.current_epoch else "val_loss"
            super().validation_step(batch, batch_idx)

    trainer, _ = fit([CSVStatisticsLogger("log.csv")], Renaming(), num_sanity_val_steps=0)
    assert float(read("log.csv")[-1]["loss"]) == pytest.approx(float(trainer.callback_metrics["loss"]))


@pytest.mark.filterwarnings("ignore:.*None")
@pytest.mark.parametrize("metrics", [[], ["accuracy"]])
def test_batches_of_none_count_nowhere(metrics, caplog):
    caplog.set_level("INFO")

    class Gaps(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch is None else super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            return None if batch is None else super().validation_step(batch, batch_idx)

    def run(between):
        recorder = StatisticsRecorder(metrics)
        recorder.subscribe(reader := Recording())
        data = [
            DataLoader(between(list(loader)), batch_size=None, collate_fn=lambda batch: batch) for loader in loaders()
        ]
        fit([recorder], Gaps, data=data, num_sanity_val_steps=0)
        return [(row.phase, row.values, row.loss_step) for row in reader.rows]

    assert run(lambda batches: [None, *batches[:1], None, None, *batches[1:], None]) == run(lambda batches: batches)
    # that is said of batches that a step was given, and did nothing with
    assert "counts nowhere" not in caplog.text


def test_a_metric_that_cannot_be_computed_yet_is_blank_and_says_so_once(caplog):
    class Regression(Classifier):
        def training_step(self, batch, batch_idx):
            prediction = self(batch[0])[:, 0]
            target = batch[1].float()
            return {"loss": (prediction - target).square().mean(), "preds": prediction, "target": target}

    data = DataLoader(dataset(3), batch_size=1), None
    caplog.set_level("INFO")
    fit([StatisticsRecorder([torchmetrics.R2Score()]), CSVStatisticsLogger("log.csv")], Regression, data=data)
    cells = [row["r2_score"] for row in read("log.csv")]
    assert [bool(cell) for cell in cells] == [False, True, True] * 2
    said = [record.message for record in caplog.records if "cannot be computed yet" in record.message]
    assert len(said) == 1
    assert "'r2_score' cannot be computed yet and stays blank until it can: Needs at least two samples" in said[0]


@pytest.mark.parametrize(
    "metrics",
    [["top5_accuracy"], ["matthews_correlation_coefficient"], ["accuracy", "perplexity"], [torchmetrics.MeanMetric()]],
    ids=["top5", "mcc", "names", "object"],
)
def test_every_recorder_and_what_reads_it_pickles_and_copies(metrics):
    callbacks = [
        StatisticsRecorder(metrics),
        CSVStatisticsLogger("log.csv"),
        TensorBoardStatisticsLogger("tb"),
        ClassificationReport(8),
    ]
    for twin in (pickle.loads(pickle.dumps(callbacks)), copy.deepcopy(callbacks)):
        assert twin[0].names == callbacks[0].names
    if torchmetrics.MeanMetric not in map(type, metrics):
        fit(callbacks, max_epochs=1)
        assert pickle.loads(pickle.dumps(callbacks))[0].state_dict() == callbacks[0].state_dict()
        copy.deepcopy(callbacks)


def test_the_batchs_own_loss_stands_beside_the_running_mean():
    recorder = StatisticsRecorder([])
    recorder.subscribe(reader := Recording())
    _, model = fit([recorder, CSVStatisticsLogger("log.csv"), board := TensorBoardStatisticsLogger("tb")],
                   accumulate_grad_batches=2)  # fmt: skip
    losses = [loss for _, loss, *_ in model.seen]
    assert [row.loss_step for row in reader.rows] == pytest.approx(losses, rel=1e-6)
    assert [float(row["loss_step"]) for row in read("log.csv")] == pytest.approx(losses, rel=1e-6)
    steps = [losses[place] for place in (1, 2, 6, 7)]  # the batches that stepped: two and the epoch's last
    assert tags(board, "train")["batch_loss_step"] == pytest.approx(steps, rel=1e-6)
    assert "loss_step" not in Path("log.csv").read_text().splitlines()[0].split(",")[:5]


class Dicts(Classifier):
    """Batches as Hugging Face's collators make them."""

    def _step(self, phase, batch):
        return super()._step(phase, (batch["x"], batch["labels"]))

    def forward(self, x):
        return self.layer(x)


def test_labels_in_a_batch_that_is_a_dict_are_found_by_themselves_and_by_name():
    samples = [{"x": x, "labels": y, "weight": 1.0} for x, y in dataset(40, seed=1)]
    data = DataLoader(samples, batch_size=16), DataLoader(samples[:20], batch_size=16)
    rows = []
    for options in ({}, {"targets": "labels"}, {"targets": lambda outputs, batch: batch["labels"]}):
        recorder = StatisticsRecorder(["accuracy"], **options)
        recorder.subscribe(reader := Recording())
        _, model = fit([recorder], Dicts, data=data, max_epochs=1)
        rows.append([row.values["accuracy"] for row in reader.rows])
    assert rows[0] == rows[1] == rows[2] == pytest.approx([v["accuracy"] for *_, v in expected_rows(model.seen)])


def test_two_entries_that_may_be_the_targets_are_refused_by_name():
    samples = [{"x": x, "labels": y, "target": y} for x, y in dataset(8)]
    data = DataLoader(samples, batch_size=4), None
    with pytest.raises(ValueError, match=r"The batch has 'target' and 'labels', .* as in targets='target'"):
        fit([StatisticsRecorder(["accuracy"])], Dicts, data=data)


def test_the_progress_bar_shows_what_was_chosen_and_fits_80_columns(capsys):
    bar = pl.callbacks.TQDMProgressBar(refresh_rate=1)
    metrics = ["accuracy", "top5_accuracy", "perplexity", "matthews_correlation_coefficient"]
    fit([StatisticsRecorder(metrics), bar], enable_progress_bar=True, data=loaders(1600, 4), max_epochs=1)
    lines = [line for line in capsys.readouterr().out.replace("\n", "\r").split("\r") if "Epoch" in line]
    assert lines
    # the bar itself takes what is left
    assert max(len(re.sub(r"\|[^|]*\|", "||", line).rstrip()) for line in lines) < 80
    assert "loss=" in lines[-1]
    assert "val_loss=" in lines[-1]
    assert "accuracy" not in lines[-1]
    with pytest.raises(ValueError, match=r"`progress_bar` must name some of 'loss', 'accuracy', got 'acuracy'"):
        StatisticsRecorder(["accuracy"], progress_bar=["acuracy"])


@pytest.mark.parametrize("layout", ["numbers", "s4tf"])
def test_what_is_logged_under_odd_names_has_columns_that_are_read_back(layout):
    class Odd(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for name in ("a, b", 'the "loss"', "two\nlines", "late\r\nname" if self.current_epoch else "\u03bb/x"):
                self.log(name, float(batch_idx))
            return loss

    fit(
        [CSVStatisticsLogger("log.csv", layout=layout, flush_seconds=0)], Odd(), data=(loaders()[0], None), max_epochs=2
    )
    with Path("log.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, skipinitialspace=True))
    names = ["a, b", 'the "loss"', "two lines"]
    assert [[row[name] for name in names] for row in rows] == [[f"{n}.0"] * 3 for n in (0, 1, 2)] * 2
    assert [row["\u03bb/x"] or row["late name"] for row in rows] == ["0.0", "1.0", "2.0"] * 2
    assert None not in rows[0]


@pytest.mark.parametrize("number", [float, np.float32, np.float64, np.int64])
def test_a_loss_that_is_a_number_counts_whatever_its_kind(number):
    class Plain(Classifier):
        def validation_step(self, batch, batch_idx):
            return {"loss": number(2 + batch_idx)}

    trainer, _ = fit([StatisticsRecorder()], Plain(), max_epochs=1)
    assert float(trainer.callback_metrics["val_loss"]) == np.mean([2 + n for n in range(len(loaders()[1]))])
