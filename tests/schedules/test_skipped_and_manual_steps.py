"""Steps that change nothing, steps that a gradient scaler skips, and steps that the module takes by hand."""

import lightning.pytorch as unified
import pytest
import torch

from lightning_plugins import Constant, LearningRateScheduler, Linear, WarmupLinear
from lightning_plugins.core.lightning import MisconfigurationException
from tests.schedules.test_callback import expected, fit
from tests.support.training import RecordingSGD, loader, make_module, make_trainer, rates
from tests.support.zero_stand_ins import OneRank

# -- steps that change nothing


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_gradients_is_an_attempt_but_is_not_applied(tmp_path):
    schedule = WarmupLinear(4, total=10)
    attempted, _ = fit(tmp_path, LearningRateScheduler(schedule), module=make_module(skip_batches=(1, 2)))
    assert rates(attempted) == expected(schedule, 10)
    applied, _ = fit(
        tmp_path, LearningRateScheduler(schedule, clock="applied"), module=make_module(skip_batches=(1, 2))
    )
    positions = [0, 1, 1, 1, 2, 3, 4, 5, 6, 7]  # steps 1 and 2 changed nothing
    assert rates(applied) == pytest.approx([0.1 * schedule(position) for position in positions])


class _Overflowing(torch.autograd.Function):
    """Identity whose gradient is infinite when told so: what makes a gradient scaler skip."""

    @staticmethod
    def forward(ctx, x, overflow):
        ctx.overflow = overflow
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (float("inf") if ctx.overflow else 1.0), None


def overflowing_module(batches):
    module = make_module()

    def training_step(batch, batch_idx):
        return _Overflowing.apply(module.layer(batch).float().pow(2).mean(), batch_idx in batches)

    module.training_step = training_step
    return module


def scaled_trainer(path, callback):
    """A Trainer with a real GradScaler on the CPU, where Lightning offers none for the asking."""
    precision = unified.plugins.MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    return make_trainer(path, callbacks=[callback], plugins=[precision])


@pytest.mark.parametrize("clock", ["attempted", "applied"])
def test_steps_that_the_gradient_scaler_skips(tmp_path, clock):
    schedule = Linear(8, 1, 0)
    module = overflowing_module({2, 3})
    callback = LearningRateScheduler(schedule, clock=clock, record=True)
    trainer = scaled_trainer(tmp_path, callback)
    trainer.fit(module, loader(8))
    assert trainer.global_step == 8
    assert len(module.optimizer.used) == 6  # the scaler did not call the optimizer for two of them
    positions = {"attempted": [0, 1, 4, 5, 6, 7], "applied": [0, 1, 2, 3, 4, 5]}[clock]
    assert rates(module) == pytest.approx([0.1 * schedule(position) for position in positions])
    # a skipped step is one of those that count attempts
    positions = {"attempted": range(8), "applied": range(6)}[clock]
    assert callback.lrs == pytest.approx([0.1 * schedule(position) for position in positions])


# -- manual optimization


def gan(critic_steps=3, scheduler_step=False):
    """Two optimizers in manual optimization; the second steps ``critic_steps`` times per batch."""
    module = make_module()
    module.automatic_optimization = False
    module.other = torch.nn.Linear(4, 2)

    def training_step(batch, batch_idx):
        first, second = module.optimizers()
        for optimizer, layer, times in ((first, module.layer, 1), (second, module.other, critic_steps)):
            for _ in range(times):
                optimizer.zero_grad()
                module.manual_backward(layer(batch).pow(2).mean())
                optimizer.step()
        if scheduler_step:
            for scheduler in module.lr_schedulers():
                scheduler.step()

    def configure_optimizers():
        module.first, module.second = (
            RecordingSGD(layer.parameters(), lr=0.1) for layer in (module.layer, module.other)
        )
        return module.first, module.second

    module.training_step = training_step
    module.configure_optimizers = configure_optimizers
    return module


