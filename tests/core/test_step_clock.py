"""The clock: which steps count."""

import pytest
import torch

from lightning_plugins.core.step_clock import StepClock, has_gradient
from tests.support.training import RecordingSGD


def weight_with_gradient():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    return weight


def test_counts_each_optimizer_for_itself():
    first, second = (torch.optim.SGD([weight_with_gradient()], lr=0.1) for _ in range(2))
    clocks = StepClock(first), StepClock(second)
    for _ in range(3):
        first.step()
    second.step()
    assert [(clock.attempted, clock.applied) for clock in clocks] == [(3, 3), (1, 1)]


def test_a_step_without_a_gradient_is_not_applied():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))], lr=0.1)
    clock = StepClock(optimizer)
    optimizer.step()
    assert not has_gradient(optimizer)
    optimizer.param_groups[0]["params"][1].grad = torch.ones(2)
    optimizer.step()
    assert (clock.attempted, clock.applied) == (2, 1)


def test_a_fused_optimizer_that_skips_inside_did_not_apply():
    # GradScaler sets `found_inf` on a fused optimizer for the call of `step`, which then skips on the device.
    optimizer = torch.optim.SGD([weight_with_gradient()], lr=0.1, fused=True)
    clock = StepClock(optimizer)
    for overflow in (0.0, 1.0, 1.0, 0.0):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(overflow)
        before = optimizer.param_groups[0]["params"][0].detach().clone()
        optimizer.step()
        assert torch.equal(before, optimizer.param_groups[0]["params"][0]) == bool(overflow)
    assert (clock.attempted, clock.applied) == (4, 2)
    del optimizer.grad_scale, optimizer.found_inf
    optimizer.step()
    assert (clock.attempted, clock.applied) == (5, 3)


def test_an_optimizer_whose_step_calls_its_parents_counts_once():
    optimizer = RecordingSGD([weight_with_gradient()], lr=0.1)  # torch fires every hook twice for it
    clock = StepClock(optimizer)
    optimizer.step()
    optimizer.step(lambda: torch.tensor(0.0))
    assert (clock.attempted, clock.applied) == (2, 2)


def test_a_step_that_fails_does_not_count():
    optimizer = torch.optim.SGD([weight_with_gradient()], lr=0.1)
    clock = StepClock(optimizer)

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.step(fail)
    optimizer.step()
    assert (clock.attempted, clock.applied) == (1, 1)


def test_restore_and_close():
    optimizer = torch.optim.SGD([weight_with_gradient()], lr=0.1)
    clock = StepClock(optimizer)
    clock.restore(attempted=10, applied=8)
    optimizer.step()
    clock.close()
    optimizer.step()
    assert (clock.attempted, clock.applied) == (11, 9)
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_a_rank_without_an_element_of_what_is_trained_steps_with_the_others():
    """FSDP1 may leave it frozen parts alone; it never has a gradient."""
    frozen, trained = torch.nn.Parameter(torch.ones(2), requires_grad=False), torch.nn.Parameter(torch.empty(0))
    for parameters, steps in (([frozen, trained], 1), ([frozen], 0)):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        clock = StepClock(optimizer)
        optimizer.step()
        assert clock.applied == steps
