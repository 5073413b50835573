"""Schedules over time, with a clock that the test moves, against closed forms of the time that is over."""

import math
import time
from datetime import timedelta

import lightning.pytorch as unified
import pytest
import torch

from lightning_plugins import (
    Cosine,
    InverseSqrt,
    Join,
    LearningRateScheduler,
    Linear,
    Noam,
    PiecewiseConstant,
    ReciprocalSqrt,
    RNMTPlus,
    WarmupCosine,
    WarmupStableDecay,
)
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.schedules import time_budget
from lightning_plugins.schedules.time_budget import resolve_in_time
from tests.support.clock import Clock
from tests.support.training import loader, make_module, make_trainer, rates


@pytest.fixture
def clock(monkeypatch):
    """A clock for the schedule and for Lightning's Timer."""
    clock = Clock()
    monkeypatch.setattr(time_budget, "seconds", clock)

    class Time:
        monotonic = clock

    monkeypatch.setattr(unified.callbacks.timer, "time", Time)
    return clock


class Work(unified.Callback):
    """Lets every batch take ``batch`` seconds, and every validation ``validation``."""

    def __init__(self, clock, batch=1.0, validation=0.0):
        self.clock, self.batch, self.validation, self.begins = clock, batch, validation, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.begins.append(self.clock.now)
        self.clock.now += self.batch(len(self.begins)) if callable(self.batch) else self.batch

    def on_validation_start(self, trainer, pl_module):
        self.clock.now += self.validation


def timed(schedule, **options):
    return LearningRateScheduler(schedule, clock="time", record=True, **options)


def fit(path, callback, work, *callbacks, samples=4, validation=None, module=None, ckpt_path=None, **options):
    """Train until something ends the run; return the module and the Trainer."""
    module = module or make_module()
    if validation is not None:
        module.validation_step = lambda batch, batch_idx: None
    options = {"max_epochs": -1, **options}
    trainer = make_trainer(path, callbacks=[callback, *callbacks, work], num_sanity_val_steps=1, **options)
    trainer.fit(module, loader(samples), validation, ckpt_path=ckpt_path)
    return module, trainer


def warmup_cosine(share, warmup):
    """The closed form, of the share of the time that is over."""
    return share / warmup if share < warmup else (1 + math.cos(math.pi * (share - warmup) / (1 - warmup))) / 2


# -- against the closed form


@pytest.mark.parametrize("limit", ["00:00:00:20", timedelta(seconds=20), {"seconds": 20}])
def test_the_rate_reaches_its_end_when_time_does(tmp_path, clock, limit):
    work = Work(clock, batch=lambda number: 0.5 + number % 3)
    module, trainer = fit(tmp_path, callback := timed(WarmupCosine("25%")), work, max_time=limit)
    over = [(begin - 1000) / 20 for begin in work.begins]
    assert rates(module) == pytest.approx([0.1 * warmup_cosine(share, 0.25) for share in over])
    assert callback.lrs == rates(module)
    assert callback.resolved == WarmupCosine(5000, total=20_000)
    assert trainer.global_step < 20
    assert clock.now >= 1020 > work.begins[-1]


def test_a_timer_of_ones_own_and_the_first_of_several(tmp_path, clock):
    timer = unified.callbacks.Timer

    class Longer(timer):
        pass

    class Endless(timer):
        pass

    timers = [Longer({"minutes": 1}), timer(timedelta(seconds=10)), Endless()]
    module, _ = fit(tmp_path, timed(Linear(None, 1, 0)), Work(clock), *timers)
    assert rates(module) == pytest.approx([0.1 * (1 - second / 10) for second in range(10)])


def test_a_timer_that_waits_for_the_epochs_end_leaves_the_last_value(tmp_path, clock):
    timer = unified.callbacks.Timer(timedelta(seconds=6), interval="epoch")
    module, _ = fit(tmp_path, timed(Linear(None, 1, 0.5)), Work(clock), timer, samples=8)
    assert rates(module) == pytest.approx([0.1 * max(1 - second / 12, 0.5) for second in range(8)])


def test_validation_takes_its_time_and_accumulation_reads_the_clock_at_the_step(tmp_path, clock):
    work = Work(clock, validation=3.0)
    module, _ = fit(
        tmp_path,
        timed(Linear(None, 1, 0)),
        work,
        validation=loader(1),
        accumulate_grad_batches=2,
        max_time={"seconds": 28},
    )
    # two steps of two batches, then a validation of 3 s: 7 s an epoch; the rate is that of a window's second batch
    assert rates(module) == pytest.approx([0.1 * (1 - (7 * epoch + s) / 28) for epoch in range(4) for s in (1, 3)])