@pytest.mark.parametrize("scheduler_step", [False, True])
def test_several_optimizers_follow_their_own_steps(tmp_path, scheduler_step):
    module, schedule = gan(scheduler_step=scheduler_step), WarmupLinear(4, total=20)
    fit(tmp_path, LearningRateScheduler(schedule), module=module, batches=5)
    assert [used[0] for used in module.first.used] == expected(schedule, 5)
    assert [used[0] for used in module.second.used] == expected(schedule, 15)


def test_one_of_several_optimizers(tmp_path):
    module, schedule = gan(), WarmupLinear(4, total=20)
    fit(tmp_path, LearningRateScheduler(schedule, optimizer=1), module=module, batches=5)
    assert [used[0] for used in module.first.used] == [0.1] * 5
    assert [used[0] for used in module.second.used] == expected(schedule, 15)
    with pytest.raises(MisconfigurationException, match="`optimizer` must be the index of one of the module's 2"):
        fit(tmp_path, LearningRateScheduler(schedule, optimizer=2), module=gan())


def test_each_optimizer_its_own_callback(tmp_path):
    module, one, two = gan(), WarmupLinear(4, total=20), Linear(20, 1, 0)
    fit(
        tmp_path,
        LearningRateScheduler(one, optimizer=0),
        callbacks=[LearningRateScheduler(two, optimizer=1)],
        module=module,
        batches=5,
    )
    assert [used[0] for used in module.first.used] == expected(one, 5)
    assert [used[0] for used in module.second.used] == expected(two, 15)


def test_manual_optimization_needs_lengths_in_steps(tmp_path):
    with pytest.raises(MisconfigurationException, match="manual optimization: only the module knows its steps"):
        fit(tmp_path, LearningRateScheduler(WarmupLinear(4)), module=gan())


def test_manual_steps_that_the_scaler_skips_are_attempts(tmp_path):
    module = make_module()
    module.automatic_optimization = False

    def training_step(batch, batch_idx):
        optimizer = module.optimizers()
        optimizer.zero_grad()
        module.manual_backward(_Overflowing.apply(module.layer(batch).float().pow(2).mean(), batch_idx in (2, 3)))
        optimizer.step()

    module.training_step = training_step
    schedule = Linear(8, 1, 0)
    callback = LearningRateScheduler(schedule, record=True)
    trainer = scaled_trainer(tmp_path, callback)
    trainer.fit(module, loader(8))
    assert rates(module) == pytest.approx([0.1 * schedule(position) for position in (0, 1, 4, 5, 6, 7)])
    assert callback.lrs == pytest.approx([0.1 * schedule(position) for position in range(8)])


def test_a_manual_step_that_runs_its_closure_several_times_is_one(tmp_path):
    class Searching(torch.optim.LBFGS):
        def step(self, closure):
            used.append(self.param_groups[0]["lr"])
            return super().step(closure)

    used, module = [], make_module()
    module.automatic_optimization = False

    def training_step(batch, batch_idx):
        optimizer = module.optimizers()

        def closure():
            calls.append(batch_idx)
            optimizer.zero_grad()
            loss = module.layer(batch).pow(2).mean()
            module.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)

    calls, module.training_step = [], training_step
    module.configure_optimizers = lambda: Searching(module.layer.parameters(), lr=0.1, max_iter=3)
    schedule = Linear(8, 1, 0)
    callback = LearningRateScheduler(schedule, record=True)
    fit(tmp_path, callback, module=module, batches=4)
    assert len(calls) > 4
    assert used == callback.lrs == expected(schedule, 4)


class NoInit(torch.optim.Optimizer):
    """A wrapper without ``Optimizer.__init__``, as timm's Lookahead is: torch fires no hooks of it."""

    def __init__(self, base):
        self.base, self.param_groups, self.defaults, self.state = base, base.param_groups, base.defaults, base.state

    def step(self, closure=None):
        return self.base.step(closure)

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)


