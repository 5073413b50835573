"""The callback in a real Trainer: what is evaluated, what the module holds afterwards, what is refused."""

import copy
import pickle

import lightning.pytorch as unified
import pytest
import pytorch_lightning as classic
import torch

from lightning_plugins import EMA, DecayRule, HalfLife, WarmupDecay
from lightning_plugins.core.lightning import MisconfigurationException
from tests.support.ema_runs import (
    NAMESPACES,
    THETA,
    WARMUP,
    Net,
    Scripted,
    clone_state,
    follow,
    numbers,
    regression,
    same,
    trainer,
)

# -- what is evaluated, and what stays


@NAMESPACES
def test_validation_uses_the_average_and_training_does_not(trainer_class, module_class):
    module, ema = module_class(), EMA(0.9)
    fit = trainer(ema, trainer_class=trainer_class, max_epochs=2)
    fit.fit(module, numbers(5), numbers(1))
    assert module.seen == pytest.approx([WARMUP[4], WARMUP[9]], rel=1e-6)
    assert fit.callback_metrics["val"].item() == pytest.approx(WARMUP[9], rel=1e-6)
    assert ema.raw_state_dict()["weight"].item() == THETA[9]
    assert module.weight.item() == ema.average_state_dict()["weight"].item() == pytest.approx(WARMUP[9], rel=1e-6)


@NAMESPACES
def test_validate_test_and_predict_after_fit_use_the_average(trainer_class, module_class):
    for after_fit, held in (("average", WARMUP[4]), ("raw", THETA[4])):
        module, ema = module_class(), EMA(0.9, after_fit=after_fit)
        fit = trainer(ema, trainer_class=trainer_class)
        fit.fit(module, numbers(5))
        assert module.weight.item() == pytest.approx(held, rel=1e-6)
        fit.validate(module, numbers(1), verbose=False)
        fit.test(module, numbers(1), verbose=False)
        predicted = fit.predict(module, numbers(1))
        assert module.seen == pytest.approx([WARMUP[4]] * 3, rel=1e-6)
        assert predicted[0].item() == pytest.approx(WARMUP[4], rel=1e-6)
        assert module.weight.item() == pytest.approx(held, rel=1e-6)
        assert ema.raw_state_dict()["weight"].item() == THETA[4]


def test_evaluate_raw_is_openNMTs_way():
    module, ema = Scripted(), EMA(0.9, evaluate="raw")
    fit = trainer(ema)
    fit.fit(module, numbers(5), numbers(1))
    fit.test(module, numbers(1), verbose=False)  # the module holds the average by then
    assert module.seen == [THETA[4], THETA[4]]
    assert module.weight.item() == pytest.approx(WARMUP[4], rel=1e-6)


def test_the_modules_own_epoch_end_still_sees_the_average():
    """Lightning swaps back before the module's on_validation_epoch_end."""

    class Late(Scripted):
        def on_validation_epoch_end(self):
            self.seen.append(self.weight.item())

    module = Late()
    trainer(EMA(0.9)).fit(module, numbers(5), numbers(1))
    assert module.seen == pytest.approx([WARMUP[4]] * 2, rel=1e-6)


def test_the_modules_own_end_sees_what_was_there_before_an_evaluation():
    class Late(Scripted):
        def late(self):
            self.seen.append(self.weight.item())

        on_validation_end = on_test_end = on_predict_end = late

    module, ema = Late(), EMA(0.9, after_fit="raw")
    fit = trainer(ema)
    fit.fit(module, numbers(5))
    for evaluate in (fit.validate, fit.test, fit.predict):
        module.seen.clear()
        evaluate(module, numbers(1))
        assert module.seen == pytest.approx([WARMUP[4], THETA[4]], rel=1e-6)


def test_sanity_check_and_validation_before_the_first_update_are_raw():
    """Lightning would evaluate, and at the end restore, the untrained weights."""
    module, ema = Scripted(), EMA(0.9, start_step=8)
    fit = trainer(ema, num_sanity_val_steps=1, val_check_interval=1)
    fit.fit(module, numbers(5), numbers(1))
    assert module.seen == [0, *THETA[:5]]
    assert module.weight.item() == THETA[4]
    with pytest.raises(
        RuntimeError, match="EMA 'ema' has no weights to give: it begins with a fit, after `start_step`"
    ):
        ema.average_state_dict()


