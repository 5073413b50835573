"""A row for everything that a LightningCLI's YAML can write: the ``init_args``, and the same in Python."""

import lightning_plugins as lp
from lightning_plugins import schedules
from lightning_plugins.schedules import Cosine, Linear, Segment, WarmupCosine

# What the rows below name by import path.


def count_ones(batch):
    return (batch == 1).sum()


def scores(outputs, batch):
    return outputs["scores"]


def truth(outputs, batch):
    return outputs["truth"]


def look(loop, event):
    return loop.batch_index


def square(x):
    return x * x


_HERE = __name__
_LINEAR = "{class_path: lightning_plugins.Linear, init_args: {steps: 4, start: 1, end: 0}}"
_LABELS = "{class_path: lightning_plugins.Tokens, init_args: {key: labels, ignore_index: 0}}"
_MEAN = "{class_path: torchmetrics.MeanMetric}"


def _line():
    return Linear(steps=4, start=1, end=0)


def _mean():
    import torchmetrics

    return torchmetrics.MeanMetric()


# class -> [(init_args as YAML, what makes the same object), ...]. A class without a row fails.
ROWS = {
    # callbacks
    "CSVStatisticsLogger": [
        ("{}", lp.CSVStatisticsLogger),
        (
            "{path: a/log.csv, columns: [accuracy, loss], every: epoch, layout: s4tf, flush_seconds: 1}",
            lambda: lp.CSVStatisticsLogger(
                "a/log.csv", columns=["accuracy", "loss"], every="epoch", layout="s4tf", flush_seconds=1.0
            ),
        ),
    ],
    "CheckpointAveraging": [
        ("{}", lp.CheckpointAveraging),
        ("{last: 3, compare: false}", lambda: lp.CheckpointAveraging(3, compare=False)),
        (
            "{best: 2, output: best.ckpt, refresh_batch_norm: false}",
            lambda: lp.CheckpointAveraging(best=2, output="best.ckpt", refresh_batch_norm=False),
        ),
    ],
    "ClassificationReport": [
        ("{num_classes: 3}", lambda: lp.ClassificationReport(3)),
        (
            (
                "{num_classes: 3, labels: [0, 2], target_names: [cat, dog], digits: 3, zero_division: 1, targets: y, "
                "path: report.txt}"
            ),
            lambda: lp.ClassificationReport(
                3,
                labels=[0, 2],
                target_names=["cat", "dog"],
                digits=3,
                zero_division=1.0,
                targets="y",
                path="report.txt",
            ),
        ),
        (
            f"{{num_classes: 3, predictions: {_HERE}.scores, path: [report.txt, report.json]}}",
            lambda: lp.ClassificationReport(3, predictions=f"{_HERE}.scores", path=["report.txt", "report.json"]),
        ),
    ],
    "EMA": [
        ("{}", lp.EMA),
        (
            (
                "{decay: 0.99, update_every_n_steps: 2, start_step: 10, device: cpu, buffers: average, evaluate: raw, "
                "checkpoint: raw, after_fit: raw, name: slow}"
            ),
            lambda: lp.EMA(
                0.99,
                update_every_n_steps=2,
                start_step=10,
                device="cpu",
                buffers="average",
                evaluate="raw",
                checkpoint="raw",
                after_fit="raw",
                name="slow",
            ),
        ),
    ],
    "EventCallback": [
        (f"{{function: {_HERE}.look}}", lambda: lp.EventCallback(look)),
        (
            f"{{function: {_HERE}.look, events: [BATCH_END, epochStart]}}",
            lambda: lp.EventCallback(look, events=[lp.Event.BATCH_END, lp.Event.EPOCH_START]),
        ),
    ],
    "GradientAccumulation": [
        ("{batches: 4}", lambda: lp.GradientAccumulation(4)),
        (
            "{effective_batch_size: 256, count: samples, carry: true}",
            lambda: lp.GradientAccumulation(effective_batch_size=256, carry=True),
        ),
        ("{schedule: {0: 1, 1000: 4}}", lambda: lp.GradientAccumulation(schedule={0: 1, 1000: 4})),
        (f"{{batches: 4, count: {_HERE}.count_ones}}", lambda: lp.GradientAccumulation(4, count=count_ones)),
    ],
    "LearningRateScheduler": [
        (f"{{schedule: {_LINEAR}}}", lambda: lp.LearningRateScheduler(_line())),
        (
            (
                f"{{schedule: {_LINEAR}, base_lr: [0.1, 0.01], min_lr: 0.001, optimizer: 1, existing: replace, "
                "clock: applied, record: true}"
            ),
            lambda: lp.LearningRateScheduler(
                _line(),
                base_lr=[0.1, 0.01],
                min_lr=0.001,
                optimizer=1,
                existing="replace",
                clock="applied",
                record=True,
            ),
        ),
        (
            f"{{schedule: {_LINEAR}, base_lr: 0.5, plateau: {{monitor: val_loss}}}}",
            lambda: lp.LearningRateScheduler(_line(), base_lr=0.5, plateau=lp.Plateau("val_loss")),
        ),
    ],
    "MicroBatching": [
        ("{}", lp.MicroBatching),
        ("{size: 16}", lambda: lp.MicroBatching(16)),
        (f"{{size: auto, count: {_HERE}.count_ones}}", lambda: lp.MicroBatching("auto", count=count_ones)),
        (f"{{size: 8, count: {_LABELS}}}", lambda: lp.MicroBatching(8, count=lp.Tokens("labels", 0))),
    ],
    "PostHocEMA": [
        ("{}", lp.PostHocEMA),
        (
            (
                "{sigma_rels: [0.07, 0.12], every_n_steps: 50, dirpath: snapshots, dtype: bfloat16, "
                "file_format: safetensors}"
            ),
            lambda: lp.PostHocEMA(
                (0.07, 0.12), every_n_steps=50, dirpath="snapshots", dtype="bfloat16", file_format="safetensors"
            ),
        ),
    ],
    "StatisticsRecorder": [
        ("{}", lp.StatisticsRecorder),
        (
            f"{{metrics: [accuracy, {_MEAN}], predictions: head, targets: {_HERE}.truth, every: epoch, log: true}}",
            lambda: lp.StatisticsRecorder(
                ["accuracy", _mean()], predictions="head", targets=f"{_HERE}.truth", every="epoch", log=True
            ),
        ),
        (f"{{metrics: {{seen: {_MEAN}}}}}", lambda: lp.StatisticsRecorder({"seen": _mean()})),
    ],
    "TensorBoardStatisticsLogger": [
        ("{}", lp.TensorBoardStatisticsLogger),
        (
            "{root: a/tensorboard, axis: samples}",
            lambda: lp.TensorBoardStatisticsLogger("a/tensorboard", axis="samples"),
        ),
    ],
    # what callbacks are given
    "Plateau": [
        ("{monitor: val_loss}", lambda: lp.Plateau("val_loss")),
        (
            "{monitor: score, mode: max, factor: 0.5, patience: 3, threshold: 0.01, cooldown: 1, min_factor: 0.1}",
            lambda: lp.Plateau("score", "max", 0.5, 3, 0.01, 1, 0.1),
        ),
    ],
    "Tokens": [
        ("{key: labels}", lambda: lp.Tokens("labels")),
        ("{key: 1, ignore_index: 0}", lambda: lp.Tokens(1, ignore_index=0)),
    ],
    "ConstantDecay": [("{value: 0.9}", lambda: lp.ConstantDecay(0.9))],
    "DebiasedDecay": [("{value: 0.9}", lambda: lp.DebiasedDecay(0.9))],
    "HalfLife": [
        ("{steps: 500}", lambda: lp.HalfLife(steps=500.0)),
        ("{samples: 1000000}", lambda: lp.HalfLife(samples=1e6)),
    ],
    "InverseGammaDecay": [
        ("{}", lp.InverseGammaDecay),
        (
            "{max_value: 0.999, inv_gamma: 2, power: 0.75, min_value: 0.1}",
            lambda: lp.InverseGammaDecay(0.999, 2.0, 0.75, 0.1),
        ),
    ],
    "PowerDecay": [("{sigma_rel: 0.05}", lambda: lp.PowerDecay(0.05))],
    "WarmupDecay": [("{value: 0.9}", lambda: lp.WarmupDecay(0.9))],
    # schedules
    "Constant": [("{}", lp.Constant), ("{value: 0.5}", lambda: lp.Constant(0.5))],
    "Cosine": [("{steps: 10, start: 1, end: 0.1}", lambda: lp.Cosine(10, 1, 0.1))],
    "CosineRestarts": [
        ("{first: 10}", lambda: lp.CosineRestarts(10)),
        (
            "{first: 1ep, multiplier: 2, decay: 0.5, end: 0.1}",
            lambda: lp.CosineRestarts("1ep", multiplier=2.0, decay=0.5, end=0.1),
        ),
    ],
    "Cycled": [
        (
            f"{{schedule: {_LINEAR}, period: 4, count: 3, multiplier: 2, decay: 0.5}}",
            lambda: _line().cycle(4, count=3, multiplier=2.0, decay=0.5),
        )
    ],
    "Delayed": [(f"{{schedule: {_LINEAR}, steps: 3}}", lambda: _line().delay(3))],
    "Exponential": [("{steps: 10, start: 1, end: 0.01}", lambda: lp.Exponential(10, 1, 0.01))],
    "Floored": [(f"{{schedule: {_LINEAR}, factor: 0.1}}", lambda: _line().floor(0.1))],
    "HeldEvery": [(f"{{schedule: {_LINEAR}, steps: 1ep}}", lambda: _line().hold_every("1ep"))],
    "InverseSqrt": [
        ("{warmup: 0}", lambda: lp.InverseSqrt(0)),
        ("{warmup: 4000, timescale: 100, start: 0.1}", lambda: lp.InverseSqrt(4000, timescale=100, start=0.1)),
    ],
    "Join": [
        (
            (
                f"{{parts: [{_LINEAR}, {{class_path: lightning_plugins.Cosine, "
                "init_args: {steps: rest, start: 1, end: 0}}], boundaries: [10%]}"
            ),
            lambda: lp.Join([_line(), Cosine(None, 1, 0)], ["10%"]),
        )
    ],
    "Linear": [("{steps: 10%, start: 0, end: 1}", lambda: lp.Linear("10%", 0, 1))],
    "Noam": [("{model_dim: 512, warmup: 4000}", lambda: lp.Noam(512, 4000))],
    "OneCycle": [
        ("{}", lp.OneCycle),
        (
            "{total: 100, peak_at: 0.2, start: 0.1, end: 0.01, shape: linear}",
            lambda: lp.OneCycle(100, 0.2, 0.1, 0.01, "linear"),
        ),
    ],
    "OneMinusSqrt": [("{steps: rest, start: 1, end: 0}", lambda: lp.OneMinusSqrt(None, 1, 0))],
    "PiecewiseConstant": [
        (
            "{boundaries: [100, 2ep, 80%, 0.9], values: [1, 0.5, 0.1, 0.05, 0]}",
            lambda: lp.PiecewiseConstant([100, "2ep", "80%", 0.9], [1, 0.5, 0.1, 0.05, 0]),
        )
    ],
    "Polynomial": [("{steps: 10, start: 1, end: 0, power: 2}", lambda: lp.Polynomial(10, 1, 0, power=2.0))],
    "Product": [(f"{{left: {_LINEAR}, right: {_LINEAR}}}", lambda: _line() * _line())],
    "RNMTPlus": [("{replicas: 8, warmup: 50, start_step: 600, end_step: 1200}", lambda: lp.RNMTPlus(8, 50, 600, 1200))],
    "ReciprocalSqrt": [("{warmup: 5%}", lambda: lp.ReciprocalSqrt("5%"))],
    "Scaled": [(f"{{schedule: {_LINEAR}, factor: 2}}", lambda: 2 * _line())],
    "Segments": [
        (
            (
                "{segments: [{end: 1, steps: 10%}, {shape: cosine, start: 0.9, end: 0.5, steps: 0.2}, "
                f"{{shape: {_HERE}.square, end: 0}}], endpoint: true}}"
            ),
            lambda: lp.Segments(
                [
                    Segment(end=1, steps="10%"),
                    Segment("cosine", start=0.9, end=0.5, steps=0.2),
                    Segment(f"{_HERE}.square", end=0),
                ],
                endpoint=True,
            ),
        )
    ],
    "Shape": [
        (f"{{curve: {_HERE}.square, steps: 10, start: 1, end: 0}}", lambda: lp.Shape(f"{_HERE}.square", 10, 1, 0)),
        ("{curve: 1-sqrt, steps: rest, start: 1, end: 0}", lambda: lp.Shape("1-sqrt", None, 1, 0)),
    ],
    "Shifted": [(f"{{schedule: {_LINEAR}, steps: 1}}", lambda: _line().shift(1))],
    "WarmupCosine": [
        ("{warmup: 5%}", lambda: WarmupCosine("5%")),
        (
            "{warmup: 0.05, hold: 2ep, total: 1000, start: 0.1, end: 0.01}",
            lambda: WarmupCosine(0.05, hold="2ep", total=1000, start=0.1, end=0.01),
        ),
    ],
    "WarmupLinear": [
        ("{warmup: 10, total: null, start: 0.1, end: 0.2}", lambda: lp.WarmupLinear(10, start=0.1, end=0.2))
    ],
    "WarmupStableDecay": [
        ("{warmup: 10, decay: 20%, shape: cosine}", lambda: lp.WarmupStableDecay(10, "20%", shape="cosine"))
    ],
}
# A segment stands inside `Segments` and needs no class path there.
WRITTEN_INSIDE_ANOTHER = {"Segment"}


def public_path(name):
    """The shortest import path of a public class."""
    return f"lightning_plugins.{name}" if name in lp.__all__ else f"{schedules.__name__}.{name}"