def test_other_parameters_groups_and_lightnings_monitor_in_any_order(tmp_path, clock):
    values = []

    class Seen(unified.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            group = trainer.optimizers[0].param_groups[0]
            values.append((group["lr"], group["momentum"]))

    parts = [timed({0: Linear(None, 1, 0)}), timed(Cosine(None, 1, 0.5), parameter="momentum"), Seen()]
    for callbacks in (parts, parts[::-1]):
        values.clear()
        fit(
            tmp_path,
            callbacks[0],
            Work(clock),
            *callbacks[1:],
            module=make_module(momentum=0.8),
            max_time={"seconds": 4},
        )
        expected = [(0.1 * (1 - t / 4), 0.8 * (0.75 + 0.25 * math.cos(math.pi * t / 4))) for t in range(4)]
        assert values == [pytest.approx(values) for values in expected]


def test_manual_optimization_has_a_length_too(tmp_path, clock):
    module = make_module(automatic_optimization=False)

    def training_step(batch, batch_idx):
        for _ in range(2):  # two steps in one batch have one position
            module.layer(batch).pow(2).mean().backward()
            module.optimizers().step()

    module.training_step = training_step
    fit(tmp_path, timed(Linear(None, 1, 0)), Work(clock), module=module, max_time={"seconds": 4})
    assert rates(module) == pytest.approx([0.1 * (1 - second / 4) for second in range(4) for _ in range(2)])


# -- the end of the run


@pytest.mark.parametrize("options", [{"max_steps": 3}, {"max_epochs": 1, "limit_train_batches": 3}])
def test_steps_or_epochs_that_come_first_end_the_run_inside_the_schedule(tmp_path, clock, options, caplog):
    with caplog.at_level("INFO"):
        module, _ = fit(tmp_path, timed(Linear(None, 1, 0)), Work(clock), max_time={"seconds": 10}, **options)
    assert rates(module) == pytest.approx([0.1, 0.09, 0.08])
    assert "Learning-rate schedule: the run ends inside it, with 7.0 s of its time left." in caplog.text


def test_a_run_that_time_ends_says_nothing_more(tmp_path, clock, caplog):
    with caplog.at_level("INFO"):
        fit(tmp_path, timed(Linear(None, 1, 0)), Work(clock), max_time={"seconds": 10})
    assert "Milliseconds of the run: 10000." in caplog.text
    assert "ends inside" not in caplog.text


# -- resume


def run_in_two(path, clock, *, second=20, ours=True, their_timer=True, pause=500.0):
    """Train for 20 s but stop after 8, wait, and go on; return the rates of both parts."""
    first = timed(Linear(None, 1, 0)) if ours else unified.Callback()
    options = {"max_time": {"seconds": 20}} if their_timer else {}
    module, trainer = fit(path, first, Work(clock), max_steps=8, **options)
    trainer.save_checkpoint(path / "eight.ckpt")
    clock.now += pause
    again, _ = fit(
        path, timed(Linear(None, 1, 0)), Work(clock), ckpt_path=path / "eight.ckpt", max_time={"seconds": second}
    )
    return rates(module), rates(again)


def test_a_resumed_run_goes_on_where_it_stood_whatever_the_pause(tmp_path, clock):
    before, after = run_in_two(tmp_path, clock)
    assert before + after == pytest.approx([0.1 * (1 - second / 20) for second in range(20)])


def test_a_clock_that_begins_anew_as_after_a_restart_of_the_machine(tmp_path, clock):
    _, after = run_in_two(tmp_path, clock, pause=-1007.0)
    assert after == pytest.approx([0.1 * (1 - second / 20) for second in range(8, 20)])


def test_more_time_on_resume_is_followed_at_once(tmp_path, clock):
    _, after = run_in_two(tmp_path, clock, second=40)
    assert after == pytest.approx([0.1 * (1 - second / 40) for second in range(8, 40)])


def test_added_to_a_run_it_starts_at_the_time_that_the_timer_has_counted(tmp_path, clock):
    _, after = run_in_two(tmp_path, clock, ours=False)
    assert after == pytest.approx([0.1 * (1 - second / 20) for second in range(8, 20)])


def test_a_timer_that_lost_its_state_ends_the_run_later_and_the_schedule_ends_with_it(tmp_path, clock):
    fit(tmp_path, timed(Linear(None, 1, 0)), Work(clock), max_steps=8, max_time={"seconds": 20})[1].save_checkpoint(
        tmp_path / "a.ckpt"
    )
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del checkpoint["callbacks"]["Timer"]
    torch.save(checkpoint, tmp_path / "b.ckpt")
    module, _ = fit(
        tmp_path, timed(Linear(None, 1, 0)), Work(clock), ckpt_path=tmp_path / "b.ckpt", max_time={"seconds": 20}
    )
    assert rates(module) == pytest.approx([0.1 * (1 - second / 28) for second in range(8, 28)])


@pytest.mark.parametrize("kinds", [("time", "attempted"), ("attempted", "time")])
def test_a_run_may_change_its_clock_on_resume(tmp_path, clock, kinds, caplog):
    make = {"time": timed, "attempted": lambda schedule: LearningRateScheduler(schedule, record=True)}
    options = {"max_steps": 8, "max_time": {"seconds": 20}}
    _, trainer = fit(tmp_path, make[kinds[0]](Linear(None, 1, 0)), Work(clock), **options)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with caplog.at_level("INFO"):
        module, _ = fit(
            tmp_path,
            make[kinds[1]](Linear(None, 1, 0)),
            Work(clock),
            ckpt_path=tmp_path / "a.ckpt",
            **{**options, "max_steps": 10},
        )
    total = 20 if kinds[1] == "time" else 10
    assert rates(module) == pytest.approx([0.1 * (1 - 8 / total), 0.1 * (1 - 9 / total)])
    assert "does not load the state of the scheduler that was here before it" in caplog.text


def test_a_second_fit_goes_on(tmp_path, clock):
    callback = timed(Linear(None, 1, 0))
    module, trainer = fit(tmp_path, callback, Work(clock), max_steps=8, max_time={"seconds": 20})
    trainer.fit_loop.epoch_loop.max_steps = 12
    clock.now += 77
    trainer.fit(module, loader(4))
    assert callback.lrs == pytest.approx([0.1 * (1 - second / 20) for second in range(12)])


@pytest.mark.parametrize(
    ("elapsed", "error", "message"),
    [
        (-1, ValueError, "`elapsed` must be at least 0"),
        (float("nan"), ValueError, "`elapsed` must be finite"),
        (1e300, ValueError, "`elapsed` must be at least 0 and at most"),
        ("1", TypeError, "`elapsed` must be a number, got '1'"),
        (None, TypeError, "`elapsed` must be a number, got None"),
    ],
)
def test_times_that_no_run_took_are_refused(elapsed, error, message):
    with pytest.raises(error, match=message):
        timed(Linear(None, 1, 0)).load_state_dict({"version": 1, "elapsed": elapsed})


# -- what cannot be meant


def test_without_a_limit_of_time_the_error_says_how_to_give_one(tmp_path, clock):
    with pytest.raises(MisconfigurationException, match=r"needs a run that ends by time.*Trainer\(max_time="):
        fit(tmp_path, timed(Linear(None, 1, 0)), Work(clock), max_steps=3)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (WarmupCosine(100), r"`warmup` must be a share of the time with `clock='time'`, .* got 100 steps: how long"),
        (WarmupCosine("5%", total=1000), "`total` must be a share of the time .* got 1000 steps"),
        (WarmupCosine("2ep"), "`warmup` must be a share of the time .* got '2ep'"),
        (PiecewiseConstant(["10%", 200], [1, 0.5, 0.1]), r"`boundaries\[1\]` must be a share .* got 200 steps"),
        (Linear("5%", 0, 1).cycle("10%").delay(3), "`steps` must be a share .* got 3 steps"),
        (Linear(5, 0, 1).cycle("10%"), "`steps` must be a share .* got 5 steps"),
        (Noam(512, "5%"), r"must not depend on the number of steps with `clock='time'`, got Noam"),
        (Join([Linear("5%", 0, 1), ReciprocalSqrt("5%") * 2], ["5%"]), "number of steps .* got ReciprocalSqrt"),
        (RNMTPlus(4, "5%", "10%", "20%"), "number of steps .* got RNMTPlus"),
        (InverseSqrt("5%", timescale=10), "number of steps .* got InverseSqrt"),
        (InverseSqrt(0), "number of steps .* got InverseSqrt"),
        (WarmupStableDecay("60%", "50%"), r"got 6000 \+ 5000 > 10000 steps.* Here a step is a millisecond"),
    ],
)
def test_lengths_whose_time_is_not_known_are_refused_with_the_remedy(tmp_path, clock, schedule, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, timed(schedule), Work(clock), max_time={"seconds": 10})


def test_what_has_shares_alone_is_taken():
    inverse = resolve_in_time(InverseSqrt("5%"), 10_000)
    assert [inverse(0), inverse(500), inverse(2000)] == [0, 1, 0.5]
    cycles = resolve_in_time(Linear(None, 1, 0).cycle("25%").hold_every("1%").scale(2), 10_000)
    assert cycles(2599) == pytest.approx(2 * (1 - 0 / 25))
    assert cycles(1250) == pytest.approx(2 * (1 - 12 / 25))


# -- the real clock


def test_a_real_run_of_half_a_second(tmp_path):
    module = make_module()
    callback = timed(Linear(None, 1, 0))
    trainer = make_trainer(tmp_path, callbacks=[callback], max_epochs=-1, max_time={"milliseconds": 500})
    begin = time.monotonic()
    trainer.fit(module, loader(64))
    lasted = time.monotonic() - begin
    assert callback.lrs == sorted(callback.lrs, reverse=True) == rates(module)
    assert 0.45 < lasted < 30
    assert rates(module)[0] > 0.08
    # the last batch began in the last tenth of the time, also on a machine that is busy with other things
    assert rates(module)[-1] < 0.03
