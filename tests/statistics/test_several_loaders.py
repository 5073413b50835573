"""Several validation loaders: statistics and what the module logs are of each, and together."""

import copy

import pytest
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_plugins import CSVStatisticsLogger, StatisticsRecorder
from tests.statistics.test_rows_lose_nothing import several_loaders
from tests.support.statistics_runs import Classifier, Recording, expected_rows, fit, read


@pytest.mark.parametrize("recorder", [[], [StatisticsRecorder()]], ids=["without", "with"])
def test_what_the_module_logs_of_a_batch_stands_in_the_row_of_that_batch_alone(recorder):
    class Own(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            loss = super().validation_step(batch, batch_idx)
            self.log("margin", loss * 2, on_step=True, on_epoch=dataloader_idx == 1)
            return loss

    _, model = fit(
        [*copy.deepcopy(recorder), CSVStatisticsLogger("log.csv")], Own, data=several_loaders(), max_epochs=1
    )
    rows = [row for row in read("log.csv") if row["phase"] == "validation"]
    losses = [loss for phase, loss, *_ in model.seen if phase == "validation"]
    found = [(row["margin/dataloader_idx_0"], row["margin_step/dataloader_idx_1"]) for row in rows]
    assert [tuple(map(bool, pair)) for pair in found] == [(True, False)] * 2 + [(False, True)] * 3
    assert [float(one or other) for one, other in found] == pytest.approx([2 * loss for loss in losses])


def test_statistics_are_kept_for_each_loader_and_together(tmp_path):
    metric = torchmetrics.classification.MulticlassAccuracy(8, average="micro")
    recorder = StatisticsRecorder(["accuracy", metric])
    recorder.subscribe(reader := Recording())
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_accuracy/dataloader_idx_1", mode="max")
    callbacks = [recorder, checkpoint, CSVStatisticsLogger("log.csv")]

    class Two(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            loss = self._step("validation", batch)
            if not self.trainer.sanity_checking:
                self.loader.append(dataloader_idx)
            return loss

    model = Two()
    model.loader = []
    trainer, _ = fit(callbacks, model, data=several_loaders(), max_epochs=1, enable_checkpointing=True)
    seen = [part for part in model.seen if part[0] == "validation"]
    groups = {"": seen}
    groups |= {
        f"/dataloader_idx_{n}": [s for s, loader in zip(seen, model.loader, strict=True) if loader == n] for n in (0, 1)
    }
    row = reader.ends[-1].values
    for suffix, parts in groups.items():
        values = expected_rows(parts)[-1][2]
        assert row[f"accuracy{suffix}"] == pytest.approx(values["accuracy"])
        assert row[f"multiclass_accuracy{suffix}"] == pytest.approx(values["accuracy"])
        assert row[f"loss{suffix}"] == pytest.approx(values["loss"], rel=1e-6)
        assert float(trainer.callback_metrics[f"val_accuracy{suffix}"]) == pytest.approx(values["accuracy"])
    # of each loader once, and no loader of a loader
    assert sorted(row) == sorted(f"{name}{suffix}" for name in recorder.names for suffix in groups)
    assert float(checkpoint.best_model_score) == pytest.approx(row["accuracy/dataloader_idx_1"])
    assert float(read("log.csv")[-1]["loss/dataloader_idx_1"]) == row["loss/dataloader_idx_1"]
