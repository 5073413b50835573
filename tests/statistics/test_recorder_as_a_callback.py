"""The recorder beside other callbacks: arguments, copies, states, what it leaves behind."""

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
import torchmetrics
from torch.utils.data import DataLoader

from lightning_plugins import CSVStatisticsLogger, StatisticsRecorder
from lightning_plugins.core.lightning import MisconfigurationException
from tests.support.statistics_runs import (
    Classifier,
    Recording,
    dataset,
    expected_rows,
    fit,
    recorded,
)

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def test_wrong_arguments_are_refused_at_construction():
    with pytest.raises(
        TypeError, match=r"`predictions` must be None, a key or a function of \(outputs, batch\), got 3"
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


def test_manual_optimization_that_returns_nothing_still_has_its_metrics():
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
