"""The callback in a real Trainer: the rate is read inside the optimizer's step."""

import csv
import logging
import pickle
from contextlib import nullcontext

import lightning.pytorch as unified
import pytest
import torch

from lightning_plugins import (
    LearningRateScheduler,
    Linear,
    Noam,
    ScheduleLR,
    WarmupCosine,
    WarmupLinear,
)
from lightning_plugins.core.lightning import CallbackOfBoth, MisconfigurationException
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.support.training import loader, make_module, make_trainer, rates


def expected(schedule, steps, base=0.1):
    return pytest.approx([base * schedule(step) for step in range(steps)], rel=1e-12, abs=1e-15)


def fit(path, callback, *, batches=10, module=None, ckpt_path=None, callbacks=(), stream=False, **options):
    module = module or make_module()
    trainer = make_trainer(path, callbacks=[callback, *callbacks], **options)
    trainer.fit(module, loader(batches, stream=stream), ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize(
    ("accumulate", "steps"),
    [
        (1, 20),  # 2 epochs of 10 batches
        (3, 8),  # windows of 3, 3, 3 and 1 batches in each of 2 epochs
    ],
)
def test_every_step_uses_its_own_rate(tmp_path, namespace, accumulate, steps):
    module = make_module(namespace)
    callback = LearningRateScheduler(WarmupCosine(warmup=2, hold=1))
    trainer = make_trainer(tmp_path, namespace, callbacks=[callback], max_epochs=2, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(10))
    assert trainer.global_step == steps
    assert rates(module) == expected(WarmupCosine(2, 1, total=steps), steps)


def test_the_first_step_uses_the_first_rate_and_the_last_is_reached(tmp_path):
    module, _ = fit(tmp_path, LearningRateScheduler(Linear(None, 1, 0)))
    assert rates(module)[0] == 0.1
    assert rates(module)[-1] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 7, "max_epochs": -1}, 7),
        ({"max_steps": 7, "max_epochs": 3}, 7),
        ({"max_steps": 700, "max_epochs": 2}, 20),
        ({"max_epochs": 2, "limit_train_batches": 4}, 8),
        ({"max_epochs": 2, "limit_train_batches": 0.5, "accumulate_grad_batches": 2}, 6),
        ({"max_epochs": 2, "overfit_batches": 3}, 6),
    ],
)
def test_finds_the_length_of_the_run(tmp_path, options, steps):
    module, trainer = fit(tmp_path, LearningRateScheduler(Linear(None, 1, 0)), **options)
    assert trainer.global_step == steps
    assert rates(module) == expected(Linear(steps, 1, 0), steps)


@pytest.mark.parametrize("ours_first", [True, False])
def test_accumulation_by_lightnings_scheduler_is_foreseen_in_any_order(tmp_path, namespace, ours_first):
    # epoch 0: 10 steps; epoch 1: 5 windows of 2; epoch 2: windows of 4, 4 and 2
    changes = namespace.callbacks.GradientAccumulationScheduler({1: 2, 2: 4})
    callbacks = [LearningRateScheduler(WarmupLinear("50%")), changes]
    module = make_module(namespace)
    trainer = make_trainer(tmp_path, namespace, callbacks=callbacks if ours_first else callbacks[::-1], max_epochs=3)
    trainer.fit(module, loader(10))
    assert trainer.global_step == 18
    assert rates(module) == expected(WarmupLinear(9, total=18), 18)


