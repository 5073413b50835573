"""The recorder in a real Trainer: every value recomputed by NumPy from what the module saw."""

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_plugins import ClassificationReport, StatisticsRecorder
from tests.support.statistics_runs import (
    CLASSIFIERS,
    METRICS,
    Classifier,
    Recording,
    dataset,
    expected_rows,
    fit,
    loaders,
    recorded,
    trainer_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


@pytest.mark.parametrize("returns", ["loss", "dict"])
def test_every_row_equals_a_recomputation(package, returns):
    _, model, reader = recorded(model=CLASSIFIERS[package](returns), package=package)
    expected = expected_rows(model.seen)
    assert len(expected) == len(reader.rows) == 2 * (3 + 2)
    for row, (phase, batch, values) in zip(reader.rows, expected, strict=True):
        assert (row.phase, row.batch) == (phase, batch)
        assert row.values == pytest.approx(values, rel=1e-6)
        assert list(row.values) == ["loss", *METRICS]


def test_rows_know_where_they_are():
    _, _, reader = recorded()
    # 40 samples in batches of 16: 3 batches, the last of 8; 20 in validation: 2 batches
    assert [(row.phase, row.epoch, row.batch, row.batches, row.step, row.samples) for row in reader.rows] == [
        ("train", 1, 1, 3, 1, 16),
        ("train", 1, 2, 3, 2, 32),
        ("train", 1, 3, 3, 3, 40),
        ("validation", 1, 1, 2, 3, 40),
        ("validation", 1, 2, 2, 3, 40),
        ("train", 2, 1, 3, 4, 56),
        ("train", 2, 2, 3, 5, 72),
        ("train", 2, 3, 3, 6, 80),
        ("validation", 2, 1, 2, 6, 80),
        ("validation", 2, 2, 2, 6, 80),
    ]
    assert all(row.epochs == 2 for row in reader.rows)
    assert [row.phase for row in reader.ends] == ["train", "validation"] * 2
    seconds = [row.seconds for row in reader.rows]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_the_loss_is_the_users_and_not_the_divided_one(accumulate):
    _, model, reader = recorded([], accumulate_grad_batches=accumulate)
    for row, (*_, values) in zip(reader.rows, expected_rows(model.seen), strict=True):
        assert row.values["loss"] == pytest.approx(values["loss"], rel=1e-7)


def test_the_loss_of_manual_optimization_is_not_multiplied():
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = self._step("train", batch)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            return loss

    _, model, reader = recorded([], model=Manual())
    for row, (*_, values) in zip(reader.rows, expected_rows(model.seen), strict=True):
        assert row.values["loss"] == pytest.approx(values["loss"], rel=1e-7)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_skipped_batch_counts_nowhere():
    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else self._step("train", batch)

    _, model, reader = recorded(["accuracy"], model=Skipping())
    rows = [row for row in reader.rows if row.phase == "train"]
    assert [row.batch for row in rows] == [1, 3, 1, 3]
    expected = [values for phase, _, values in expected_rows(model.seen) if phase == "train"]
    assert [row.values["loss"] for row in rows] == pytest.approx([values["loss"] for values in expected])


def test_a_batch_that_another_callback_cancelled_counts_nowhere():
    class Cancelling(pl.Callback):
        batch_cancelled = False

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batch_cancelled = batch_idx == 1

    _, _, reader = recorded(["accuracy"], callbacks=[Cancelling()])
    assert [row.batch for row in reader.rows if row.phase == "train"] == [1, 3, 1, 3]


def test_validations_inside_an_epoch_do_not_disturb_the_training_statistics():
    _, model, reader = recorded(["accuracy"], val_check_interval=1)
    training = [row for row in reader.rows if row.phase == "train"]
    losses = [loss for phase, loss, *_ in model.seen if phase == "train"]
    assert [row.values["loss"] for row in training] == pytest.approx(
        [sum(losses[e : e + b]) / b for e in (0, 3) for b in (1, 2, 3)]
    )
    assert len([row for row in reader.ends if row.phase == "validation"]) == 6


def test_the_sanity_check_is_never_recorded():
    with_check = recorded(["accuracy"], num_sanity_val_steps=2)[2]
    without = recorded(["accuracy"], num_sanity_val_steps=0)[2]
    assert [row.values for row in with_check.rows] == [row.values for row in without.rows]


def test_checkpoints_and_early_stopping_can_monitor(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_accuracy", mode="max", filename="{epoch}-{val_accuracy:.4f}")
    stopping = EarlyStopping("train_loss", patience=5, check_on_train_epoch_end=True)
    trainer, _, reader = recorded(["accuracy"], callbacks=[stopping, checkpoint], enable_checkpointing=True)
    best = max(row.values["accuracy"] for row in reader.ends if row.phase == "validation")
    assert float(checkpoint.best_model_score) == best
    assert f"{best:.4f}" in checkpoint.best_model_path
    assert float(stopping.best_score) == pytest.approx(
        min(row.values["loss"] for row in reader.ends if row.phase == "train")
    )
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy"} <= trainer.callback_metrics.keys()


def test_running_values_can_be_monitored_within_an_epoch(tmp_path):
    seen = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(
                (float(trainer.callback_metrics["train_loss"]), float(trainer.callback_metrics["train_accuracy"]))
            )

    checkpoint = ModelCheckpoint(tmp_path, monitor="train_loss", every_n_train_steps=1, save_top_k=-1)
    _, _, reader = recorded(["accuracy"], callbacks=[Spy(), checkpoint], enable_checkpointing=True)
    rows = [row for row in reader.rows if row.phase == "train"]
    assert [loss for loss, _ in seen] == pytest.approx([row.values["loss"] for row in rows])
    assert [accuracy for _, accuracy in seen] == pytest.approx([row.values["accuracy"] for row in rows])
    assert float(checkpoint.best_model_score) == pytest.approx(min(row.values["loss"] for row in rows))


def test_what_the_module_logs_under_the_same_name_stays_the_modules(tmp_path):
    class Logging(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 7.0)
            return self._step("validation", batch)

    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer, _, _ = recorded([], model=Logging(), callbacks=[checkpoint], enable_checkpointing=True)
    assert float(checkpoint.best_model_score) == 7.0
    assert float(trainer.callback_metrics["val_loss"]) == 7.0


def test_validate_and_test_publish_too():
    recorder = StatisticsRecorder(["accuracy"])
    trainer = trainer_of(pl, [recorder])
    model = Classifier()
    trainer.validate(model, loaders()[1], verbose=False)
    expected = expected_rows(model.seen)[-1][2]
    assert float(trainer.callback_metrics["val_accuracy"]) == pytest.approx(expected["accuracy"])
    model.seen.clear()
    trainer.test(model, loaders()[1], verbose=False)
    assert float(trainer.callback_metrics["test_loss"]) == pytest.approx(
        expected_rows([("train", *part[1:]) for part in model.seen])[-1][2]["loss"]
    )


def test_every_epoch_gives_one_row_per_phase_and_nothing_before():
    seen = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append("train_loss" in trainer.callback_metrics)

    recorder = StatisticsRecorder(["accuracy", torchmetrics.classification.MulticlassAccuracy(8)], every="epoch")
    reader = Recording()
    recorder.subscribe(reader)
    fit([recorder, Spy()], max_epochs=1)
    assert [(row.phase, row.batch) for row in reader.rows] == [("train", 3), ("validation", 2)]
    assert seen == [False, False, True]  # the epoch's last batch ends the phase
    assert list(reader.rows[0].values) == ["loss", "accuracy", "multiclass_accuracy"]


def test_a_torchmetrics_object_has_a_value_in_every_row():
    metric = torchmetrics.classification.MulticlassAccuracy(8, average="micro")
    _, _, reader = recorded(["accuracy", {"mine": metric}["mine"]])
    assert all(row.values["multiclass_accuracy"] == pytest.approx(row.values["accuracy"]) for row in reader.rows)


def test_the_trainers_own_loggers_get_the_statistics_on_request(tmp_path):
    class Logger(pl.loggers.logger.DummyLogger):
        def __init__(self):
            super().__init__()
            self.calls = []

        def log_metrics(self, metrics, step=None):
            self.calls.append((step, metrics))

    logger = Logger()
    recorder = StatisticsRecorder(["accuracy"], log=True)
    fit([recorder], logger=logger, log_every_n_steps=2)
    steps = [(step, sorted(metrics)) for step, metrics in logger.calls]
    train, val = ["epoch", "train_accuracy", "train_loss"], ["epoch", "val_accuracy", "val_loss"]
    # steps 2, 4 and 6 are logged; so are the phase ends at 3 and 6
    assert steps == [(2, train), (3, train), (3, val), (4, train), (6, train), (6, train), (6, val)]


def test_predictions_come_from_a_key_a_function_or_a_submodule():
    class Hidden(Classifier):
        def _step(self, phase, batch):
            return {
                "loss": torch.nn.functional.cross_entropy(z := self.layer(batch[0]), batch[1]),
                "scores": z,
                "truth": batch[1],
            }

    rows = []
    for options in (
        {"predictions": "scores"},
        {"predictions": "layer"},
        {"predictions": lambda outputs, batch: outputs["scores"]},
        {"predictions": lambda outputs, batch: outputs["scores"].argmax(1), "targets": "truth"},
        {"predictions": "tests.support.cases.scores", "targets": "tests.support.cases.truth"},
        {"predictions": "scores", "targets": lambda outputs, batch: batch[1]},
    ):
        recorder = StatisticsRecorder(["accuracy"], **options)
        recorder.subscribe(reader := Recording())
        fit([recorder], Hidden, max_epochs=1)
        rows.append([row.values["accuracy"] for row in reader.rows])
    assert all(values == rows[0] for values in rows)


def test_a_batch_that_goes_through_in_pieces_is_counted_whole():
    class Pieces(Classifier):
        def _step(self, phase, batch):
            self(batch[0])  # an attempt that came to nothing
            parts = [self(part) for part in batch[0].split(5)]
            self.seen.append((phase, torch.cat(parts).argmax(1).eq(batch[1]).float().mean().item()))
            return torch.nn.functional.cross_entropy(torch.cat(parts), batch[1])

    _, model, reader = recorded(["accuracy"], model=Pieces(), max_epochs=1, num_sanity_val_steps=0)
    firsts = dict(reversed(model.seen))
    assert {row.phase: row.values["accuracy"] for row in reader.rows if row.batch == 1} == pytest.approx(firsts)


def test_nothing_is_remembered_that_nobody_will_ask_for():
    recorder, report = StatisticsRecorder(["accuracy"]), ClassificationReport(8)
    kept = []

    class Spy(pl.Callback):
        def on_validation_batch_start(self, trainer, *args):
            kept.append(len(recorder.recording.sources._captured) + len(report._sources._captured))

        on_predict_batch_end = on_validation_batch_start

    trainer, model = fit([recorder, report, Spy()])
    trainer.predict(model, DataLoader(dataset(8).tensors[0]))
    assert kept == [0] * (2 + 4 + 8)
    assert not model._forward_hooks


def test_a_recorder_of_the_loss_alone_listens_to_no_module():
    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            assert not pl_module._forward_hooks

    recorded([], callbacks=[Spy()], max_epochs=1)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_predictions_of_a_skipped_batch_are_never_those_of_the_next():
    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0]) if batch_idx == 0 else self.layer(batch[0])
            return torch.nn.functional.cross_entropy(logits, batch[1]) if batch_idx else None

    with pytest.raises(ValueError, match="found no predictions"):
        fit([StatisticsRecorder(["accuracy"])], Skipping(), num_sanity_val_steps=0, limit_train_batches=2)


