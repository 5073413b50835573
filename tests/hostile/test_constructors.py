"""Whatever a public name is given: one error that says which argument is wrong, or an object that works.

A new public class or function needs a row in ``ROWS``: arguments that are right, one of which at a time becomes
something from ``HOSTILE``. What makes an object consistent is checked by the kind of the object.
"""

import copy
import decimal
import inspect
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import lightning_plugins
from lightning_plugins import (
    EMA,
    CheckpointAveraging,
    Constant,
    ConstantDecay,
    CSVStatisticsLogger,
    DecayRule,
    GradientAccumulation,
    Linear,
    Noam,
    PiecewiseConstant,
    Polynomial,
    PostHocEMA,
    PowerDecay,
    Schedule,
    ScheduleLR,
    Segment,
    Shape,
    StatisticsRecorder,
    WarmupCosine,
)
from lightning_plugins.core.lightning import Callback, MisconfigurationException
from lightning_plugins.ema.snapshots import Loaded, write_snapshot
from tests.support import counts
from tests.support.hostile_values import HOSTILE

ABSTRACT = {"Schedule", "DecayRule"}
PLAIN = {"CancelBatch", "CancelEpoch", "CancelFit", "CancelTraining", "CancelValidation", "Event"}  # check nothing
RAMP = {"steps": 10, "start": 1.0, "end": 0.1}


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


# Every argument of every public class: a row for each way of calling it.
ROWS = {
    "CSVStatisticsLogger": [
        {"path": "a.csv", "columns": None, "every": "batch", "layout": "numbers", "flush_seconds": 5.0}
    ],
    "CheckpointAveraging": [
        {"last": 2, "output": "a.ckpt", "refresh_batch_norm": "auto", "compare": True},
        {"best": 2},
    ],
    "ClassificationReport": [
        {"num_classes": 3, "digits": 2, "zero_division": 0, "predictions": None, "targets": None, "path": None},
        {"num_classes": 3, "labels": [0, 1], "target_names": ["a", "b"]},
    ],
    "Constant": [{"value": 1.0}],
    "ConstantDecay": [{"value": 0.9}],
    "Cosine": [RAMP],
    "CosineRestarts": [{"first": 5, "multiplier": 2.0, "decay": 0.5, "end": 0.0}],
    "DebiasedDecay": [{"value": 0.9}],
    "EMA": [
        {
            "decay": 0.9,
            "update_every_n_steps": 1,
            "start_step": 0,
            "device": None,
            "buffers": "copy",
            "evaluate": "average",
            "checkpoint": "average",
            "after_fit": "average",
            "name": "ema",
        }
    ],
    "EventCallback": [{"function": print, "events": ["batchEnd"]}],
    "Exponential": [RAMP],
    "GradientAccumulation": [
        {"batches": 4, "count": "samples", "carry": False},
        {"effective_batch_size": 8},
        {"schedule": {0: 1, 5: 2}},
    ],
    "HalfLife": [{"steps": 4.0}, {"samples": 4.0}],
    "InverseGammaDecay": [{"max_value": 0.9, "inv_gamma": 1.0, "power": 0.5, "min_value": 0.0}],
    "InverseSqrt": [{"warmup": 5, "timescale": 3, "start": 0.0}],
    "Join": [{"parts": [Constant(), Constant(0.5)], "boundaries": [3]}],
    "LearningRateScheduler": [
        {
            "schedule": Constant(),
            "base_lr": 0.1,
            "min_lr": 0.0,
            "optimizer": None,
            "plateau": None,
            "existing": "refuse",
            "clock": "attempted",
            "record": False,
        }
    ],
    "Linear": [RAMP],
    "MicroBatching": [{"size": 4, "count": "samples"}],
    "Noam": [{"model_dim": 4, "warmup": 5}],
    "NoamLR": [
        {"optimizer": None, "model_dim": 4, "warmup_steps": 2, "start_step": 0, "step_duration": 1, "min_lr": 0.0}
    ],
    "OneCycle": [{"total": 20, "peak_at": 0.3, "start": 0.1, "end": 0.0, "shape": "cosine"}],
    "OneMinusSqrt": [RAMP],
    "PiecewiseConstant": [{"boundaries": [2], "values": [1.0, 0.5]}],
    "Plateau": [
        {
            "monitor": "val_loss",
            "mode": "min",
            "factor": 0.1,
            "patience": 1,
            "threshold": 1e-4,
            "cooldown": 0,
            "min_factor": 0.0,
        }
    ],
    "Polynomial": [{**RAMP, "power": 2.0}],
    "PostHocEMA": [
        {
            "sigma_rels": (0.05, 0.1),
            "every_n_steps": 10,
            "dirpath": None,
            "dtype": "float32",
            "file_format": "torch",
        }
    ],
    "PowerDecay": [{"sigma_rel": 0.1}],
    "RNMTPlus": [{"replicas": 4, "warmup": 5, "start_step": 10, "end_step": 20}],
    "ReciprocalSqrt": [{"warmup": 5}],
    "ScheduleLR": [
        {
            "optimizer": None,
            "schedule": Constant(),
            "base_lr": 0.1,
            "min_lr": 0.0,
            "parameter": "lr",
            "clock": "attempted",
        }
    ],
    "Segment": [{"shape": "linear", "end": 1.0, "start": 0.0, "steps": 4}],
    "Segments": [{"segments": [Segment(end=1.0, steps=4)], "endpoint": False}],
    "Shape": [{"curve": "linear", **RAMP}],
    "StatisticsRecorder": [
        {"metrics": ["accuracy"], "predictions": None, "targets": None, "every": "batch", "log": False}
    ],
    "TensorBoardStatisticsLogger": [{"root": "a", "axis": "step"}],
    "Tokens": [{"key": "x", "ignore_index": -100}],
    "on_events": [{"events": "batchEnd"}],
    "WarmupCosine": [{"warmup": 5, "hold": 2, "total": 20, "start": 0.0, "end": 0.0}],
    "WarmupCosineLR": [
        {
            "optimizer": None,
            "warmup_steps": 2,
            "total_steps": 10,
            "hold_steps": 1,
            "start_factor": 0.0,
            "end_factor": 0.0,
        }
    ],
    "WarmupDecay": [{"value": 0.9}],
    "WarmupLinear": [{"warmup": 5, "total": 20, "start": 0.0, "end": 0.0}],
    "WarmupStableDecay": [{"warmup": 5, "decay": 2, "total": 20, "shape": "1-sqrt", "start": 0.0, "end": 0.0}],
}


