"""Kinds of modules, and several averages of one."""

import lightning.pytorch as unified
import pytest
import torch

from lightning_plugins import EMA, ConstantDecay, LatestWeightAveraging, PowerDecay
from lightning_plugins.core.lightning import MisconfigurationException
from tests.support import conditions
from tests.support.ema_runs import (
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
    """Lightning averages them and cuts off the rest: 1 instead of 8."""
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


def test_weights_unfrozen_by_a_run_that_resumes_in_mid_epoch_join_before_its_first_step(tmp_path):
    class Save(unified.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    class Unfreeze(unified.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.net[0].requires_grad_(True)

    def fit(ema, *callbacks, **options):
        torch.manual_seed(0)
        module = Net()
        module.net[0].requires_grad_(False)
        before = module.net[0].weight.detach().clone()
        trainer(ema, *callbacks).fit(module, regression(), **options)
        return before

    fit(EMA(ConstantDecay(1.0)), Save())
    ema = EMA(ConstantDecay(1.0))
    before = fit(ema, Unfreeze(), ckpt_path=tmp_path / "mid.ckpt")
    assert torch.equal(ema.average_state_dict()["net.0.weight"], before)
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


@conditions.whole_run_after_a_search
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
    """Two of Lightning's raise RuntimeError."""
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
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_claims_of_two_are_refused_at_setup(second, message, verb):
    with pytest.raises(MisconfigurationException, match=message):
        getattr(trainer(EMA(0.9), EMA(0.9, **second)), verb)(Scripted(), numbers(1))


def test_two_of_one_name_are_refused():
    twice = r"`name` must differ among a Trainer's callbacks, got EMA\(name='ema'\) twice\. Give one of them another"
    ema = EMA(0.9)
    for second in (EMA(0.5), ema):
        with pytest.raises(MisconfigurationException, match=twice):
            trainer(ema, second).fit(Scripted(), numbers(1))
    both = (EMA(0.9, name="x"), LatestWeightAveraging(name="x", evaluate="raw", checkpoint="raw", after_fit="raw"))
    with pytest.raises(MisconfigurationException, match="`name` must differ among the averages of a Trainer, got 'x'"):
        trainer(*both).fit(Scripted(), numbers(1))
