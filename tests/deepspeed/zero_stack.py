"""All techniques that do not refuse DeepSpeed, in one run: what test_zero_stack.py runs on every rank."""

import csv
from pathlib import Path

import torch

from lightning_plugins import (
    EMA,
    ClassificationReport,
    ConstantDecay,
    CSVStatisticsLogger,
    EventCallback,
    GradientAccumulation,
    LearningRateScheduler,
    StatisticsRecorder,
    TensorBoardStatisticsLogger,
    WarmupCosine,
    extract_weights,
)
from tests.deepspeed.zero_runs import (
    RANK,
    SIZES,
    STAGES,
    Batches,
    Net,
    even_loader,
    plain,
    refused,
    same,
    trainer,
)


class Sorting(Net):
    """The same network, which also sorts into two classes."""

    def training_step(self, batch, batch_idx):
        value = self(batch[0])
        logits = torch.cat([value, -value], 1).float()
        return {"loss": self.loss(batch), "logits": logits, "target": (batch[1] < 0).long().squeeze(1)}

    def validation_step(self, batch, batch_idx):
        found = self.training_step(batch, batch_idx)
        self.log("val_own", found["loss"], sync_dist=True)
        return found


def stack(directory):
    """Fit with all of them at every stage; return what each saw."""
    found = {}
    for stage in STAGES:
        folder, events, losses = Path(directory) / str(stage), [], []
        folder.mkdir(exist_ok=True)

        def note(loop, event, events=events, losses=losses):
            events.append(event.value)
            if event.value == "updateStart":
                losses.append(float(loop.last_loss))

        ema, recorder = EMA(ConstantDecay(0.5)), StatisticsRecorder(["accuracy"])
        report = ClassificationReport(num_classes=2)
        callbacks = [
            ema,
            GradientAccumulation(batches=2),
            LearningRateScheduler(WarmupCosine(warmup=2)),
            recorder,
            CSVStatisticsLogger(folder / "log.csv"),
            TensorBoardStatisticsLogger(folder / "tensorboard"),
            EventCallback(note),
            report,
        ]
        fit = trainer(stage, *callbacks, max_epochs=2)
        module = Sorting()
        fit.fit(module, Batches(SIZES[RANK], seed=RANK), even_loader(number=8, seed=RANK))
        metrics = {name: float(value) for name, value in fit.callback_metrics.items()}
        fit.save_checkpoint(folder / "end")
        with (folder / "log.csv").open() as file:
            rows = list(csv.DictReader(file))
        found[str(stage)] = {
            "steps": fit.global_step,
            "weights": plain(ema.raw_state_dict()),
            "losses": losses,
            "events": {event: events.count(event) for event in events},
            "metrics": metrics,
            "rows": [row for row in rows if row["phase"] == "train"],
            "board": len(list((folder / "tensorboard").rglob("events*"))),
            "average": plain(ema.average_state_dict()),
            "extracted": same(extract_weights(folder / "end"), ema.average_state_dict()),
        }
    found["refused"] = refused(2, LearningRateScheduler(WarmupCosine(warmup=2), clock="applied"))
    return found
