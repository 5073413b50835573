"""The rows of what is no callback, for ``cases.py``: schedules, decay rules and what else callbacks are given."""

import lightning_plugins as lp


def square(x):
    return x * x


def calls(*ways):
    """Return the ways of calling a class: (``init_args`` as YAML or ``None``, the same arguments in Python)."""
    return ways


_HERE = __name__
LINE = lp.Linear(4, 1, 0)
LINEAR = "{class_path: lightning_plugins.Linear, init_args: {steps: 4, start: 1, end: 0}}"
_RAMP = ("{steps: 10, start: 1, end: 0.1}", {"steps": 10, "start": 1.0, "end": 0.1})

VALUES = {
    # what callbacks are given
    "Plateau": calls(
        ("{monitor: val_loss}", {"monitor": "val_loss"}),
        (
            "{monitor: score, mode: max, factor: 0.5, patience: 3, threshold: 0.01, cooldown: 1, min_factor: 0.1}",
            {
                "monitor": "score",
                "mode": "max",
                "factor": 0.5,
                "patience": 3,
                "threshold": 0.01,
                "cooldown": 1,
                "min_factor": 0.1,
            },
        ),
    ),
    "Tokens": calls(("{key: labels}", {"key": "labels"}), ("{key: 1, ignore_index: 0}", {"key": 1, "ignore_index": 0})),
    "ConstantDecay": calls(("{value: 0.9}", {"value": 0.9})),
    "DebiasedDecay": calls(("{value: 0.9}", {"value": 0.9})),
    "HalfLife": calls(
        ("{steps: 500}", {"steps": 500.0}), ("{samples: 1000000}", {"samples": 1e6}), ("{steps: 2%}", {"steps": "2%"})
    ),
    "InverseGammaDecay": calls(
        ("{}", {}),
        (
            "{max_value: 0.999, inv_gamma: 2, power: 0.75, min_value: 0.1}",
            {"max_value": 0.999, "inv_gamma": 2.0, "power": 0.75, "min_value": 0.1},
        ),
    ),
    "PowerDecay": calls(("{sigma_rel: 0.05}", {"sigma_rel": 0.05})),
    "WarmupDecay": calls(("{value: 0.9}", {"value": 0.9})),
    # schedules
    "Constant": calls(("{}", {}), ("{value: 0.5}", {"value": 0.5})),
    "Cosine": calls(_RAMP),
    "CosineRestarts": calls(
        ("{first: 10}", {"first": 10}),
        (
            "{first: 1ep, multiplier: 2, decay: 0.5, end: 0.1}",
            {"first": "1ep", "multiplier": 2.0, "decay": 0.5, "end": 0.1},
        ),
    ),
    "Cycled": calls(
        (
            f"{{schedule: {LINEAR}, period: 4, count: 3, multiplier: 2, decay: 0.5}}",
            {"schedule": LINE, "period": 4, "count": 3, "multiplier": 2.0, "decay": 0.5},
        )
    ),
    "Delayed": calls((f"{{schedule: {LINEAR}, steps: 3}}", {"schedule": LINE, "steps": 3})),
    "Exponential": calls(_RAMP),
    "Floored": calls((f"{{schedule: {LINEAR}, factor: 0.1}}", {"schedule": LINE, "factor": 0.1})),
    "HeldEvery": calls((f"{{schedule: {LINEAR}, steps: 1ep}}", {"schedule": LINE, "steps": "1ep"})),
    "InverseSqrt": calls(
        ("{warmup: 0}", {"warmup": 0}),
        ("{warmup: 4000, timescale: 100, start: 0.1}", {"warmup": 4000, "timescale": 100, "start": 0.1}),
    ),
    "Join": calls(
        (
            (
                f"{{parts: [{LINEAR}, {{class_path: lightning_plugins.Cosine, "
                "init_args: {steps: rest, start: 1, end: 0}}], boundaries: [10%]}"
            ),
            {"parts": [LINE, lp.Cosine(None, 1, 0)], "boundaries": ["10%"]},
        )
    ),
    "Linear": calls(("{steps: 10%, start: 0, end: 1}", {"steps": "10%", "start": 0, "end": 1})),
    "Noam": calls(("{model_dim: 512, warmup: 4000}", {"model_dim": 512, "warmup": 4000})),
    "OneCycle": calls(
        ("{}", {}),
        (
            "{total: 100, peak_at: 0.2, start: 0.1, end: 0.01, shape: linear}",
            {"total": 100, "peak_at": 0.2, "start": 0.1, "end": 0.01, "shape": "linear"},
        ),
    ),
    "OneMinusSqrt": calls(("{steps: rest, start: 1, end: 0}", {"steps": None, "start": 1, "end": 0})),
    "PiecewiseConstant": calls(
        (
            "{boundaries: [10, 2ep, 80%, 0.9], values: [1, 0.5, 0.1, 0.05, 0]}",
            {"boundaries": [10, "2ep", "80%", 0.9], "values": [1, 0.5, 0.1, 0.05, 0]},
        )
    ),
    "Polynomial": calls(("{steps: 10, start: 1, end: 0, power: 2}", {"steps": 10, "start": 1, "end": 0, "power": 2.0})),
    "Product": calls((f"{{left: {LINEAR}, right: {LINEAR}}}", {"left": LINE, "right": LINE})),
    "RNMTPlus": calls(
        (
            "{replicas: 8, warmup: 50, start_step: 600, end_step: 1200}",
            {"replicas": 8, "warmup": 50, "start_step": 600, "end_step": 1200},
        )
    ),
    "ReciprocalSqrt": calls(("{warmup: 5%}", {"warmup": "5%"})),
    "Scaled": calls((f"{{schedule: {LINEAR}, factor: 2}}", {"schedule": LINE, "factor": 2})),
    "Segment": calls((None, {"shape": "linear", "end": 1.0, "start": 0.0, "steps": 4})),  # written inside `Segments`
    "Segments": calls(
        (
            (
                "{segments: [{end: 1, steps: 10%}, {shape: cosine, start: 0.9, end: 0.5, steps: 0.2}, "
                f"{{shape: {_HERE}.square, end: 0}}], endpoint: true}}"
            ),
            {
                "segments": [
                    lp.Segment(end=1, steps="10%"),
                    lp.Segment("cosine", start=0.9, end=0.5, steps=0.2),
                    lp.Segment(f"{_HERE}.square", end=0),
                ],
                "endpoint": True,
            },
        )
    ),
    "Shape": calls(
        (
            f"{{curve: {_HERE}.square, steps: 10, start: 1, end: 0}}",
            {"curve": f"{_HERE}.square", "steps": 10, "start": 1, "end": 0},
        ),
        (
            "{curve: 1-sqrt, steps: rest, start: 1, end: 0}",
            {"curve": "1-sqrt", "steps": None, "start": 1, "end": 0},
        ),
    ),
    "Shifted": calls((f"{{schedule: {LINEAR}, steps: 1}}", {"schedule": LINE, "steps": 1})),
    "WarmupCosine": calls(
        ("{warmup: 5%}", {"warmup": "5%"}),
        (
            "{warmup: 0.05, hold: 2ep, total: 1000, start: 0.1, end: 0.01}",
            {"warmup": 0.05, "hold": "2ep", "total": 1000, "start": 0.1, "end": 0.01},
        ),
    ),
    "WarmupLinear": calls(
        (
            "{warmup: 10, total: null, start: 0.1, end: 0.2}",
            {"warmup": 10, "total": None, "start": 0.1, "end": 0.2},
        )
    ),
    "WarmupStableDecay": calls(
        ("{warmup: 10, decay: 20%, shape: cosine}", {"warmup": 10, "decay": "20%", "shape": "cosine"}),
        (None, {"warmup": 5, "decay": 2, "total": 20, "shape": "1-sqrt", "start": 0.0, "end": 0.0}),
    ),
    # what no configuration makes: their optimizer comes later
    "NoamLR": calls(
        (
            None,
            {"optimizer": None, "model_dim": 4, "warmup_steps": 2, "start_step": 0, "step_duration": 1, "min_lr": 0.0},
        ),
        (None, {"optimizer": None, "model_dim": 4, "warmup": 2}),
    ),
    "ScheduleLR": calls(
        (
            None,
            {
                "optimizer": None,
                "schedule": lp.Constant(),
                "base_lr": 0.1,
                "min_lr": 0.0,
                "parameter": "lr",
                "clock": "attempted",
            },
        )
    ),
    "WarmupCosineLR": calls(
        (
            None,
            {
                "optimizer": None,
                "warmup_steps": 2,
                "total_steps": 10,
                "hold_steps": 1,
                "start_factor": 0.0,
                "end_factor": 0.0,
            },
        ),
        (None, {"optimizer": None, "warmup": "20%", "total": 10, "hold": 1, "start": 0.1, "end": 0.0}),
    ),
    "on_events": calls((None, {"events": "batchEnd"})),
}
