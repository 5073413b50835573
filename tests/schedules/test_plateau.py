"""The plateau beside torch's own, and in a Trainer."""

import math
import random

import pytest
import torch

from lightning_plugins import LearningRateScheduler, Linear, Plateau
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.schedules.plateau import PlateauState
from tests.support.training import loader, make_module, make_trainer, rates


@pytest.mark.parametrize("seed", range(20))
def test_factors_are_those_of_torch(seed):
    chance = random.Random(seed)
    options = {
        "mode": chance.choice(["min", "max"]),
        "factor": chance.choice([0.1, 0.5]),
        "patience": chance.randrange(4),
        "threshold": chance.choice([0.0, 1e-4, 0.1]),
        "cooldown": chance.randrange(3),
    }
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options, min_lr=1e-3, eps=0)
    plateau, state = Plateau("loss", min_factor=1e-3, **options), PlateauState()
    for _ in range(60):
        metric = chance.choice([chance.random(), math.nan]) if chance.random() < 0.2 else chance.random()
        theirs.step(metric)
        state = plateau.update(state, metric)
        assert state.factor == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
    assert state.factor < 1  # something happened


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"monitor": ""}, TypeError, "`monitor` must be the name of a metric, got ''"),
        ({"mode": "up"}, ValueError, "`mode` must be one of 'min', 'max', got 'up'"),
        ({"factor": 1.0}, ValueError, "`factor` must be above 0 and below 1, got 1.0"),
        ({"patience": -1}, ValueError, "`patience` must be at least 0 checks, got -1"),
        ({"patience": 1.5}, TypeError, "`patience` must be a whole number of checks, got 1.5"),
        ({"threshold": -0.1}, ValueError, "`threshold` must be at least 0, got -0.1"),
        ({"cooldown": -1}, ValueError, "`cooldown` must be at least 0 checks, got -1"),
        ({"min_factor": 2}, ValueError, "`min_factor` must be at least 0 and at most 1, got 2"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Plateau(**{"monitor": "loss", **arguments})


class Logged:
    """A module that logs prepared values, in validation or in training; ``None`` logs nothing."""

    def __init__(self, values, where="validation"):
        module = self.module = make_module()
        step = module.training_step

        def log(name, index):
            if values[index] is not None:
                module.log(name, torch.tensor(values[index]), on_step=False, on_epoch=True)

        def training_step(batch, batch_idx):
            if where == "training":
                log("metric", module.current_epoch)
            return step(batch, batch_idx)

        module.training_step = training_step
        self.validations = 0

        def on_validation_epoch_end():
            if where == "validation" and not module.trainer.sanity_checking:
                log("metric", self.validations)
                self.validations += 1

        module.validation_step = lambda batch, batch_idx: None
        module.on_validation_epoch_end = on_validation_epoch_end


def plateau_rates(path, values, where="validation", ckpt_path=None, epochs=6, **options):
    """Return the rate of each epoch's steps, of two batches each."""
    logged = Logged(values, where)
    callback = LearningRateScheduler(Linear(2, 0.5, 1), plateau=Plateau("metric", factor=0.5, patience=0))
    trainer = make_trainer(path, callbacks=[callback], max_epochs=epochs, **options)
    trainer.fit(logged.module, loader(2), loader(2), ckpt_path=ckpt_path)
    return rates(logged.module), trainer


@pytest.mark.parametrize("where", ["validation", "training"])
def test_scales_a_schedule_when_the_metric_stalls(tmp_path, where):
    used, _ = plateau_rates(tmp_path, [3.0, 2.0, 2.0, 1.0, 1.0, 1.0], where)
    assert used == pytest.approx([0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.025, 0.025])


def test_a_metric_that_was_not_logged_this_time_holds(tmp_path):
    # Validation happens in epochs 1, 3 and 5; a stale value must not count as a stall in between.
    used, _ = plateau_rates(tmp_path, [3.0, 2.0, 2.0], check_val_every_n_epoch=2)
    assert used[2:] == pytest.approx([0.1] * 10)
    used, _ = plateau_rates(tmp_path, [3.0, None, 2.0, 2.0, None, None])
    assert used[-4:] == pytest.approx([0.05] * 4)


def test_counts_every_validation_of_an_epoch(tmp_path):
    used, _ = plateau_rates(tmp_path, [3.0, 3.0, 3.0, 3.0], epochs=2, val_check_interval=1)
    assert used == pytest.approx([0.05, 0.075, 0.05, 0.025])


@pytest.mark.parametrize("epochs", [1, 6])
def test_a_metric_that_never_comes_is_an_error_after_the_first_validation(tmp_path, epochs):
    logged = Logged([None] * 6)
    logged.module.validation_step = lambda batch, batch_idx: logged.module.log("val_loss", 1.0)
    callback = LearningRateScheduler(Linear(2, 0.5, 1), plateau=Plateau("val_los", patience=0))
    trainer = make_trainer(tmp_path, callbacks=[callback], max_epochs=epochs)
    with pytest.raises(MisconfigurationException, match=r"got 'val_los', which did not come.*There are: val_loss"):
        trainer.fit(logged.module, loader(2), loader(2))
    assert logged.validations == 1


def test_a_metric_that_never_comes_is_noticed_where_only_some_epochs_validate_or_none(tmp_path):
    with pytest.raises(MisconfigurationException, match="There are: none"):
        plateau_rates(tmp_path, [None] * 6, check_val_every_n_epoch=3)
    with pytest.raises(MisconfigurationException, match="got 'metric'"):
        plateau_rates(tmp_path, [None] * 6, limit_val_batches=0)


def test_a_metric_that_came_before_a_resume_may_be_missing_after_it(tmp_path):
    _, trainer = plateau_rates(tmp_path, [3.0, 3.0, 2.0], epochs=3)
    trainer.save_checkpoint(tmp_path / "third.ckpt")
    used, _ = plateau_rates(tmp_path, [None, None, None], ckpt_path=tmp_path / "third.ckpt")
    assert used == pytest.approx([0.05] * 6)


class LogsLast(Logged):
    """Logs in the module's own ``on_train_epoch_end``, after every callback's."""

    def __init__(self):
        super().__init__([None] * 4)
        module = self.module
        module.on_train_epoch_end = lambda: module.log("metric", float(module.current_epoch))


def test_a_metric_that_the_module_logs_at_the_very_end_of_an_epoch_is_no_error(tmp_path):
    logged = LogsLast()
    callback = LearningRateScheduler(Linear(2, 0.5, 1), plateau=Plateau("metric", factor=0.5, patience=0))
    make_trainer(tmp_path, callbacks=[callback], max_epochs=4).fit(logged.module, loader(2), loader(2))
    assert rates(logged.module)[2:] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ([1.0, None, 0], ValueError, "`plateau` must have 4 values, got"),
        ([2.0, None, 0, 0], ValueError, "`factor` must be at least 0 and at most 1, got 2.0"),
        ([0.5, "low", 0, 0], TypeError, "`best` must be a number, got 'low'"),
        ([0.5, math.nan, 0, 0], ValueError, "`best` must be finite, got nan"),
        ([0.5, 1.0, -1, 0], ValueError, "`bad` must be at least 0 checks, got -1"),
        ([0.5, 1.0, 0, 0.5], TypeError, "`cooldown` must be a whole number of checks, got 0.5"),
        (7, TypeError, "`plateau` must be a list, got 7"),
    ],
)
def test_a_state_is_checked_like_arguments(state, error, message):
    with pytest.raises(error, match=message):
        PlateauState.from_state(state)
    assert PlateauState.from_state([0.5, -math.inf, 2, 1]) == PlateauState(0.5, -math.inf, 2, 1)