def test_start_step_begins_as_the_weights_after_it():
    module, ema = Scripted(), EMA(0.9, start_step=3)
    trainer(ema, val_check_interval=1).fit(module, numbers(8), numbers(1))
    expected = THETA[:3] + follow(THETA[3:8], [WarmupDecay(0.9)(n) for n in range(1, 6)], start=THETA[2])
    assert module.seen == pytest.approx(expected, rel=1e-6)


def test_another_module_is_never_touched():
    """Lightning evaluates the old average in the new module."""
    module, other, ema = Scripted(), Scripted(), EMA(0.9, after_fit="raw")
    fit = trainer(ema)
    fit.fit(module, numbers(5))
    other.weight.data.fill_(-1)
    fit.validate(other, numbers(1), verbose=False)
    assert other.seen == [-1]
    with pytest.raises(ValueError, match="`pl_module` must be the module that EMA 'ema' averaged"), ema.averaged(other):
        pass


@pytest.mark.parametrize("after_fit", ["average", "raw"])
def test_weights_that_were_loaded_after_fit_are_evaluated_as_they_are(after_fit):
    module, ema = Scripted(), EMA(0.9, after_fit=after_fit)
    fit = trainer(ema)
    fit.fit(module, numbers(5))
    module.load_state_dict({"weight": torch.tensor(-2.0)})
    for _ in range(2):
        fit.validate(module, numbers(1), verbose=False)
    assert module.seen == [-2, -2]
    assert module.weight.item() == -2
    assert ema.average_state_dict()["weight"].item() == pytest.approx(WARMUP[4], rel=1e-6)
    if after_fit == "average":
        assert ema.raw_state_dict()["weight"].item() == THETA[4]
    else:
        with pytest.raises(RuntimeError, match="something else was written into it"):
            ema.raw_state_dict()
    with ema.averaged(module):
        assert module.weight.item() == -2
    fit.fit_loop.max_epochs = 2
    fit.fit(module, numbers(5))  # such weights are trained on, with an average of their own
    assert ema.average_state_dict()["weight"].item() == pytest.approx(
        follow(THETA, [WarmupDecay(0.9)(n) for n in range(1, 6)], start=-2)[-1], rel=1e-6
    )


@pytest.mark.parametrize("after_fit", ["average", "raw"])
def test_second_fit_goes_on_from_the_raw_weights(after_fit):
    """Lightning's second fit averages nothing and trains on from the average."""

    def run(epochs):
        module, ema = Scripted(), EMA(0.9, after_fit=after_fit)
        module.values = THETA
        for n in epochs:
            trainer(ema, max_epochs=n).fit(module, numbers(5))
            module.values = THETA[5:]
        return ema

    two, one = run([1, 1]), run([2])
    assert two.average_state_dict()["weight"].item() == one.average_state_dict()["weight"].item()
    assert two.raw_state_dict()["weight"].item() == one.raw_state_dict()["weight"].item() == THETA[9]


def test_fit_of_another_module_starts_anew():
    ema = EMA(0.9)
    trainer(ema).fit(Scripted(), numbers(5))
    module = Scripted()
    trainer(ema).fit(module, numbers(3))
    assert ema.state_dict() == {"version": 1, "applied_steps": 3, "origin": 0, "last_update": 3}
    assert module.weight.item() == pytest.approx(WARMUP[2], rel=1e-6)


def test_a_new_ema_trains_on_what_an_old_one_left():
    module, old, new = Scripted(), EMA(0.9), EMA(0.9)
    trainer(old).fit(module, numbers(5))
    held = module.weight.item()
    trainer(new).fit(module, numbers(2), numbers(1))
    expected = follow(THETA, [WarmupDecay(0.9)(n) for n in (1, 2)], start=held)[-1]
    assert module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert new.raw_state_dict()["weight"].item() == THETA[1]


# -- exits


