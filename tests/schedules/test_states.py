"""States that a checkpoint hands over are checked like arguments; arguments may be any sequence and any mapping."""

from collections import UserList
from types import MappingProxyType

import pytest
import torch

from lightning_plugins import (
    Constant,
    Join,
    LearningRateScheduler,
    Linear,
    PiecewiseConstant,
    Plateau,
    Schedule,
    ScheduleLR,
    Segments,
)
from tests.support.training import RecordingSGD


def scheduler_after(steps):
    optimizer = RecordingSGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    scheduler = ScheduleLR(optimizer, Linear(10, 1, 0))
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    return scheduler


# -- any sequence and any mapping, as Hydra hands them over


def test_arguments_may_be_any_sequence_or_mapping():
    assert LearningRateScheduler(Constant(), base_lr=UserList([0.1, 0.2])).base_lr == (0.1, 0.2)
    assert PiecewiseConstant(UserList([2]), UserList([1, 0.5])) == PiecewiseConstant([2], [1, 0.5])
    plain = Schedule.from_dict(
        MappingProxyType(
            {"class": "Segments", "segments": UserList([MappingProxyType({"end": 1.0, "steps": 3}), {"end": 0.0}])}
        )
    )
    assert isinstance(plain, Segments)
    assert plain.resolve(5).preview(5) == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0, 0.5])
    assert Segments(UserList(plain.segments)) == plain


def test_omegaconfs_lists_and_mappings_are_taken():
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create(
        {"base_lr": [0.1, 0.2], "schedule": {"class": "PiecewiseConstant", "boundaries": [2], "values": [1, 0.5]}}
    )
    callback = LearningRateScheduler(Schedule.from_dict(config.schedule), base_lr=config.base_lr)
    assert callback.base_lr == (0.1, 0.2)
    assert callback.schedule == PiecewiseConstant([2], [1, 0.5])


def test_hydras_lists_and_mappings_of_schedules_are_taken():
    """Hydra wraps the schedules that it has made once more, as configurations with a type."""
    instantiate = pytest.importorskip("hydra.utils").instantiate

    def made(name, **arguments):
        return {"_target_": f"lightning_plugins.{name}", **arguments}

    line = made("Linear", steps=10, start=1, end=0)
    assert instantiate(made("Join", parts=[line, line], boundaries=[5])) == Join([Linear(10, 1, 0)] * 2, [5])
    for group in ("backbone", 0):
        others = {"parameter": "weight_decay", "clock": "time"}
        callback = instantiate(made("LearningRateScheduler", schedule={group: line}, **others))
        assert callback.schedule == {group: Linear(10, 1, 0)}
        assert (callback.parameter, callback.clock) == ("weight_decay", "time")
    plateau = made("Plateau", monitor="loss")
    callback = instantiate(made("LearningRateScheduler", schedule=line, base_lr=[0.1, 0.2], plateau=plateau))
    assert (callback.base_lr, callback.plateau) == ((0.1, 0.2), Plateau("loss"))


# -- states


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": 2}, ValueError, "must be of version 1, got version 2 .*later release"),
        ({"position": -1}, ValueError, "`position` must be at least 0 steps, got -1"),
        ({"position": 1.5}, TypeError, "`position` must be a whole number of steps, got 1.5"),
        ({"position": None}, TypeError, "`position` must be a whole number of steps, got None"),
        ({"position": 10**30}, ValueError, "`position` must be at most"),
        ({"own_base": 3}, TypeError, "`own_base` must be a list, got 3"),
        ({"own_base": [-1]}, ValueError, "`own_base` must be at least 0, got -1"),
        ({"own_base": ["0"]}, TypeError, "`own_base` must be a whole number, got '0'"),
    ],
)
def test_a_state_is_checked_like_arguments_and_changes_nothing(change, error, message):
    scheduler = scheduler_after(3)
    with pytest.raises(error, match=message):
        scheduler.load_state_dict({**scheduler.state_dict(), **change})
    assert (scheduler.position, scheduler.get_last_lr()) == (3, [pytest.approx(0.07)])


RUN = {"batches_per_epoch": 4, "accumulation": [[0, 1]], "unit": "epoch", "carry": False, "stands": [0, 0, 0]}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"version": 2, "run": {}}, ValueError),
        ({"run": 3}, ValueError),
        ({"run": {"curve": {}, "latest": None, "begin": 0, "position": 0.0}}, ValueError),
        *(
            ({"run": {"curve": {**RUN, **wrong}, "latest": None, "begin": 0, "position": 0.0}}, error)
            for wrong, error in (
                ({"batches_per_epoch": -4}, ValueError),
                ({"batches_per_epoch": "4"}, TypeError),
                ({"accumulation": []}, ValueError),
                ({"accumulation": [[1, 1]]}, ValueError),
                ({"accumulation": [[0, 0]]}, ValueError),
                ({"accumulation": [[0, 1, 2]]}, ValueError),
                ({"unit": "batch"}, ValueError),
                ({"carry": "no"}, TypeError),
                ({"stands": [0, 0]}, ValueError),
                ({"stands": [0, -1, 0]}, ValueError),
            )
        ),
        ({"run": {"curve": RUN, "latest": None, "begin": -1, "position": 0.0}}, ValueError),
        ({"run": {"curve": RUN, "latest": None, "begin": 0, "position": float("nan")}}, ValueError),
        ({"run": {"curve": RUN, "latest": None, "begin": 0, "position": "far"}}, TypeError),
        ({"run": {"curve": RUN, "latest": 7, "begin": 0, "position": 0.0}}, ValueError),
    ],
)
def test_the_callbacks_state_is_checked_like_arguments(change, error):
    callback = LearningRateScheduler(Constant())
    with pytest.raises(error):
        callback.load_state_dict({"version": 1, **change})
    assert callback.get_state() == {}


def test_a_state_of_the_first_release_is_read():
    callback = LearningRateScheduler(Constant())
    callback.load_state_dict({})
    callback.load_state_dict({"version": 1, "plateau": [1.0, 0.5, 0, 0]})
    assert callback.get_state() == {}
