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
from lightning_plugins.core.lightning import CallbackOfBoth, MisconfigurationException
from lightning_plugins.ema.snapshots import SnapshotContents, write_snapshot
from tests.support import counts
from tests.support.cases import CALLS, FUNCTIONS, PUBLIC, WITHOUT_ROWS
from tests.support.hostile_values import HOSTILE


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


# Every argument of every public class: a row for each way of calling it.
ROWS = {name: [row for _, row in calls if row] for name, calls in CALLS.items() if name in PUBLIC}


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
    assert set(PUBLIC) == set(ROWS) | set(FUNCTIONS) | WITHOUT_ROWS
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


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        torch.save({"state_dict": {"weight": torch.ones(2)}, "global_step": step}, f"{step}.ckpt")
        write_snapshot(Path("snapshots"), step, [0.05, 0.1], SnapshotContents([{"weight": torch.ones(2)}] * 2, {}))


@pytest.mark.usefixtures("files")
@pytest.mark.filterwarnings("ignore::lightning_plugins.core.validation.LightningPluginsWarning")
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_function_of_files_refuses_a_hostile_argument(name, record_property):
    function, tried = getattr(lightning_plugins, name), 0
    assert set(FUNCTIONS[name]) == set(inspect.signature(function).parameters)
    assert function(**FUNCTIONS[name])
    for argument in FUNCTIONS[name]:
        for value in HOSTILE:
            given = HOSTILE[value]()
            if callable(given) and argument == "score":
                continue  # what a user's own function raises is the user's
            message = outcome(function, {**FUNCTIONS[name], argument: given})
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
        rule = made.for_samples_per_step(3).resolve(100, 10)
        for step in (1, 2, 100, 10**6):
            assert type(rule(step)) is float
            assert 0 <= rule(step) <= 1
        assert pickle.loads(pickle.dumps(made)) == made
        assert hash(made) == hash(copy.copy(made))
    elif isinstance(made, CallbackOfBoth):
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
