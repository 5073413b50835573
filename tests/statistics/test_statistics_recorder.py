"""The recorder in a real Trainer: every value recomputed by NumPy from what the module saw."""

import copy
import math
import pickle
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader

from lightning_plugins import ClassificationReport, CSVStatisticsLogger, StatisticsRecorder
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.statistics.recording import Recording as RunRecording
from tests.support.statistics_runs import (
    Classifier,
    Recording,
    dataset,
    expected_rows,
    fit,
    loaders,
    trainer_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

METRICS = ["accuracy", "top5_accuracy", "perplexity"]


def recorded(metrics=METRICS, model=None, callbacks=(), **options):
    recorder = StatisticsRecorder(metrics)
    reader = Recording()
    recorder.subscribe(reader)
    trainer, model = fit([recorder, *callbacks], model, **options)
    return trainer, model, reader


@pytest.mark.parametrize("returns", ["loss", "dict"])
def test_every_row_equals_a_recomputation(package, returns):
    if package is not pl:

        class Model(package.LightningModule):
            __init__ = Classifier.__init__
            forward, _step = Classifier.forward, Classifier._step
            training_step, validation_step = Classifier.training_step, Classifier.validation_step
            configure_optimizers = Classifier.configure_optimizers

        Model.__init__ = _init_of(package.LightningModule)
        model = Model(returns)
    else:
        model = Classifier(returns)
    _, model, reader = recorded(model=model, package=package)
    expected = expected_rows(model.seen)
    assert len(expected) == len(reader.rows) == 2 * (3 + 2)
    for row, (phase, batch, values) in zip(reader.rows, expected, strict=True):
        assert (row.phase, row.batch) == (phase, batch)
        assert row.values == pytest.approx(values, rel=1e-6)
        assert list(row.values) == ["loss", *METRICS]


def _init_of(base):
    def __init__(self, returns="loss", lr=0.1, classes=8):
        base.__init__(self)
        self.layer = torch.nn.Linear(6, classes)
        self.returns, self.lr, self.seen = returns, lr, []

    return __init__


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


def test_the_loss_of_manual_optimisation_is_not_multiplied():
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
    import inspect

    return any("lightning_plugins/statistics" in frame.filename for frame in inspect.stack()[2:8])


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

    trainer, model = fit([recorder, report, Spy()])
    assert set(kept) == {0}
    assert len(kept) == 2 + 4
    trainer.predict(model, DataLoader(dataset(8).tensors[0]))
    assert not model._forward_hooks


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


def test_wrong_arguments_are_refused_at_construction():
    with pytest.raises(
        TypeError, match=r"`predictions` must be a key, a function of \(outputs, batch\) or None, got 3"
    ):
        StatisticsRecorder(predictions=3)
    with pytest.raises(TypeError, match="`targets` must be"):
        StatisticsRecorder(targets=3)
    with pytest.raises(ValueError, match="`every` must be one of 'batch', 'epoch', got 'step'"):
        StatisticsRecorder(every="step")


def test_two_recorders_in_one_trainer_are_refused():
    callbacks = [StatisticsRecorder(), StatisticsRecorder(["accuracy"])]
    assert callbacks[0].state_key != callbacks[1].state_key
    with pytest.raises(MisconfigurationException, match="takes one StatisticsRecorder, got 2: give all metrics to one"):
        fit(callbacks)


def test_a_validation_that_returns_no_loss_has_the_other_statistics():
    class Quiet(Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)

    trainer, model, reader = recorded(["accuracy", "perplexity"], model=Quiet())
    rows = [row for row in reader.rows if row.phase == "validation"]
    assert all(list(row.values) == ["accuracy"] for row in rows)
    expected = [values["accuracy"] for phase, _, values in expected_rows(model.seen) if phase == "validation"]
    assert [row.values["accuracy"] for row in rows] == pytest.approx(expected)
    assert "val_loss" not in trainer.callback_metrics
    assert not [row for row in recorded([], model=Quiet())[2].rows if row.phase == "validation"]


def test_a_rate_is_the_one_the_batch_was_trained_with():
    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    _, _, reader = recorded([], model=Scheduled())
    assert [row.lr for row in reader.rows if row.phase == "train"] == pytest.approx([1 / n for n in range(1, 7)])
    assert {row.lr for row in reader.rows if row.phase == "validation"} == {None}


def test_a_rate_that_is_a_tensor_stays_on_its_device_until_the_row_is_read():
    class Tensor(Classifier):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=torch.tensor(0.25), foreach=False)

    _, _, reader = recorded([], model=Tensor())
    assert {row.lr for row in reader.rows if row.phase == "train"} == {0.25}


