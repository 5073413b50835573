"""The callback in a real Trainer: what is evaluated, when it ticks, what the module holds afterwards."""

import copy
import pickle

import lightning.pytorch as unified
import pytest
import pytorch_lightning as classic
import torch
from torch import nn

from lightning_plugins import EMA, ConstantDecay, DecayRule, HalfLife, PowerDecay, WarmupDecay
from lightning_plugins._lightning import MisconfigurationException
from tests.support.ema_runs import (
    THETA,
    ClassicScripted,
    Net,
    Script,
    Scripted,
    clone_state,
    follow,
    numbers,
    regression,
    same,
    trainer,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`.*` has no `.*_step` but has"),
]

WARMUP = follow(THETA, [WarmupDecay(0.9)(n) for n in range(1, 11)])  # equals the golden table: test_ema_decay.py
NAMESPACES = pytest.mark.parametrize(
    ("trainer_class", "module_class"),
    [(unified.Trainer, Scripted), (classic.Trainer, ClassicScripted)],
    ids=["lightning.pytorch", "pytorch_lightning"],
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


def test_sanity_check_and_validation_before_the_first_update_are_raw():
    """Lightning would evaluate, and at the end restore, the untrained weights (defect 5)."""
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
    """Lightning evaluates the old average in the new module (user-needs 3)."""
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
    if after_fit == "average":
        with pytest.raises(RuntimeError, match="something else was written into the module"):
            ema.average_state_dict()
        assert ema.raw_state_dict()["weight"].item() == THETA[4]
    else:
        assert ema.average_state_dict()["weight"].item() == pytest.approx(WARMUP[4], rel=1e-6)
    with ema.averaged(module):
        assert module.weight.item() == -2
    fit.fit_loop.max_epochs = 2
    fit.fit(module, numbers(5))  # such weights are trained on, with an average of their own
    assert ema.average_state_dict()["weight"].item() == pytest.approx(
        follow(THETA, [WarmupDecay(0.9)(n) for n in range(1, 6)], start=-2)[-1], rel=1e-6
    )


@pytest.mark.parametrize("after_fit", ["average", "raw"])
def test_second_fit_goes_on_from_the_raw_weights(after_fit):
    """Lightning's second fit averages nothing (defect 11) and trains on from the average (defect 2)."""

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
    """Lightning leaves the average in the module (defect 3)."""
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


# -- the clock


def test_accumulation_updates_once_per_step():
    module, ema = Scripted(), EMA(0.9)
    trainer(ema, accumulate_grad_batches=3).fit(module, numbers(8))  # steps after batches 3, 6 and 8
    assert module.weight.item() == pytest.approx(WARMUP[2], rel=1e-6)
    assert ema.state_dict()["last_update"] == 3


def test_batches_without_a_loss_do_not_tick():
    class Nothing(Scripted):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    module, ema = Nothing(), EMA(0.9)
    fit = trainer(ema)
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        fit.fit(module, numbers(10))
    assert fit.global_step == 10
    assert module.weight.item() == pytest.approx(WARMUP[4], rel=1e-6)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_update_interval_keeps_the_memory_of_the_average(every):
    rule = ConstantDecay(0.9)
    module, ema = Scripted(), EMA(rule, update_every_n_steps=every)
    trainer(ema).fit(module, numbers(10))
    expected, shadow = None, 0.0
    for n in range(every, 11, every):
        shadow = 0.9**every * shadow + (1 - 0.9**every) * THETA[n - 1]
        expected = shadow
    assert ema.average_state_dict()["weight"].item() == pytest.approx(expected, rel=1e-6)


class TwoOptimizers(unified.LightningModule):
    """Manual optimisation of two weights, the second every other batch."""

    def __init__(self, first_steps=1):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.first_steps = first_steps
        self.between = lambda: None

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for _ in range(self.first_steps):
            first.zero_grad()
            self.manual_backward(self.a * 1.0)
            first.step()
        self.between()
        if batch_idx % 2:
            second.zero_grad()
            self.manual_backward(self.b * 1.0)
            second.step()

    def configure_optimizers(self):
        return Script([self.a]), Script([self.b])


def test_manual_optimisation_with_two_optimizers_ticks_on_the_first():
    """Lightning's clock is global_step: with update_every_n_steps=2 it never updates here (defect 12)."""
    module, ema = TwoOptimizers(), EMA(ConstantDecay(0.5), update_every_n_steps=2)
    trainer(ema).fit(module, numbers(8))
    assert ema.state_dict()["last_update"] == 8
    a = follow([THETA[i] for i in (1, 3, 5, 7)], [0.25] * 4)[-1]
    b = follow(THETA[:4], [0.25] * 4)[-1]  # the second optimizer's weights are current at the end of the batch
    average = ema.average_state_dict()
    assert average["a"].item() == pytest.approx(a, rel=1e-6)
    assert average["b"].item() == pytest.approx(b, rel=1e-6)


def test_a_file_saved_between_two_optimizers_does_not_update_early(tmp_path):
    plain, saving = TwoOptimizers(), TwoOptimizers()
    saving.between = lambda: saving.trainer.save_checkpoint(tmp_path / "between.ckpt")
    averages = []
    for module in (plain, saving):
        ema = EMA(ConstantDecay(0.5))
        trainer(ema).fit(module, numbers(8))
        averages.append(ema.average_state_dict())
    assert same(*averages)


def test_several_steps_in_one_batch_decay_for_each():
    module, ema = TwoOptimizers(first_steps=3), EMA(ConstantDecay(0.5))
    trainer(ema).fit(module, numbers(2))
    assert ema.state_dict()["last_update"] == 6
    assert ema.average_state_dict()["a"].item() == pytest.approx(follow([THETA[2], THETA[5]], [0.125] * 2)[-1])


class Overflowing(Net):
    """Some batches overflow in float16."""

    bad = (2, 3, 6)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx in self.bad else loss


def amp(namespace):
    plugins = namespace.pytorch.plugins if hasattr(namespace, "pytorch") else namespace.plugins
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    return plugins.MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_scaler_skips_do_not_tick(fused):
    class Fused(Overflowing):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01, fused=fused)

    class Count(unified.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.weights.append(pl_module.net[0].weight.detach().clone())

    torch.manual_seed(0)
    module, ema, count = Fused(), EMA(0.9), Count()
    count.weights = [module.net[0].weight.detach().clone()]
    fit = trainer(ema, count, plugins=amp(unified))
    fit.fit(module, regression())
    assert fit.global_step == 8
    assert ema.state_dict()["last_update"] == 5
    changed = [b for a, b in zip(count.weights, count.weights[1:], strict=False) if not torch.equal(a, b)]
    assert len(changed) == 5
    shadow = count.weights[0].double()
    for n, weight in enumerate(changed, start=1):
        decay = WarmupDecay(0.9)(n)
        shadow = decay * shadow + (1 - decay) * weight
    average = ema.average_state_dict()["net.0.weight"]
    torch.testing.assert_close(average.double(), shadow, rtol=1e-5, atol=1e-6)


def test_no_sync_is_made_by_an_update(monkeypatch):
    """No number is read back from a tensor between two batches: on a GPU that would wait for the device."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _o=original, _n=name, **k: (reads.append(_n), _o(self, *a, **k))[1]
        )
    module, ema = Net(), EMA(0.9)

    class Watch(unified.Callback):
        def on_train_batch_end(self, *args):
            del reads[:]
            ema.on_train_batch_end(*args)
            ema.on_train_batch_start(args[0], args[1], None, 0)
            assert not reads

    trainer(Watch(), ema).fit(module, regression())
    assert ema.state_dict()["last_update"] == 8


@pytest.mark.parametrize("window", [1, 2])
def test_half_life_in_samples_counts_batch_window_and_ranks(window):
    module, ema = Scripted(), EMA(HalfLife(samples=24))
    trainer(ema, accumulate_grad_batches=window).fit(module, numbers(4, batch_size=6))
    decay = 2 ** (-6 * window / 24)
    assert ema.average_state_dict()["weight"].item() == pytest.approx(follow(THETA[: 4 // window], [decay] * 4)[-1])


def test_half_life_in_samples_needs_a_batch_size():
    loader = torch.utils.data.DataLoader([torch.ones(1, 1)] * 3, batch_size=None)
    with pytest.raises(MisconfigurationException, match="must find the batch size of the training loader"):
        trainer(EMA(HalfLife(samples=24))).fit(Scripted(), loader)
    from lightning_plugins.ema.samples import _loaders

    assert _loaders({"a": 1, "b": 2}) == [1, 2]
    assert _loaders([1, 2]) == [1, 2]


# -- the module


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "bf16-mixed"])
def test_precision_of_the_module_is_kept_and_the_average_is_wide(precision):
    torch.manual_seed(0)
    module, ema = Net(), EMA(0.9, after_fit="raw")
    seen = {}

    class Look(unified.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen["average"] = ema.average_state_dict()

        def on_validation_epoch_end(self, trainer, pl_module):
            seen["shown"] = clone_state(pl_module)

    fit = trainer(Look(), ema, precision=precision, max_epochs=2)
    fit.fit(module, regression(), regression(8))
    kind = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(precision, torch.float)
    average, raw = ema.average_state_dict(), ema.raw_state_dict()
    wide = torch.float64 if kind == torch.float64 else torch.float32
    for name, parameter in module.named_parameters():
        assert parameter.dtype == raw[name].dtype == kind
        assert average[name].dtype == wide
        assert torch.equal(seen["shown"][name], seen["average"][name].to(kind))
        assert not torch.equal(raw[name], average[name].to(kind))
    if kind != wide:
        assert any(not torch.equal(average[n], average[n].to(kind).to(wide)) for n, _ in module.named_parameters())


def test_integer_buffers_are_the_modules_own():
    """Lightning averages them and cuts off the rest: 1 instead of 8 (defect 1)."""
    for buffers in ("copy", "average"):
        module, ema = Net(), EMA(0.99, buffers=buffers)
        fit = trainer(ema)
        fit.fit(module, regression())
        average = ema.average_state_dict()
        assert average["net.1.num_batches_tracked"].item() == 8
        assert average["net.1.num_batches_tracked"].dtype == torch.int64
        moved = not torch.equal(average["net.1.running_mean"], ema.raw_state_dict()["net.1.running_mean"])
        assert moved == (buffers == "average")


def test_no_copy_of_the_module_is_made(monkeypatch):
    def refuse(self, memo):
        raise AssertionError("deepcopy of the module")

    monkeypatch.setattr(Net, "__deepcopy__", refuse, raising=False)
    trainer(EMA(0.9)).fit(Net(), regression(), regression(8))


def test_compiled_submodules_are_averaged():
    torch.manual_seed(0)
    plain, ema = Net(), EMA(0.9)
    trainer(ema).fit(plain, regression(), regression(8))
    torch.manual_seed(0)
    module, ema_compiled = Net(), EMA(0.9)
    module.net[0] = torch.compile(module.net[0], backend="aot_eager")
    trainer(ema_compiled).fit(module, regression(), regression(8))
    expected, got = ema.average_state_dict(), ema_compiled.average_state_dict()
    assert any("_orig_mod" in key for key in got)
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key.replace("_orig_mod.", "")], rtol=1e-5, atol=1e-6)
    module.load_state_dict(got)


def test_unfrozen_weights_join_at_the_next_epoch():
    class Unfreeze(unified.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.net[0].requires_grad_(trainer.current_epoch == 1)

    class Finetuned(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for order in (0, 1):
        torch.manual_seed(0)
        module, ema = Finetuned(), EMA(ConstantDecay(1.0))
        module.net[0].requires_grad_(False)
        before = module.net[0].weight.detach().clone()
        callbacks = [Unfreeze(), ema]
        trainer(*callbacks[:: 1 if order else -1], max_epochs=2).fit(module, regression())
        assert torch.equal(ema.average_state_dict()["net.0.weight"], before)  # it began before the first unfrozen step
        assert not torch.equal(ema.raw_state_dict()["net.0.weight"], before)


def test_training_is_bit_for_bit_what_it_is_without_an_average():
    runs = []
    for callbacks in (
        [],
        [EMA(0.9, after_fit="raw"), EMA(0.5, name="b", evaluate="raw", checkpoint="raw", after_fit="raw")],
    ):
        torch.manual_seed(0)
        module = Net()
        trainer(*callbacks, max_epochs=2, val_check_interval=2).fit(module, regression(), regression(8))
        runs.append(clone_state(module))
    # batch statistics see validation in eval mode only, so buffers agree as well
    assert same(*runs)


def test_a_learning_rate_search_before_the_run_leaves_no_trace(tmp_path):
    from lightning.pytorch.callbacks import LearningRateFinder

    def run(*callbacks):
        torch.manual_seed(0)
        module, ema = Net(), EMA(0.9)
        trainer(*callbacks, ema, default_root_dir=tmp_path, enable_checkpointing=True).fit(module, regression())
        return ema

    plain, searched = run(), run(LearningRateFinder(num_training_steps=6, update_attr=False, early_stop_threshold=None))
    assert searched.state_dict() == plain.state_dict()
    assert same(searched.average_state_dict(), plain.average_state_dict())
    assert same(searched.raw_state_dict(), plain.raw_state_dict())


# -- several


def several():
    return (
        EMA(0.9, name="fast", evaluate="raw", checkpoint="raw", after_fit="raw"),
        EMA(ConstantDecay(0.5), name="slow"),
        EMA(PowerDecay(0.1), name="power", evaluate="raw", checkpoint="raw", after_fit="raw", start_step=2),
    )


def test_several_averages_side_by_side():
    """Two of Lightning's raise RuntimeError (defect 9)."""
    module, emas = Scripted(), several()
    fit = trainer(*emas)
    fit.fit(module, numbers(5), numbers(1))
    slow = follow(THETA[:5], [0.5] * 5)[-1]
    power = follow(THETA[2:5], [PowerDecay(0.1)(n) for n in (1, 2, 3)], start=THETA[1])[-1]
    assert module.seen == pytest.approx([slow])
    assert [ema.average_state_dict()["weight"].item() for ema in emas] == pytest.approx([WARMUP[4], slow, power])
    assert [ema.raw_state_dict()["weight"].item() for ema in emas] == [THETA[4]] * 3
    assert module.weight.item() == pytest.approx(slow)
    with emas[0].averaged(module):  # takes the place of the one that is there
        assert module.weight.item() == pytest.approx(WARMUP[4])
        assert [ema.raw_state_dict()["weight"].item() for ema in emas] == [THETA[4]] * 3
    assert module.weight.item() == pytest.approx(slow)


def test_of_several_that_stay_the_evaluated_one_does():
    module = Scripted()
    a, b = EMA(0.9, name="a", evaluate="raw", checkpoint="raw"), EMA(0.5, name="b", checkpoint="raw")
    trainer(a, b).fit(module, numbers(5))
    assert module.weight.item() == b.average_state_dict()["weight"].item()
    module = Scripted()
    b.evaluate = "raw"
    trainer(a, b).fit(module, numbers(5))
    assert module.weight.item() == a.average_state_dict()["weight"].item()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"name": "b"}, r"`evaluate` must be 'average' for at most one EMA.*got 'ema', 'b': pass evaluate='raw'"),
        (
            {"name": "b", "evaluate": "raw"},
            r"`checkpoint` must be 'average' for at most one EMA.*pass checkpoint='raw'",
        ),
    ],
)
def test_claims_of_two_are_refused_at_setup(second, message):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(EMA(0.9), EMA(0.9, **second)).fit(Scripted(), numbers(1))