@pytest.mark.parametrize("ours_first", [True, False])
def test_an_unannounced_change_of_accumulation_spreads_what_is_left_over_the_steps_that_are_left(tmp_path, ours_first):
    class Foreign(unified.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.accumulate_grad_batches = 5 if trainer.current_epoch == 1 else 1

    ours = LearningRateScheduler(Linear(None, 1, 0))
    module = make_module()
    trainer = make_trainer(tmp_path, callbacks=[ours, Foreign()] if ours_first else [Foreign(), ours], max_epochs=3)
    trainer.fit(module, loader(10))
    # Epoch 0 was planned as one of three with 10 steps each. Epoch 1 has 2 steps, and looks as if epoch 2 would have
    # 2 as well: 14 in all. Epoch 2 has 10: 22.
    assert trainer.global_step == 22
    used = rates(module)
    assert used[:10] == expected(Linear(30, 1, 0), 10)
    # 2/3 are left at step 10, for 4 steps; after 2 of them 1/3 is left, for 10
    assert used[10:12] == pytest.approx([0.1 * 2 / 3 * (1 - step / 4) for step in range(2)])
    assert used[12:] == pytest.approx([0.1 * 1 / 3 * (1 - step / 10) for step in range(10)])


def test_a_share_of_an_unknown_run_is_a_readable_error(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"`warmup` is '5%' of the run.*training data is unknown"):
        fit(tmp_path, LearningRateScheduler(WarmupCosine("5%")), stream=True)
    with pytest.raises(MisconfigurationException, match=r"`total` is the rest of the run.*max_epochs=-1.*`max_steps`"):
        fit(tmp_path, LearningRateScheduler(WarmupCosine(5)), max_epochs=-1)


def test_an_unknown_run_needs_no_length_when_the_schedule_has_its_own(tmp_path):
    schedule = WarmupCosine(2, total=8)
    module, _ = fit(tmp_path, LearningRateScheduler(schedule), stream=True)
    assert rates(module) == expected(schedule, 10)
    module, _ = fit(tmp_path, LearningRateScheduler(WarmupLinear("50%")), stream=True, max_steps=6)
    assert rates(module) == expected(WarmupLinear(3, total=6), 6)


def test_logs_the_length_and_where_it_comes_from(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fit(tmp_path, LearningRateScheduler(WarmupCosine("20%")), accumulate_grad_batches=3)
    lines = [line for line in caplog.messages if "Learning-rate schedule" in line]
    assert len(lines) == 1
    assert "warmup=1, hold=0, total=4" in lines[0]
    assert "Steps of the run: 4 (max_epochs=1 of 10 batches, 3 a step)" in lines[0]


@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_says_that_an_unset_max_epochs_means_1000(tmp_path, caplog):
    class Stop(unified.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    with caplog.at_level(logging.INFO):
        fit(tmp_path, LearningRateScheduler(Linear(None, 1, 0)), max_epochs=None, callbacks=[Stop()])
    assert "10000 (max_epochs=1000 (what an unset max_epochs means) of 10 batches" in caplog.text


def test_warns_when_the_run_ends_inside_the_schedule(tmp_path):
    with pytest.warns(LightningPluginsWarning, match="run of 1 steps.*ends inside the learning-rate schedule"):
        module, _ = fit(tmp_path, LearningRateScheduler(WarmupCosine(4, start=0.5)), fast_dev_run=True)
    assert rates(module) == [0.05]
    with pytest.warns(LightningPluginsWarning, match="at least 4000"):
        module, _ = fit(tmp_path, LearningRateScheduler(Noam(4, 4000)))
    assert rates(module) == expected(Noam(4, 4000), 10)


def test_every_group_keeps_its_own_base_rate(tmp_path):
    def two_groups(self):
        groups = [{"params": [self.layer.weight], "lr": 0.1}, {"params": [self.layer.bias], "lr": 0.02}]
        self.optimizer = type(module.optimizer)(groups, lr=1.0)
        return self.optimizer

    module = make_module()
    module.configure_optimizers()
    module.configure_optimizers = two_groups.__get__(module)
    callback = LearningRateScheduler(WarmupLinear(2), record=True)
    fit(tmp_path, callback, module=module)
    schedule = WarmupLinear(2, total=10)
    assert rates(module, 0) == expected(schedule, 10, 0.1)
    assert rates(module, 1) == expected(schedule, 10, 0.02)
    assert callback.lrs == [tuple(used) for used in module.optimizer.used]
    for base_lr in ([0.1], [0.1, 0.2, 0.3]):
        with pytest.raises(ValueError, match="`base_lr` must have one rate for each of the 2 groups"):
            fit(tmp_path, LearningRateScheduler(WarmupLinear(2), base_lr=base_lr), module=module)


def test_base_rates_and_minimum_are_absolute(tmp_path):
    module, _ = fit(tmp_path, LearningRateScheduler(Linear(None, 1, 0), base_lr=2.0, min_lr=0.5))
    assert rates(module) == [max(2 * (1 - step / 10), 0.5) for step in range(10)]


def test_records_the_rates_that_were_used(tmp_path):
    callback = LearningRateScheduler(WarmupLinear(3), record=True)
    module, _ = fit(tmp_path, callback, accumulate_grad_batches=2)
    assert callback.lrs == rates(module)
    fit(tmp_path, callback, module=make_module())
    assert len(callback.lrs) == 10  # a new run, not 5 + 10


def test_learning_rate_monitor_sees_it(tmp_path):
    logger = unified.loggers.CSVLogger(tmp_path)
    monitor = unified.callbacks.LearningRateMonitor()
    module, _ = fit(
        tmp_path, LearningRateScheduler(WarmupLinear(3)), callbacks=[monitor], logger=logger, log_every_n_steps=1
    )
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        logged = [float(row["lr-RecordingSGD"]) for row in csv.DictReader(file)]
    assert logged == pytest.approx(rates(module))


# -- what the module brings itself


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def test_an_optimizer_that_is_already_scheduled_is_refused_with_both_ways_out(tmp_path):
    with pytest.raises(
        MisconfigurationException, match=r"already scheduled, by a StepLR.*without a scheduler.*existing='replace'"
    ):
        fit(tmp_path, LearningRateScheduler(WarmupLinear(2)), module=make_module(scheduler=halving))


def test_two_callbacks_on_one_optimizer_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="already scheduled"):
        fit(
            tmp_path,
            LearningRateScheduler(WarmupLinear(2)),
            callbacks=[LearningRateScheduler(WarmupLinear(2), optimizer=0)],
        )


def test_replaces_the_modules_scheduler(tmp_path, caplog):
    def warmup_from_nothing(optimizer):
        return {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 5), "interval": "step"}

    module = make_module(scheduler=warmup_from_nothing)
    with caplog.at_level(logging.INFO):
        _, trainer = fit(tmp_path, LearningRateScheduler(Linear(None, 1, 0), existing="replace"), module=module)
    assert rates(module) == expected(Linear(10, 1, 0), 10)  # the base is 0.1, not the 0 that LambdaLR began with
    assert "replaces the module's LambdaLR" in caplog.text
    assert isinstance(module.lr_schedulers(), ScheduleLR)
    assert len(trainer.lr_scheduler_configs) == 1


def test_replacing_a_scheduler_that_rewrote_the_base_rates_needs_them(tmp_path):
    def one_cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)

    with pytest.raises(MisconfigurationException, match="`base_lr` must be given to replace a OneCycleLR"):
        fit(
            tmp_path,
            LearningRateScheduler(WarmupLinear(2), existing="replace"),
            module=make_module(scheduler=one_cycle),
        )
    module = make_module(scheduler=one_cycle)
    with pytest.warns(LightningPluginsWarning, match="momentum, which stays at 0.95. Pass it cycle_momentum=False"):
        fit(tmp_path, LearningRateScheduler(WarmupLinear(2), existing="replace", base_lr=0.3), module=module)
    assert rates(module) == expected(WarmupLinear(2, total=10), 10, 0.3)