class Stop(unified.Callback):
    """Raises in one hook."""

    def __init__(self, hook, error=RuntimeError):
        self.hook, self.error = hook, error

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "__dict__").get("hook"):
            return self._raise
        return object.__getattribute__(self, name)

    def _raise(self, *args, **kwargs):
        raise self.error("stop")


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("hook", "raw"),
    [
        ("on_validation_start", 3),
        ("on_validation_batch_start", 3),
        ("on_validation_epoch_end", 3),
        ("on_validation_end", 3),
        ("on_train_batch_end", 1),
        ("on_train_epoch_end", 3),
        ("on_train_end", 3),
    ],
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_raw_weights_are_back_after_an_exception_anywhere(hook, raw, error, first):
    """Lightning leaves the average in the module."""
    module, ema = Scripted(), EMA(0.9)
    callbacks = [Stop(hook, error), ema] if first else [ema, Stop(hook, error)]
    fit = trainer(*callbacks)
    with pytest.raises((RuntimeError, SystemExit)):
        fit.fit(module, numbers(3), numbers(1))
    assert module.weight.item() == THETA[raw - 1]
    assert not {"save_checkpoint", "lightning_module_state_dict", "teardown"} & vars(fit.strategy).keys()
    assert not fit.optimizers[0]._optimizer_step_post_hooks


def test_an_evaluation_that_stops_without_an_end_is_undone_by_the_next_batch():
    """StopIteration leaves Lightning's loop quietly, without on_validation_end."""
    module, ema = Scripted(), EMA(0.9)
    stop = Stop("on_validation_epoch_end", StopIteration)
    trainer(ema, stop, val_check_interval=2, max_epochs=3).fit(module, numbers(6), numbers(1))  # 2 batches an epoch
    assert ema.raw_state_dict()["weight"].item() == THETA[5]
    assert ema.average_state_dict()["weight"].item() == pytest.approx(WARMUP[5], rel=1e-6)


def test_nothing_stays_on_strategy_or_optimizer():
    module, fit = Scripted(), trainer(EMA(0.9))
    before = set(vars(fit.strategy))
    fit.fit(module, numbers(3), numbers(1))
    assert not {"save_checkpoint", "lightning_module_state_dict", "teardown"} & (set(vars(fit.strategy)) - before)
    assert not fit.strategy.optimizers or not fit.optimizers[0]._optimizer_step_post_hooks
    assert not module._forward_hooks


def test_averaged_blocks_nest_and_survive_exceptions():
    module, ema = Scripted(), EMA(0.9, after_fit="raw")
    with ema.averaged(module):  # nothing to show yet
        assert module.weight.item() == 0
    trainer(ema).fit(module, numbers(5))
    with ema.averaged(module) as same_module:
        assert same_module is module
        with ema.averaged(module):
            assert module.weight.item() == pytest.approx(WARMUP[4], rel=1e-6)
        assert module.weight.item() == pytest.approx(WARMUP[4], rel=1e-6)
    assert module.weight.item() == THETA[4]
    with pytest.raises(KeyError), ema.averaged(module):
        raise KeyError
    assert module.weight.item() == THETA[4]


def test_averaged_inside_a_run_shows_the_latest_average():
    seen = []

    class Look(unified.Callback):
        def __init__(self, ema):
            self.ema = ema

        def on_train_batch_end(self, trainer, pl_module, *args):
            with self.ema.averaged(pl_module):
                seen.append(pl_module.weight.item())
            assert pl_module.weight.item() == THETA[len(seen) - 1]

    ema = EMA(0.9)
    trainer(Look(ema), ema).fit(Scripted(), numbers(6))
    assert seen == pytest.approx(WARMUP[:6], rel=1e-6)