REFUSED = [
    (
        lambda: WarmupCosine(10**400),
        ValueError,
        r"`warmup` must be at most 9\d+ steps, got a whole number of 1329 bits",
    ),
    (lambda: Linear("9" * 400 + "ep", 1, 0).resolve(9, 3), ValueError, r"`steps` must be finite, got inf"),
    (lambda: WarmupCosine([[]] * 900), TypeError, r"`warmup` must be a duration, got \[.*\.\.\. \(3600 characters\)"),
    (lambda: Constant(10**400), ValueError, r"`value` must be a number that a float can hold, got a whole number of"),
    (lambda: Constant(torch.tensor([1.0, 2.0])), TypeError, r"`value` must be a number, got tensor"),
    (lambda: Noam(torch.tensor([1, 2]), 5), TypeError, r"`model_dim` must be a whole number, got tensor"),
    (lambda: Noam(np.True_, 5), TypeError, r"`model_dim` must be a whole number, got np\.True_"),
    (lambda: PiecewiseConstant(torch.tensor(3), [1]), TypeError, r"`boundaries` must be a list, got tensor"),
    (lambda: Shape(len, 5, 1, 0), ValueError, r"`curve` must take every number from 0 to 1 and return one, got <built"),
    (lambda: Segment("..curve", end=1), ValueError, r"`shape` must be .* got '\.\.curve', which cannot be imported"),
    (lambda: PowerDecay(5e-324), ValueError, r"`sigma_rel` must be at least 1e-09, got 5e-324"),
    (lambda: PostHocEMA("0.1"), TypeError, r"`sigma_rels` must be a list of numbers, got '0\.1'"),
    (lambda: EMA(device=2**63), ValueError, r"`device` must be the name of a device"),
    (lambda: GradientAccumulation(4, carry="no"), TypeError, r"`carry` must be True or False, got 'no'"),
    (lambda: StatisticsRecorder(5), TypeError, r"`metrics` must be a list of names or torchmetrics objects.* got 5"),
    (lambda: StatisticsRecorder(log=1), TypeError, r"`log` must be True or False, got 1"),
    (lambda: CheckpointAveraging(output=b"a.ckpt"), TypeError, r"`output` must be a path, got b'a\.ckpt'"),
    (lambda: CSVStatisticsLogger("a\0.csv"), ValueError, r"`path` must be a path that a file can have, got 'a\\x00"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_is_refused_with_a_message(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("kind", [decimal.Decimal, np.float32, np.array, torch.tensor])
def test_other_numbers_become_plain_ones(kind):
    """Kept as they came, a Decimal broke in the first step and an array could not be hashed."""
    number = kind(0.5)
    assert ConstantDecay(number) == ConstantDecay(0.5)
    assert repr(Polynomial(4, 1, 0, power=number)) == repr(Polynomial(4, 1, 0, power=0.5))


def test_every_public_name_has_its_row_and_every_argument_its_place():
    assert set(lightning_plugins.__all__) - {"__version__"} == set(ROWS) | set(FILES) | ABSTRACT | PLAIN
    for name, rows in ROWS.items():
        parameters = set(inspect.signature(getattr(lightning_plugins, name)).parameters)
        assert set().union(*rows) == parameters, name


@pytest.mark.parametrize("name", sorted(ROWS))
def test_one_hostile_argument_gives_one_error_or_an_object_that_works(name, record_property):
    tried = 0
    for row in ROWS[name]:
        assert refusal(name, row) is None
        for argument in row:
            for value in HOSTILE:
                check(name, row, {argument: value})
                tried += 1
    counts.record(record_property, "hostile inputs", {"hostile arguments": tried})


@settings(max_examples=300)
@given(data=st.data())
def test_several_hostile_arguments_give_one_error_or_an_object_that_works(data):
    name = data.draw(st.sampled_from(sorted(ROWS)), label="class")
    row = data.draw(st.sampled_from(ROWS[name]), label="arguments")
    names = data.draw(st.lists(st.sampled_from(sorted(row)), min_size=2, max_size=4, unique=len(row) > 1))
    check(name, row, {argument: data.draw(st.sampled_from(sorted(HOSTILE)), label=argument) for argument in names})


FILES = {
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


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        torch.save({"state_dict": {"weight": torch.ones(2)}, "global_step": step}, f"{step}.ckpt")
        write_snapshot(Path("snapshots"), step, [0.05, 0.1], Loaded([{"weight": torch.ones(2)}] * 2, {}))


@pytest.mark.usefixtures("files")
@pytest.mark.filterwarnings("ignore::lightning_plugins.core.validation.LightningPluginsWarning")
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_function_of_files_refuses_a_hostile_argument(name, record_property):
    function, tried = getattr(lightning_plugins, name), 0
    assert set(FILES[name]) == set(inspect.signature(function).parameters)
    assert function(**FILES[name])
    for argument in FILES[name]:
        for value in HOSTILE:
            given = HOSTILE[value]()
            if callable(given) and argument == "score":
                continue  # what a user's own function raises is the user's
            message = outcome(function, {**FILES[name], argument: given})
            if message is not None:
                assert "`" in message or "does not exist" in message or "is not a dir" in message, (argument, value)
                assert len(message) < 1500, (argument, value)
            tried += 1
    counts.record(record_property, "hostile inputs", {"hostile arguments": tried})


def check(name, row, hostile):
    message = refusal(name, {**row, **{argument: HOSTILE[value]() for argument, value in hostile.items()}})
    about = f"{name} with {hostile}: {message}"
    if message is not None:
        assert "`" in message, about  # it names an argument
        assert "\0" not in message, about
        assert len(message) < 1500, about


def outcome(function, arguments):
    """Return the message of a ValueError, TypeError, or an OSError that names its file."""
    try:
        function(**arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    except OSError as error:
        return f"`{error.filename}`"[:100] if error.filename else str(error)
    return None


def refusal(name, arguments):
    """Return the message of the one error that may be raised; a warning, which pytest makes an error, is none."""
    if arguments.get("optimizer", 0) is None and name.endswith("LR"):
        arguments = {**arguments, "optimizer": optimizer()}
    try:
        make = getattr(lightning_plugins, name)
        made = make(arguments["events"])(print) if name == "on_events" else make(**arguments)
        works(made)
    except (TypeError, ValueError, MisconfigurationException) as error:
        return str(error)
    return None


def works(made):
    if isinstance(made, Schedule):
        works_as_schedule(made)
    elif isinstance(made, DecayRule):
        rule = made.for_samples_per_step(3) if made.needs_samples_per_step else made
        for step in (1, 2, 100, 10**6):
            assert type(rule(step)) is float
            assert 0 <= rule(step) <= 1
        assert pickle.loads(pickle.dumps(made)) == made
        assert hash(made) == hash(copy.copy(made))
    elif isinstance(made, Callback):
        assert made.state_key == str(made.state_key)
    elif isinstance(made, ScheduleLR):
        assert all(math.isfinite(rate) and rate >= 0 for rate in made.get_last_lr())
        made.close()
    assert repr(made)


def works_as_schedule(schedule):
    run = schedule.resolve(100, 10, strict=False)
    for step in (0, 1, 2, 50, 99, 100, 10**6):
        assert type(run(step)) is float
        assert math.isfinite(run(step)), step
        assert run(step) >= 0, step
    plain = schedule.to_dict()
    assert Schedule.from_dict(plain, trust=True).to_dict() == plain
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(schedule) == hash(copy.copy(schedule))
