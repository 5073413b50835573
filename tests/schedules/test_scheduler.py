"""The torch schedulers in loops of one's own."""

import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, LRScheduler, SequentialLR

from lightning_plugins import (
    Constant,
    Cosine,
    Linear,
    Noam,
    NoamLR,
    ScheduleLR,
    WarmupCosine,
    WarmupCosineLR,
    WarmupLinear,
)
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.support.training import RecordingSGD


def weights(number=1):
    return [torch.nn.Parameter(torch.ones(3)) for _ in range(number)]


def train(optimizer, scheduler, steps, gradient=1.0):
    for _ in range(steps):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = None if gradient is None else torch.full_like(weight, gradient)
        optimizer.step()
        scheduler.step()


def used(optimizer, group=0):
    return [rates[group] for rates in optimizer.used]


def test_agrees_with_lambda_lr_step_by_step():
    schedule = WarmupCosine(5, 2, 20)
    ours, theirs = RecordingSGD(weights(), lr=0.3), RecordingSGD(weights(), lr=0.3)
    train(ours, ScheduleLR(ours, schedule), 30)
    train(theirs, LambdaLR(theirs, schedule), 30)
    assert used(ours) == used(theirs)


def test_is_a_torch_scheduler():
    optimizer = RecordingSGD(weights(), lr=0.3)
    scheduler = ScheduleLR(optimizer, Linear(10, 1, 0))
    assert isinstance(scheduler, LRScheduler)
    assert scheduler.get_last_lr() == [0.3]
    train(optimizer, scheduler, 5)
    assert (scheduler.position, scheduler.last_epoch) == (5, 5)
    assert scheduler.get_last_lr() == scheduler.get_lr() == [0.15]
    scheduler.step(8)  # torch's deprecated argument: the position
    assert scheduler.get_last_lr() == pytest.approx([0.06])


def test_works_inside_torchs_combinations():
    one = RecordingSGD(weights(), lr=0.4)
    train(one, ChainedScheduler([ScheduleLR(one, Linear(4, 1, 0))]), 4)
    assert used(one) == pytest.approx([0.4, 0.3, 0.2, 0.1])
    two = RecordingSGD(weights(), lr=0.4)
    parts = [ScheduleLR(two, Constant(0.5)), ScheduleLR(two, Linear(4, 1, 0))]
    train(two, SequentialLR(two, parts, milestones=[2]), 6)
    assert used(two) == pytest.approx([0.2, 0.2, 0.4, 0.3, 0.2, 0.1])


def test_every_group_has_its_own_base_and_one_added_later_begins_with_the_rate_it_brings():
    optimizer = RecordingSGD([{"params": weights(), "lr": 0.1}, {"params": weights(), "lr": 1.0}], lr=9.0)
    scheduler = ScheduleLR(optimizer, Linear(10, 1, 0))
    train(optimizer, scheduler, 4)
    optimizer.add_param_group({"params": weights(), "lr": 5.0})
    train(optimizer, scheduler, 2)
    assert used(optimizer, 0) == pytest.approx([0.1, 0.09, 0.08, 0.07, 0.06, 0.05])
    assert used(optimizer, 1) == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert [rates[2] for rates in optimizer.used[4:]] == pytest.approx([5.0, 5.0 * 0.5 / 0.6])


def test_base_lr_for_all_or_for_each():
    optimizer = RecordingSGD([{"params": weights()}, {"params": weights()}], lr=9.0)
    assert ScheduleLR(optimizer, Constant(), base_lr=2).get_last_lr() == [2, 2]
    assert ScheduleLR(optimizer, Constant(), base_lr=[2, 3]).get_last_lr() == [2, 3]


def test_a_base_rate_is_taken_by_an_optimizer_whose_own_rate_is_0():
    optimizer = RecordingSGD(weights(), lr=0.0)
    train(optimizer, ScheduleLR(optimizer, Linear(4, 1, 0), base_lr=0.4), 4)
    assert used(optimizer) == pytest.approx([0.4, 0.3, 0.2, 0.1])
    # a hyper-parameter that is 0 is off, and stays so
    decay = ScheduleLR(optimizer, Linear(4, 1, 0), parameter="weight_decay", base_lr=0.4)
    assert decay.get_last_lr() == [0]