def test_the_hook_on_the_module_is_gone_afterwards():
    model = Classifier()
    fit([StatisticsRecorder(["accuracy"])], model)
    assert not model._forward_hooks

    class Dying(Classifier):
        def validation_step(self, batch, batch_idx):
            raise KeyError("out of luck")

    model = Dying()
    with pytest.raises(KeyError, match="out of luck"):
        fit([StatisticsRecorder(["accuracy"])], model)
    assert not model._forward_hooks


def test_a_recorder_pickles_copies_and_fits_twice():
    recorder = pickle.loads(pickle.dumps(StatisticsRecorder(["accuracy"])))
    recorder = copy.deepcopy(recorder)
    recorder.subscribe(reader := Recording())
    fit([recorder], max_epochs=1)
    fit([recorder], max_epochs=1)
    first, second = reader.rows[:5], reader.rows[5:]
    assert [row.values for row in first] == [row.values for row in second]
    assert second[0].seconds >= first[-1].seconds
    assert second[-1].samples == 80


def test_a_run_of_unknown_length_ends_its_phases_too():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(x, y) for x, y in dataset(20)])

    _, _, reader = recorded(
        ["accuracy"],
        data=(DataLoader(Stream(), batch_size=8), DataLoader(Stream(), batch_size=8)),
        max_epochs=-1,
        max_steps=5,
    )
    assert [row.batches for row in reader.rows][:6] == [None] * 6
    assert [(row.phase, row.batch) for row in reader.ends] == [
        ("train", 3),
        ("validation", 3),
        ("train", 2),
    ]
    assert reader.rows[0].epochs is None


def test_state_is_plain_and_loads_with_weights_only(tmp_path):
    recorder = StatisticsRecorder(["accuracy", torchmetrics.classification.MulticlassAUROC(8)], every="epoch")
    trainer, _ = fit([recorder], data=(DataLoader(dataset(80), batch_size=80), None), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][recorder.state_key]
    assert loaded["version"] == 1
    assert loaded["train"]["sums"][1:] == [float(v) for v in recorder.state_dict()["train"]["sums"][1:]]
    assert math.isclose(loaded["seconds"], recorder.state_dict()["seconds"])


def test_loggers_and_recorder_give_the_same_file_in_any_order():
    files = []
    for index, order in enumerate((lambda a, b: [a, b], lambda a, b: [b, a])):
        logger = CSVStatisticsLogger(f"order{index}.csv", columns=["loss", "accuracy", "lr"])
        fit(order(StatisticsRecorder(["accuracy"]), logger))
        files.append(Path(logger.path).read_text())
    assert files[0] == files[1]


def test_of_several_ranks_one_takes_the_state_of_all_and_the_others_none():
    first = StatisticsRecorder(["accuracy"])
    fit([first], max_epochs=1)
    state = first.state_dict()
    taken = []
    for chief in (True, False):
        recorder = StatisticsRecorder(["accuracy"])
        recorder.recording.restore(state, torch.device("cpu"), chief=chief)
        taken.append(recorder.state_dict())
    assert taken[0]["train"] == state["train"]
    assert taken[1]["train"] == {"batches": 0, "sums": [], "metrics": {}}
    assert [part["samples"] for part in taken] == [40, 0]


def test_a_loss_that_is_a_plain_number_counts_in_validation():
    class Numbers(Classifier):
        def validation_step(self, batch, batch_idx):
            return {"loss": float(batch_idx)}

    trainer, _, _ = recorded([], model=Numbers())
    assert float(trainer.callback_metrics["val_loss"]) == 0.5


def test_manual_optimisation_that_returns_nothing_still_has_its_metrics():
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(self._step("train", batch))
            self.optimizers().step()

    _, model, reader = recorded(["accuracy", "perplexity"], model=Manual())
    expected = expected_rows(model.seen)
    for row, (phase, _, values) in zip(reader.rows, expected, strict=True):
        assert row.values["accuracy"] == pytest.approx(values["accuracy"])
        assert ("loss" in row.values) == (phase == "validation")
