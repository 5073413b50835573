"""A row for every public callback: the tests of what all of them promise read it, and a callback without one fails.

The rows of schedules and other values are in ``value_cases.py``, those of functions of files in ``FUNCTIONS``.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.nn import Linear
from torchmetrics import MeanMetric

import lightning_plugins as lp
from lightning_plugins import schedules
from lightning_plugins.core.imports import declared_names
from lightning_plugins.core.lightning import CallbackOfBoth
from tests.support.value_cases import LINE, LINEAR, VALUES

PACKAGE = Path(lp.__file__).parent
PUBLIC = declared_names("lightning_plugins")
TECHNIQUES = sorted({module.split(".")[1] for module in PUBLIC.values()})

# What the rows name by import path.


def count_ones(batch):
    return (batch == 1).sum()


def scores(outputs, batch):
    return outputs["scores"]


def truth(outputs, batch):
    return outputs["truth"]


def take_apart(batch, sizes):
    return batch.split(sizes)


def look(loop, event):
    return loop.batch_index


def rising(n):
    return 1 - 1 / n


@dataclass(frozen=True)
class Case:
    """How a public callback is used.

    Args:
        calls: (``init_args`` as YAML, the same arguments in Python) for each way of calling it; between them, they give
            every argument a legal value.
        pair: The arguments of two that may stand in one Trainer. The first takes part in the runs of all.
    """

    calls: tuple[tuple[str, dict[str, Any]], ...]
    pair: tuple[dict[str, Any], dict[str, Any]]


def case(*calls, pair):
    return Case(calls, pair)


_HERE = __name__
_LABELS = "{class_path: lightning_plugins.Tokens, init_args: {key: labels, ignore_index: 0}}"
_COSINE = "{class_path: lightning_plugins.Cosine, init_args: {steps: rest, start: 0.996, end: 1}}"
_MEAN = "{class_path: torchmetrics.MeanMetric}"
_BASES = {"Schedule", "DecayRule"}
_TYPES = {"Duration", "TrainingLoop"}  # for annotations
_WITHOUT_ARGUMENTS = {"CancelBatch", "CancelEpoch", "CancelFit", "CancelTraining", "CancelValidation", "Event"}

CALLBACKS = {
    "CSVStatisticsLogger": case(
        ("{}", {}),
        (
            "{path: a/log.csv, columns: [accuracy, loss], every: epoch, layout: s4tf, flush_seconds: 1}",
            {
                "path": "a/log.csv",
                "columns": ["accuracy", "loss"],
                "every": "epoch",
                "layout": "s4tf",
                "flush_seconds": 1.0,
            },
        ),
        pair=({"path": "a.csv"}, {"path": "b.csv"}),
    ),
    "CheckpointAveraging": case(
        ("{}", {}),
        ("{last: 3, compare: false}", {"last": 3, "compare": False}),
        (
            "{best: 2, output: best.ckpt, refresh_batch_norm: false}",
            {"best": 2, "output": "best.ckpt", "refresh_batch_norm": False},
        ),
        pair=({"last": 2}, {"best": 3, "output": "best.ckpt"}),
    ),
    "ClassificationReport": case(
        ("{num_classes: 3}", {"num_classes": 3}),
        (
            (
                "{num_classes: 3, labels: [0, 2], target_names: [cat, dog], digits: 3, zero_division: 1, targets: y, "
                "task: multiclass, ignore_index: 255, path: report.txt}"
            ),
            {
                "num_classes": 3,
                "labels": [0, 2],
                "target_names": ["cat", "dog"],
                "digits": 3,
                "zero_division": 1.0,
                "targets": "y",
                "task": "multiclass",
                "ignore_index": 255,
                "path": "report.txt",
            },
        ),
        (
            f"{{num_classes: 3, predictions: {_HERE}.scores, path: [report.txt, report.json]}}",
            {"num_classes": 3, "predictions": f"{_HERE}.scores", "path": ["report.txt", "report.json"]},
        ),
        pair=({"num_classes": 3, "path": ["r.txt", "{epoch}.png"]}, {"num_classes": 3, "labels": [0, 1]}),
    ),
    "EMA": case(
        ("{}", {}),
        (
            (
                "{decay: 0.99, update_every_n_steps: 2, start_step: 10, device: cpu, buffers: average, evaluate: raw, "
                "checkpoint: raw, after_fit: raw, name: slow}"
            ),
            {
                "decay": 0.99,
                "update_every_n_steps": 2,
                "start_step": 10,
                "device": "cpu",
                "buffers": "average",
                "evaluate": "raw",
                "checkpoint": "raw",
                "after_fit": "raw",
                "name": "slow",
            },
        ),
        (
            f"{{decay: {_COSINE}, update_every_n_steps: 0.01, start_step: 95%}}",
            {"decay": lp.Cosine(None, 0.996, 1.0), "update_every_n_steps": 0.01, "start_step": "95%"},
        ),
        (f"{{decay: {_HERE}.rising}}", {"decay": rising}),
        pair=({}, {"name": "slow"}),
    ),
    "EventCallback": case(
        (f"{{function: {_HERE}.look}}", {"function": look}),
        (
            f"{{function: {_HERE}.look, events: [BATCH_END, epochStart]}}",
            {"function": look, "events": [lp.Event.BATCH_END, lp.Event.EPOCH_START]},
        ),
        pair=({"function": look}, {"function": look, "events": ["batchEnd"]}),
    ),
    "GradientAccumulation": case(
        ("{batches: 4}", {"batches": 4}),
        (
            "{effective_batch_size: 256, count: samples, carry: true}",
            {"effective_batch_size": 256, "count": "samples", "carry": True},
        ),
        ("{schedule: {0: 1, 1000: 4}}", {"schedule": {0: 1, 1000: 4}}),
        (f"{{batches: 4, count: {_HERE}.count_ones}}", {"batches": 4, "count": count_ones}),
        pair=({"batches": 4}, {"effective_batch_size": 256}),
    ),
    "LatestWeightAveraging": case(
        ("{}", {}),
        (
            (
                "{last: 3, every: 2ep, device: cpu, buffers: average, evaluate: raw, checkpoint: raw, after_fit: raw, "
                "name: latest}"
            ),
            {
                "last": 3,
                "every": "2ep",
                "device": "cpu",
                "buffers": "average",
                "evaluate": "raw",
                "checkpoint": "raw",
                "after_fit": "raw",
                "name": "latest",
            },
        ),
        ("{every: 100}", {"every": 100}),
        # beside an EMA, which evaluates and owns the files
        pair=(
            {"last": 3, "every": "10%", "evaluate": "raw", "checkpoint": "raw", "after_fit": "raw"},
            {"name": "longer"},
        ),
    ),
    "LearningRateScheduler": case(
        (f"{{schedule: {LINEAR}}}", {"schedule": LINE}),
        (
            (
                f"{{schedule: {LINEAR}, base_lr: [0.1, 0.01], min_lr: 0.001, optimizer: 1, existing: replace, "
                "clock: applied, record: true}"
            ),
            {
                "schedule": LINE,
                "base_lr": [0.1, 0.01],
                "min_lr": 0.001,
                "optimizer": 1,
                "existing": "replace",
                "clock": "applied",
                "record": True,
            },
        ),
        (
            f"{{schedule: {LINEAR}, base_lr: 0.5, parameter: weight_decay, plateau: {{monitor: val_loss}}}}",
            {"schedule": LINE, "base_lr": 0.5, "parameter": "weight_decay", "plateau": lp.Plateau("val_loss")},
        ),
        (f"{{schedule: {{backbone: {LINEAR}, head: {LINEAR}}}}}", {"schedule": {"backbone": LINE, "head": LINE}}),
        (f"{{schedule: {{0: {LINEAR}}}, clock: time}}", {"schedule": {0: LINE}, "clock": "time"}),
        pair=(
            {"schedule": lp.WarmupCosine("5%"), "optimizer": 0},
            {"schedule": lp.WarmupCosine("5%"), "optimizer": 1},
        ),
    ),
    "MicroBatching": case(
        ("{}", {}),
        ("{size: 16}", {"size": 16}),
        (f"{{size: auto, count: {_HERE}.count_ones}}", {"size": "auto", "count": count_ones}),
        (f"{{size: 8, count: {_LABELS}}}", {"size": 8, "count": lp.Tokens("labels", 0)}),
        (f"{{size: 8, split: {_HERE}.take_apart}}", {"size": 8, "split": take_apart}),
        ("{size: 8, logged: {hits: sum, worst: mean}}", {"size": 8, "logged": {"hits": "sum", "worst": "mean"}}),
        pair=({}, {"size": 16}),
    ),
    "PostHocEMA": case(
        ("{}", {}),
        (
            (
                "{sigma_rels: [0.07, 0.12], every_n_steps: 50, dirpath: snapshots, dtype: bfloat16, "
                "file_format: safetensors}"
            ),
            {
                "sigma_rels": (0.07, 0.12),
                "every_n_steps": 50,
                "dirpath": "snapshots",
                "dtype": "bfloat16",
                "file_format": "safetensors",
            },
        ),
        pair=({}, {"sigma_rels": (0.07, 0.12), "dirpath": "snapshots"}),
    ),
    "StatisticsRecorder": case(
        ("{}", {}),
        (
            (
                f"{{metrics: [accuracy, {_MEAN}], predictions: head, targets: {_HERE}.truth, task: multiclass, "
                "ignore_index: 255, progress_bar: [accuracy], every: epoch, log: true}"
            ),
            {
                "metrics": ["accuracy", MeanMetric()],
                "predictions": "head",
                "targets": f"{_HERE}.truth",
                "task": "multiclass",
                "ignore_index": 255,
                "progress_bar": ["accuracy"],
                "every": "epoch",
                "log": True,
            },
        ),
        (f"{{metrics: {{seen: {_MEAN}}}}}", {"metrics": {"seen": MeanMetric()}}),
        pair=({}, {"metrics": ["accuracy"]}),
    ),
    "TensorBoardStatisticsLogger": case(
        ("{}", {}),
        (
            "{root: a/tensorboard, name: first, axis: samples, count: samples}",
            {"root": "a/tensorboard", "name": "first", "axis": "samples", "count": "samples"},
        ),
        pair=({"root": "a"}, {"root": "b"}),
    ),
}

CALLS = {name: row.calls for name, row in CALLBACKS.items()} | VALUES

# Functions of files, called in a folder with the files of `tests/hostile/test_constructors.py`.
FUNCTIONS = {
    "average_checkpoints": {
        "paths": ["1.ckpt", "2.ckpt"],
        "output": None,
        "weights": [1, 2],
        "dtype": None,
        "strict": True,
        "trust": False,
        "allow_nonfinite": False,
        "overwrite": False,
        "progress": False,
    },
    "extract_weights": {"checkpoint_path": "1.ckpt", "which": "raw", "name": "ema", "trust": False},
    "greedy_soup": {"paths": ["1.ckpt", "2.ckpt"], "score": lambda state: 1.0, "mode": "max", "trust": False},
    "layerwise_decay": {"module": Linear(2, 2), "base_lr": 0.1, "decay": 0.9, "order": ["weight", "bias"]},
    "select_checkpoints": {
        "dirpath": ".",
        "last": 1,
        "best": None,
        "min_step": None,
        "max_step": None,
        "min_epoch": None,
        "max_epoch": None,
    },
    "synthesize_ema": {"dirpath": "snapshots", "sigma_rel": 0.1, "step": None, "progress": False},
}

WITHOUT_ROWS = _BASES | _TYPES | _WITHOUT_ARGUMENTS


def kind_of(name):
    """Return the class of a row."""
    return getattr(lp if name in PUBLIC else schedules, name)


def import_path(name):
    """Return the shortest import path of a row's class."""
    return f"{'lightning_plugins' if name in PUBLIC else schedules.__name__}.{name}"


def make(name, number=0):
    """Return the callback of a row's pair with that number."""
    return kind_of(name)(**CALLBACKS[name].pair[number])


def callback_names():
    """Return the names of all public callbacks, found without the rows."""
    public = {name: getattr(lp, name) for name in PUBLIC}
    return sorted(name for name, kind in public.items() if inspect.isclass(kind) and issubclass(kind, CallbackOfBoth))