def test_the_rates_of_a_position_may_be_asked_for_and_a_group_that_has_just_come_has_its_own():
    optimizer = RecordingSGD(weights(), lr=0.4)
    scheduler = ScheduleLR(optimizer, Linear(4, 1, 0))
    scheduler.last_epoch = 3
    assert scheduler.get_lr() == pytest.approx([0.1])
    optimizer.add_param_group({"params": weights(), "lr": 5.0})
    assert scheduler.get_lr() == pytest.approx([0.1, 5.0])


def test_a_rate_that_is_a_tensor_is_filled_in_place():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.SGD(weights(), lr=rate, foreach=False)
    held = optimizer.param_groups[0]["lr"]
    scheduler = ScheduleLR(optimizer, Linear(4, 1, 0))
    train(optimizer, scheduler, 2)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == pytest.approx(0.25)


@pytest.mark.parametrize(("parameter", "start"), [("weight_decay", 0.2), ("momentum", 0.9)])
def test_other_hyperparameters_leave_the_rate_alone(parameter, start):
    optimizer = RecordingSGD(weights(), lr=0.3, **{parameter: start})
    scheduler = ScheduleLR(optimizer, Cosine(10, 1, 0.5), parameter=parameter)
    train(optimizer, scheduler, 10)
    assert used(optimizer) == [0.3] * 10
    assert optimizer.param_groups[0][parameter] == pytest.approx(start / 2)


def test_two_parameters_of_one_optimizer():
    optimizer = RecordingSGD(weights(), lr=0.3, weight_decay=0.2)
    rate, decay = (
        ScheduleLR(optimizer, Linear(4, 1, 0)),
        ScheduleLR(optimizer, Linear(4, 0, 1), parameter="weight_decay"),
    )
    train(optimizer, rate, 2)
    decay.seek(2)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == pytest.approx((0.15, 0.1))


def test_the_minimum_is_absolute_and_lifts_the_warm_up():
    optimizer = RecordingSGD(weights(), lr=1.0)
    train(optimizer, ScheduleLR(optimizer, WarmupLinear(4, 8), min_lr=0.4), 9)
    assert used(optimizer) == [0.4, 0.4, 0.5, 0.75, 1.0, 0.75, 0.5, 0.4, 0.4]


# -- state


def resumed(saved_after, schedule, longer=None):
    optimizer = RecordingSGD(weights(), lr=0.3)
    scheduler = ScheduleLR(optimizer, schedule)
    train(optimizer, scheduler, saved_after)
    states = optimizer.state_dict(), scheduler.state_dict()
    optimizer = RecordingSGD(weights(), lr=77.0)
    scheduler = ScheduleLR(optimizer, longer or schedule)
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    train(optimizer, scheduler, 5)
    return used(optimizer)


def test_resumes_exactly_and_with_a_longer_horizon_on_the_new_curve():
    schedule, longer = WarmupCosine(3, total=10), WarmupCosine(3, total=20)
    assert resumed(6, schedule) == [0.3 * schedule(step) for step in range(6, 11)]
    assert resumed(10, schedule, longer) == [0.3 * longer(step) for step in range(10, 15)]


def test_the_state_is_the_position():
    scheduler = ScheduleLR(RecordingSGD(weights(), lr=0.3), Linear(10, 1, 0))
    scheduler.seek(4)
    assert scheduler.state_dict() == {"format": "lightning_plugins.ScheduleLR", "version": 1, "position": 4}


def test_the_state_of_another_scheduler_is_refused_whole():
    optimizer = RecordingSGD(weights(), lr=0.3)
    scheduler = ScheduleLR(optimizer, Linear(10, 1, 0))
    foreign = LambdaLR(RecordingSGD(weights(), lr=0.3), lambda step: 1.0).state_dict()
    with pytest.raises(ValueError, match=r"`state_dict` must come from a ScheduleLR.*`seek` the position instead"):
        scheduler.load_state_dict(foreign)
    assert scheduler.position == 0