def test_the_state_survives_a_resume(tmp_path):
    values = [3.0, 2.0, 2.0, 1.0, 1.0, 1.0]
    whole, _ = plateau_rates(tmp_path, values)
    _, trainer = plateau_rates(tmp_path, values, epochs=3)
    trainer.save_checkpoint(tmp_path / "third.ckpt")
    resumed, _ = plateau_rates(tmp_path, values[3:], ckpt_path=tmp_path / "third.ckpt")
    assert resumed == whole[6:]
    fresh, _ = plateau_rates(tmp_path, values[3:], epochs=3)
    assert fresh != whole[6:]


def test_a_fit_in_another_trainer_starts_without_the_last_ones_reductions(tmp_path):
    callback = LearningRateScheduler(Linear(2, 0.5, 1), plateau=Plateau("metric", factor=0.5, patience=0))
    for _ in range(2):
        logged = Logged([1.0, 1.0, 1.0])
        make_trainer(tmp_path, callbacks=[callback], max_epochs=3).fit(logged.module, loader(2), loader(2))
        assert rates(logged.module) == pytest.approx([0.05, 0.075, 0.1, 0.1, 0.05, 0.05])


def test_a_plateau_that_is_removed_no_longer_scales(tmp_path):
    _, trainer = plateau_rates(tmp_path, [1.0, 1.0, 1.0], epochs=3)
    trainer.save_checkpoint(tmp_path / "third.ckpt")
    module = make_module()
    trainer = make_trainer(tmp_path, callbacks=[LearningRateScheduler(Linear(2, 0.5, 1))], max_epochs=4)
    trainer.fit(module, loader(2), ckpt_path=tmp_path / "third.ckpt")
    assert rates(module) == pytest.approx([0.1, 0.1])