def test_two_of_one_name_are_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `EMA`"):
        trainer(EMA(0.9), EMA(0.5))
    fit = trainer(EMA(0.9))
    fit.callbacks.append(EMA(0.9))
    with pytest.raises(
        MisconfigurationException, match="`name` must differ between the EMAs of one Trainer, got 'ema'"
    ):
        fit.fit(Scripted(), numbers(1))


# -- construction


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"decay": 1.01}, ValueError, "`decay` must be at least 0 and at most 1, got 1.01"),
        ({"decay": None}, TypeError, "`decay` must be a number or a decay rule"),
        ({"update_every_n_steps": 0}, ValueError, "`update_every_n_steps` must be at least 1 steps, got 0"),
        ({"update_every_n_steps": 1.5}, TypeError, "`update_every_n_steps` must be a whole number of steps, got 1.5"),
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


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy", "XLAStrategy"])
def test_strategies_that_hide_the_weights_are_refused_by_name(name):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    base = type(name, (SingleDeviceStrategy,), {})
    strategy = type("Mine", (base,), {})(device="cpu")
    with pytest.raises(MisconfigurationException, match="must be used with a single device, DDP or FSDP2, got Mine"):
        trainer(EMA(0.9), strategy=strategy).fit(Scripted(), numbers(1))


def test_distributed_checkpoints_are_refused_with_the_way_out():
    from lightning.pytorch.strategies import SingleDeviceStrategy

    strategy = SingleDeviceStrategy(device="cpu")
    strategy._save_distributed_checkpoint = True
    with pytest.raises(MisconfigurationException, match="Pass save_distributed_checkpoint=False"):
        trainer(EMA(0.9), strategy=strategy).fit(Scripted(), numbers(1))


def test_callback_is_picklable_and_copyable_before_and_after_fit():
    ema = EMA(HalfLife(steps=5), name="x")
    clone = pickle.loads(pickle.dumps(ema))
    assert clone.decay == ema.decay
    assert clone.state_key == ema.state_key == "EMA{'name': 'x'}"
    assert copy.deepcopy(ema).name == "x"
    trainer(ema).fit(Scripted(), numbers(2))
    pickle.loads(pickle.dumps(ema))


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
