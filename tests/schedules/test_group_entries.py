"""What is said of an optimizer's groups that lack what a schedule is to set; and timm's scale of a group."""

import pytest
import torch

from lightning_plugins import Constant, Linear, ScheduleLR, WarmupCosine
from lightning_plugins.schedules.scheduler_arguments import check_group
from tests.support.training import RecordingSGD


@pytest.mark.parametrize("value", [True, "0.1", None])
def test_an_entry_that_is_no_number_is_named(value):
    with pytest.raises(TypeError, match="`parameter` must name a number of the optimizer's groups, got 'nesterov'"):
        check_group({"nesterov": value}, "nesterov")


@pytest.mark.parametrize("value", [1, 0.5, torch.tensor(0.5), (0.9, 0.999)])
def test_a_number_is_taken(value):
    check_group({"momentum": value}, "momentum")


def test_the_numbers_there_are_leave_out_first_values_and_switches():
    group = {"lr": 0.1, "initial_lr": 0.2, "nesterov": False, "momentum": 0.9, "params": []}
    with pytest.raises(ValueError, match="there are lr, momentum") as caught:
        check_group(group, "weight_decay")
    assert "initial_lr" not in str(caught.value)
    assert "nesterov" not in str(caught.value)


# -- timm's scale of a group


def scaled(*groups):
    return RecordingSGD([{"params": [torch.nn.Parameter(torch.ones(3))], **group} for group in groups], lr=0.1)


def train(optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.step()
        scheduler.step()


def test_the_scale_of_a_group_multiplies_its_rate():
    optimizer, schedule = scaled({"lr_scale": 0.25}, {"lr_scale": 1.0}, {}), WarmupCosine(2, total=8)
    train(optimizer, ScheduleLR(optimizer, schedule, min_lr=0.001), 8)
    for group, scale in enumerate((0.25, 1.0, 1.0)):
        expected = [max(0.1 * schedule(step) * scale, 0.001) for step in range(8)]
        assert [used[group] for used in optimizer.used] == pytest.approx(expected)


def test_the_scale_is_the_rates_alone_and_a_written_rate_contains_it():
    optimizer = scaled({"lr_scale": 0.5, "weight_decay": 0.2})
    decay = ScheduleLR(optimizer, Constant(), parameter="weight_decay")
    assert decay.get_last_lr() == [0.2]
    scheduler = ScheduleLR(optimizer, Linear(10, 1, 0), base_lr=0.2)
    assert scheduler.get_last_lr() == scheduler.get_lr() == [0.1]
    train(optimizer, scheduler, 2)
    optimizer.param_groups[0]["lr"] = 0.04
    train(optimizer, scheduler, 1)
    assert scheduler.get_last_lr() == pytest.approx([0.04 * 0.7 / 0.8])


@pytest.mark.parametrize(("scale", "error"), [(-1, ValueError), ("half", TypeError), (float("nan"), ValueError)])
def test_a_scale_that_is_none_is_refused(scale, error):
    with pytest.raises(error, match="`lr_scale` must be"):
        ScheduleLR(scaled({"lr_scale": scale}), Constant())