# -- construction


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"decay": 1.01}, ValueError, "`decay` must be at least 0 and at most 1, got 1.01"),
        ({"decay": None}, TypeError, "`decay` must be a number or a decay rule"),
        ({"update_every_n_steps": 0}, ValueError, "`update_every_n_steps` must be at least 1 step, got 0"),
        (
            {"update_every_n_steps": 1.5},
            ValueError,
            "`update_every_n_steps` as a float is a share .* got 1.5",
        ),
        ({"start_step": -1}, ValueError, "`start_step` must be at least 0 steps, got -1"),
        ({"buffers": "drop"}, ValueError, "`buffers` must be one of 'copy', 'average', got 'drop'"),
        ({"evaluate": "both"}, ValueError, "`evaluate` must be one of 'average', 'raw', got 'both'"),
        ({"checkpoint": "ema"}, ValueError, "`checkpoint` must be one of 'average', 'raw', got 'ema'"),
        ({"after_fit": None}, ValueError, "`after_fit` must be one of 'average', 'raw', got None"),
        ({"name": ""}, ValueError, "`name` must be a word, got ''"),
        ({"device": "moon"}, ValueError, "`device` must be the name of a device such as 'cpu', got 'moon'"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(arguments, kind, message):
    with pytest.raises(kind, match=message):
        EMA(**arguments)


def test_a_strategy_that_hides_the_weights_is_refused_by_name():
    from lightning.pytorch.strategies import SingleDeviceStrategy

    base = type("XLAStrategy", (SingleDeviceStrategy,), {})
    strategy = type("Mine", (base,), {})(device="cpu")
    with pytest.raises(MisconfigurationException, match="EMA was not tested under Mine; it works under DDPStrategy"):
        trainer(EMA(0.9), strategy=strategy).fit(Scripted(), numbers(1))


def test_callback_is_picklable_and_copyable_before_and_after_fit():
    ema = EMA(HalfLife(steps=5), name="x")
    clone = pickle.loads(pickle.dumps(ema))
    assert clone.decay == ema.decay
    assert clone.state_key == ema.state_key == "EMA(name='x')"
    assert copy.deepcopy(ema).name == "x"
    trainer(ema).fit(Scripted(), numbers(2))
    pickle.loads(pickle.dumps(ema))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("after_fit", ["average", "raw"])
def test_a_copy_of_a_fitted_pair_goes_on_like_the_original(copied, after_fit):
    module, ema = Net(), EMA(0.9, after_fit=after_fit)
    fit = trainer(ema)
    fit.fit(module, regression())
    module._trainer = None
    module_copy, ema_copy = copied((module, ema))
    held = clone_state(module)
    for which in ("average_state_dict", "raw_state_dict"):
        assert same(getattr(ema_copy, which)(), getattr(ema, which)())
    assert same(module_copy.state_dict(), held)
    with ema_copy.averaged(module_copy):
        assert same(module_copy.state_dict(), ema.average_state_dict())
    assert same(module.state_dict(), held)  # the original has not moved
    for pair in ((module, ema), (module_copy, ema_copy)):
        trainer(pair[1]).fit(pair[0], regression())
    assert not same(module.state_dict(), held)
    for which in ("average_state_dict", "raw_state_dict"):
        assert same(getattr(ema_copy, which)(), getattr(ema, which)())


def test_a_copy_of_an_average_that_was_written_over_has_the_average():
    module, ema = Net(), EMA(0.9)
    trainer(ema).fit(module, regression())
    average = clone_state(module)
    with torch.no_grad():
        next(module.parameters()).zero_()
    assert same(copy.deepcopy(ema).average_state_dict(), average)


def test_subclasses_both_namespaces_and_rules_are_annotated():
    assert issubclass(EMA, unified.Callback)
    assert issubclass(EMA, classic.Callback)
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(EMA, "ema")
    config = parser.parse_object(
        {"ema": {"decay": {"class_path": "lightning_plugins.HalfLife", "init_args": {"steps": 100}}, "name": "y"}}
    )
    ema = parser.instantiate(config).ema
    assert ema.decay == HalfLife(steps=100)
    assert isinstance(ema.decay, DecayRule)
    assert parser.instantiate(parser.parse_object({"ema": {"decay": 0.99}})).ema.decay == WarmupDecay(0.99)


def test_runs_without_an_optimizer_or_a_step_leave_the_module_alone():
    class Still(Scripted):
        def configure_optimizers(self):
            return None

    module, ema = Still(), EMA(0.9)
    with pytest.warns(UserWarning, match="will run with no optimizer"):
        trainer(ema).fit(module, numbers(2), numbers(1))
    assert module.weight.item() == 0
    assert module.seen == [0]