class Bare(Classifier):
    def _step(self, phase, batch):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])


def test_a_step_that_gives_no_predictions_is_told_what_was_looked_for():
    message = r"found no predictions: the step returned a dict with the keys 'loss' \(looked for 'logits' or 'preds'\)"
    with pytest.raises(ValueError, match=message + ".*Return them from the step, or name them"):
        fit([StatisticsRecorder(["accuracy"])], Bare(), num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=r"looked for 'scores'.* and no submodule of that name returned scores"):
        fit([StatisticsRecorder(["accuracy"], predictions="scores")], Bare(), num_sanity_val_steps=0)


def test_a_batch_without_targets_is_told_what_was_looked_for():
    class Dicts(Classifier):
        def training_step(self, batch, batch_idx):
            return self(batch["x"]).sum()

    data = DataLoader([{"x": torch.zeros(6)} for _ in range(4)], batch_size=2)
    with pytest.raises(ValueError, match=r"found no targets.* and the batch, a dict, has no second item"):
        fit([StatisticsRecorder(["accuracy"])], Dicts(), data=(data, None))
    with pytest.raises(ValueError, match=r"looked for 'no\.truth'\) and it is no function's import path"):
        fit([StatisticsRecorder(["accuracy"], targets="no.truth")], Dicts(), data=(data, None))
    with pytest.raises(TypeError, match="The targets must be a tensor, got str"):
        fit([StatisticsRecorder(["accuracy"], targets=lambda outputs, batch: "x")], Dicts(), data=(data, None))