def test_close_takes_every_hook_off():
    optimizer = RecordingSGD(weights(), lr=0.3)
    ScheduleLR(optimizer, Linear(10, 1, 0)).close()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


# -- clocks


def test_the_applied_clock_waits_for_steps_that_change_nothing():
    optimizer = RecordingSGD(weights(), lr=1.0)
    scheduler = ScheduleLR(optimizer, Linear(10, 1, 0), clock="applied")
    train(optimizer, scheduler, 2)
    train(optimizer, scheduler, 3, gradient=None)
    train(optimizer, scheduler, 1)
    assert used(optimizer) == pytest.approx([1.0, 0.9, 0.8, 0.8, 0.8, 0.8])
    assert scheduler.position == 3
    scheduler.seek(7)
    train(optimizer, scheduler, 1)
    assert scheduler.position == 8


def test_the_applied_clock_under_a_gradient_scaler():
    optimizer = RecordingSGD(weights(), lr=1.0)
    scheduler = ScheduleLR(optimizer, Linear(10, 1, 0), clock="applied")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in (False, True, True, False):
        for weight in optimizer.param_groups[0]["params"]:
            weight.grad = None
            scaler.scale(weight.sum() * (float("inf") if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    assert scheduler.position == 2


def test_warns_once_when_it_is_stepped_per_epoch():
    optimizer = RecordingSGD(weights(), lr=1.0)
    scheduler = ScheduleLR(optimizer, Linear(10, 1, 0))
    for _ in range(3):
        optimizer.step()
    with pytest.warns(LightningPluginsWarning, match='3 optimizer steps passed.*"interval": "step"'):
        scheduler.step()
    for _ in range(3):
        optimizer.step()
    scheduler.step()  # silent: warnings are errors here


# -- ready-made forms


def test_warmup_cosine_lr():
    optimizer = RecordingSGD(weights(), lr=0.3)
    train(optimizer, WarmupCosineLR(optimizer, 4, 20, hold_steps=2, start_factor=0.1, end_factor=0.05), 25)
    assert used(optimizer) == [0.3 * value for value in WarmupCosine(4, 2, 20, 0.1, 0.05).preview(25)]


@pytest.mark.parametrize("lengths", [{"warmup": 4, "hold": 2}, {"warmup": "20%", "hold": 0.1}])
def test_ready_made_forms_take_the_words_of_their_schedules(lengths):
    optimizer = RecordingSGD(weights(), lr=0.3)
    train(optimizer, WarmupCosineLR(optimizer, total=20, start=0.1, end=0.05, **lengths), 25)
    assert used(optimizer) == [0.3 * value for value in WarmupCosine(4, 2, 20, 0.1, 0.05).preview(25)]
    assert NoamLR(optimizer, 16, warmup=8).get_last_lr() == NoamLR(optimizer, 16, 8).get_last_lr()


@pytest.mark.parametrize(
    ("start_step", "step_duration", "min_lr"), [(0, 1, 0.0), (5, 1, 0.0), (3, 4, 0.0), (0, 1, 0.1)]
)
def test_noam_lr_is_opennmts_wrapper_around_noam(start_step, step_duration, min_lr):
    optimizer = RecordingSGD(weights(), lr=2.0)
    scheduler = NoamLR(optimizer, 16, 8, start_step=start_step, step_duration=step_duration, min_lr=min_lr)
    train(optimizer, scheduler, 40)
    for step, rate in enumerate(used(optimizer)):  # the article's table, line by line
        n = max(step - start_step, 0) // step_duration + 1
        assert rate == pytest.approx(max(2 * 16**-0.5 * min(n**-0.5, n * 8**-1.5), min_lr), rel=1e-12)
    assert Noam(16, 8)(0) > 0


def test_the_worked_example_of_the_article():
    optimizer = torch.optim.Adam(weights(), lr=2.0)
    scheduler = NoamLR(optimizer, model_dim=4, warmup_steps=8000, min_lr=1e-4)
    scheduler.seek(1)
    assert scheduler.get_last_lr() == [1e-4]  # what its log shows at step 1
    assert 2 * Noam(4, 8000)(1) == pytest.approx(0.000002795, rel=1e-3)
