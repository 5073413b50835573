"""The clock: which steps count."""

import types

import pytest
import torch

from lightning_plugins.core.step_clock import RunClock, StepClock, has_gradient
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


# --- the clock of a run ---


def sgd():
    return torch.optim.SGD([weight_with_gradient()], lr=0.1)


def trainer_of(*optimizers, scaler=None):
    """Return what the clock looks at of a Trainer."""
    plugin = types.SimpleNamespace(scaler=scaler)
    return types.SimpleNamespace(optimizers=list(optimizers), global_step=100, precision_plugin=plugin)


def in_a_batch(clock, trainer, *steps):
    """Take steps, each of which the Trainer counts, in one batch; return how many the clock found."""
    before = clock.applied
    clock.start_batch()
    for step in steps:
        step()
        trainer.global_step += 1
    clock.end_batch()
    return clock.applied - before


def write_into(optimizer):
    """Change the weights as an optimizer would that tells nothing of its steps."""
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].mul_(0.5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_run_counts_the_steps_of_its_first_optimizer(wrapped):
    first, second = sgd(), sgd()
    trainer = trainer_of(*(types.SimpleNamespace(optimizer=one) if wrapped else one for one in (first, second)))
    clock = RunClock(trainer, applied=5)
    assert in_a_batch(clock, trainer, first.step, second.step, second.step) == 1
    assert in_a_batch(clock, trainer, second.step) == 0
    assert (clock.applied, clock.news) == (6, [])


def test_an_optimizer_that_is_exchanged_is_followed_and_told_once():
    first, second = sgd(), sgd()
    trainer = trainer_of(first)
    clock = RunClock(trainer, applied=0)
    assert in_a_batch(clock, trainer, first.step) == 1
    trainer.optimizers = [second]
    assert in_a_batch(clock, trainer, second.step, second.step) == 2
    assert in_a_batch(clock, trainer, second.step, first.step) == 1
    assert clock.news == ["another optimizer was set up; its steps are counted from here on."]
    assert not first._optimizer_step_post_hooks
    clock.close()
    assert not second._optimizer_step_post_hooks


def test_an_optimizer_that_is_exchanged_within_a_batch_loses_no_step():
    first, second = sgd(), sgd()
    trainer = trainer_of(first)
    clock = RunClock(trainer, applied=0)

    def exchange():
        trainer.optimizers = [second]
        second.step()

    assert in_a_batch(clock, trainer, exchange) == 1
    assert in_a_batch(clock, trainer, second.step) == 1
    trainer.optimizers = [first]
    second.param_groups[0]["params"][0].grad = first.param_groups[0]["params"][0].grad = None
    assert in_a_batch(clock, trainer, first.step) == 0  # not applied
    assert clock.news == ["another optimizer was set up; its steps are counted from here on."] * 2


def test_an_optimizer_that_is_exchanged_after_its_step_has_taken_one():
    first, second = sgd(), sgd()
    trainer = trainer_of(first)
    clock = RunClock(trainer, applied=0)

    def exchange():
        first.step()
        trainer.optimizers = [second]

    assert in_a_batch(clock, trainer, exchange) == 1
    assert in_a_batch(clock, trainer, second.step) == 1


def test_steps_of_an_optimizer_that_tells_nothing_are_the_trainers_and_told_once():
    silent = sgd()
    trainer = trainer_of(silent)
    clock = RunClock(trainer, applied=0)
    for _ in range(3):
        assert in_a_batch(clock, trainer, lambda: write_into(silent)) == 1
    # a module's own `optimizer_step` may leave one out
    assert in_a_batch(clock, trainer, lambda: None) == 0
    assert in_a_batch(clock, trainer) == 0
    assert clock.news == ["SGD does not announce its steps; those that the Trainer counts are taken."]


def test_weights_that_are_written_beside_an_announced_step_are_no_step():
    """As an average that is swapped in, or a constraint that is put on the weights."""
    optimizer = sgd()
    trainer = trainer_of(optimizer)
    clock = RunClock(trainer, applied=0)
    clock.start_batch()
    optimizer.step()
    write_into(optimizer)
    trainer.global_step += 1
    clock.end_batch()
    assert in_a_batch(clock, trainer, lambda: None) == 0
    # in mid-window
    clock.start_batch()
    write_into(optimizer)
    clock.end_batch()
    assert (clock.applied, clock.news) == (1, [])


@pytest.mark.parametrize(("others", "scaler"), [([sgd()], None), ([], object())], ids=["several", "scaled"])
def test_what_may_be_anothers_step_or_one_that_was_skipped_is_not_counted(others, scaler):
    """Weights are clipped while another optimizer steps; a scaler skips, and the module writes its weights itself."""
    first = sgd()
    trainer = trainer_of(first, *others, scaler=scaler)
    clock = RunClock(trainer, applied=0)
    assert in_a_batch(clock, trainer, lambda: write_into(first)) == 0
    assert (clock.applied, clock.news) == (0, [])