def test_a_scheduler_of_another_parameter_is_no_conflict(tmp_path):
    def decay(optimizer):
        schedule = Linear(10, 1, 0)
        optimizer.param_groups[0]["weight_decay"] = 0.5
        return {"scheduler": ScheduleLR(optimizer, schedule, parameter="weight_decay"), "interval": "step"}

    module = make_module(scheduler=decay)
    fit(tmp_path, LearningRateScheduler(WarmupLinear(2)), module=module)
    assert rates(module) == expected(WarmupLinear(2, total=10), 10)
    assert module.optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.0)


def test_an_lr_scheduler_step_of_the_modules_own_that_passes_an_epoch_is_harmless(tmp_path):
    module = make_module()
    module.lr_scheduler_step = lambda scheduler, metric: scheduler.step(epoch=module.current_epoch)
    fit(tmp_path, LearningRateScheduler(WarmupLinear(3)), module=module, max_epochs=2)
    assert rates(module) == expected(WarmupLinear(3, total=20), 20)


@pytest.mark.filterwarnings("ignore:Swapping scheduler", "ignore:SWA is currently only supported every epoch")
def test_leaves_the_rates_to_lightnings_swa_when_that_takes_over(tmp_path):
    swa = unified.callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2, annealing_epochs=1)
    for callbacks in ([swa], []):
        module, _ = fit(tmp_path, LearningRateScheduler(Linear(None, 1, 0)), callbacks=callbacks, max_epochs=4)
        assert rates(module)[:10] == expected(Linear(40, 1, 0), 10)
        assert (rates(module)[20:40] == pytest.approx([0.02] * 20)) == bool(callbacks)  # annealed over one epoch


# -- a life beyond one fit


def test_a_second_fit_of_the_same_trainer_goes_on(tmp_path):
    module, trainer = fit(tmp_path, LearningRateScheduler(Linear(None, 1, 0)))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(10))
    assert rates(module) == pytest.approx([0.1 * Linear(20, 1, 0)(step) for step in range(10, 20)])


def test_a_fit_in_another_trainer_starts_anew(tmp_path):
    callback = LearningRateScheduler(Linear(None, 1, 0))
    fit(tmp_path, callback)
    module, _ = fit(tmp_path, callback, max_epochs=2)
    assert rates(module) == expected(Linear(20, 1, 0), 20)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, None])
def test_nothing_stays_on_the_optimizer(tmp_path, failure):
    class Fail(CallbackOfBoth):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if failure is not None and batch_idx == 3:
                raise failure

    module = make_module()
    callback = LearningRateScheduler(WarmupLinear(2))
    with nullcontext() if failure is None else pytest.raises((failure, SystemExit)):
        fit(tmp_path, callback, module=module, callbacks=[Fail()])
    assert not module.optimizer._optimizer_step_pre_hooks
    assert not module.optimizer._optimizer_step_post_hooks


def test_is_picklable_and_has_a_key_of_its_own():
    callbacks = [LearningRateScheduler(WarmupCosine("5%"), optimizer=index) for index in (None, 0, 1)]
    assert len({callback.state_key for callback in callbacks}) == 3
    copy = pickle.loads(pickle.dumps(callbacks[1]))
    assert (copy.schedule, copy.optimizer) == (callbacks[1].schedule, 0)