@pytest.mark.parametrize("clock", ["attempted", "applied"])
@pytest.mark.parametrize("automatic", [True, False])
def test_the_steps_of_an_optimizer_that_fires_no_hooks_are_followed(tmp_path, automatic, clock):
    module = make_module()
    module.automatic_optimization = automatic

    def step_by_hand(batch, batch_idx):
        optimizer = module.optimizers()
        optimizer.zero_grad()
        module.manual_backward(module.layer(batch).pow(2).mean())
        optimizer.step()

    def configure_optimizers():
        module.optimizer = RecordingSGD(module.layer.parameters(), lr=0.1)
        return NoInit(module.optimizer)

    module.configure_optimizers = configure_optimizers
    if not automatic:
        module.training_step = step_by_hand
    beside = LearningRateScheduler(Linear(8, 1, 0), parameter="momentum")
    fit(tmp_path, LearningRateScheduler(Linear(8, 1, 0), clock=clock), callbacks=[beside], module=module, batches=8)
    assert rates(module) == expected(Linear(8, 1, 0), 8)


def test_under_deepspeed_positions_are_the_attempted_steps_of_automatic_optimization(tmp_path):
    """Of DeepSpeed's optimizer, whose own steps are none of the run's, its stand-in on one process."""

    def run(clock, **options):
        callback = LearningRateScheduler(Linear(4, 1, 0), clock=clock, record=True)
        trainer = make_trainer(tmp_path, callbacks=[callback], strategy=OneRank())
        trainer.fit(make_module(**options), loader(4))
        return callback.lrs

    assert run("attempted") == pytest.approx([0.1, 0.075, 0.05, 0.025])
    for options in ({"clock": "applied"}, {"clock": "attempted", "automatic_optimization": False}):
        with pytest.raises(
            MisconfigurationException, match="`clock` must be 'attempted' under DeepSpeed, in automatic"
        ):
            run(**options)
    # what only evaluates takes no steps
    module = make_module()
    module.validation_step = lambda batch, batch_idx: None
    evaluated = make_trainer(
        tmp_path, callbacks=[LearningRateScheduler(Constant(), clock="applied")], strategy=OneRank()
    )
    evaluated.validate(module, loader(1), verbose=False)


# -- steps that a module takes in a way of its own


def step_of_torch(optimizer, closure):
    optimizer.optimizer.step(closure)


def two_steps(optimizer, closure):
    optimizer.step(closure)
    optimizer.step()


def two_of_torch(optimizer, closure):
    optimizer.optimizer.step(closure)
    optimizer.optimizer.step()


def toggled(optimizer, closure):
    with optimizer.toggle_model():
        optimizer.step(closure)


@pytest.mark.parametrize("clock", ["attempted", "applied"])
@pytest.mark.parametrize("step", [step_of_torch, two_steps, two_of_torch, toggled])
def test_ways_of_stepping_see_the_rates_of_a_loop_in_plain_torch(tmp_path, step, clock):
    """``scheduler.step()`` of torch after each batch, as Lightning does it, or after each step of the optimizer."""
    module, schedule = make_module(), Linear(10, 1, 0.1)
    module.optimizer_step = lambda epoch, batch_idx, optimizer, closure: step(optimizer, closure)
    callback = LearningRateScheduler(schedule, clock=clock, record=True)
    fit(tmp_path, callback, module=module)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    truth = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, total_iters=10)
    used = []
    for _ in range(10):
        for _ in range(2 if "two" in step.__name__ else 1):
            used.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if clock == "applied":
                truth.step()
        if clock == "attempted":
            truth.step()
    assert rates(module) == pytest.approx(used)
    # a second step that torch's optimizer takes by itself is none that the Trainer knows of
    assert callback.lrs == pytest.approx(used[::2] if (step, clock) == (two_of_torch, "attempted") else used)
