"""What is said of an optimizer's groups that lack what a schedule is to set."""

import pytest
import torch

from lightning_plugins.schedules.scheduler_arguments import check_group


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
