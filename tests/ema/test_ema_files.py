"""What the files hold: the weights that were scored, both sets, nothing half loaded."""

import lightning.pytorch as unified
import pytest
import pytorch_lightning as classic
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.callbacks import ModelCheckpoint as ClassicModelCheckpoint

from lightning_plugins import EMA, ConstantDecay, extract_weights
from lightning_plugins.core.lightning import CallbackOfBoth
from lightning_plugins.ema.checkpoint_format import RECORD_KEY
from tests.support.ema_runs import (
    THETA,
    WARMUP,
    ClassicNet,
    Net,
    Scripted,
    clone_state,
    follow,
    numbers,
    regression,
    same,
    trainer,
)


def load(path):
    return torch.load(path, weights_only=True)


def scored(module_class, trainer_class, files, **kwargs):
    """A run that remembers the weights that every validation saw."""
    torch.manual_seed(0)
    module, ema, seen = module_class(), EMA(0.9, after_fit="raw"), []

    class Look(CallbackOfBoth):
        def on_validation_epoch_end(self, trainer, pl_module):
            seen.append(clone_state(pl_module))

    trainer(ema, Look(), files, trainer_class=trainer_class, **kwargs).fit(module, regression(), regression(8))
    return module, ema, seen


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize(
    ("trainer_class", "module_class", "checkpoint_class"),
    [
        (unified.Trainer, Net, ModelCheckpoint),
        (classic.Trainer, ClassicNet, ClassicModelCheckpoint),
    ],
    ids=["lightning.pytorch", "pytorch_lightning"],
)
def test_files_hold_the_weights_that_were_scored(tmp_path, trainer_class, module_class, checkpoint_class, weights_only):
    """Lightning's weights-only files hold the raw ones."""
    files = checkpoint_class(
        tmp_path, monitor="val_loss", filename="{epoch}", save_top_k=-1, save_weights_only=weights_only
    )
    module, ema, seen = scored(module_class, trainer_class, files, max_epochs=3)
    assert len(seen) == 3
    for epoch in range(3):
        path = tmp_path / f"epoch={epoch}.ckpt"
        assert same(dict(load(path)["state_dict"]), seen[epoch])
        loaded = module_class.load_from_checkpoint(path)  # needs no plugin
        assert same(clone_state(loaded), seen[epoch])
        assert same(extract_weights(path), seen[epoch])
    last = tmp_path / "epoch=2.ckpt"
    if weights_only:
        assert load(last)[RECORD_KEY] == {
            "version": 1,
            "state_dict": "average",
            "name": "ema",
            "raw": None,
            "averages": {},
        }
        with pytest.raises(ValueError, match=r"`which` must be 'average' for .*: it is a weights-only file"):
            extract_weights(last, "raw")
    else:
        assert same(extract_weights(last, "raw"), ema.raw_state_dict())
        assert set(load(last)[RECORD_KEY]["raw"]) == {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "hook", ["on_validation_start", "on_validation_batch_end", "on_validation_end", "on_train_end"]
)
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_file_cut_at_any_moment_is_labelled_right(tmp_path, hook, first, weights_only):
    """Lightning exchanges the labels of a file that is written inside validation."""

    def save(self, trainer, pl_module, *args):
        trainer.save_checkpoint(tmp_path / "cut.ckpt", weights_only=weights_only)

    cutter = type("Cut", (unified.Callback,), {hook: save})()
    module, ema = Scripted(), EMA(0.9)
    callbacks = [cutter, ema] if first else [ema, cutter]
    trainer(*callbacks).fit(module, numbers(5), numbers(1))
    assert extract_weights(tmp_path / "cut.ckpt")["weight"].item() == pytest.approx(WARMUP[4])
    if not weights_only:
        assert extract_weights(tmp_path / "cut.ckpt", "raw")["weight"].item() == THETA[4]


def test_a_file_cut_in_training_before_our_hook_has_the_latest_average(tmp_path):
    class Cut(unified.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")

    trainer(Cut(), EMA(0.9)).fit(Scripted(), numbers(4))
    for batch_idx in range(4):
        path = tmp_path / f"{batch_idx}.ckpt"
        assert extract_weights(path)["weight"].item() == pytest.approx(WARMUP[batch_idx])
        assert load(path)["callbacks"]["EMA(name='ema')"]["last_update"] == batch_idx + 1


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("where", ["val", "train"])
def test_on_exception_checkpoint_is_labelled_right(tmp_path, where, first):
    """With Lightning's callback a resume would train on from the average."""
    torch.manual_seed(0)
    module, ema, rescue = Net(), EMA(0.9), OnExceptionCheckpoint(tmp_path)
    raw = {}

    class Look(unified.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            raw.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    module.crash = (where, 1, 1)
    fit = trainer(*([rescue, Look(), ema] if first else [Look(), ema, rescue]), max_epochs=2, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="killed"):
        fit.fit(module, regression(), regression(8))
    path = tmp_path / "on_exception.ckpt"
    got = extract_weights(path, "raw")
    assert all(torch.equal(got[name], value) for name, value in raw.items())
    assert all(torch.equal(p, raw[name]) for name, p in module.named_parameters())
    assert same(extract_weights(path), ema.average_state_dict())


def test_a_file_saved_after_fit_has_both_whatever_the_module_holds(tmp_path):
    """Lightning has lost the raw weights by then."""
    for after_fit in ("average", "raw"):
        module, ema = Scripted(), EMA(0.9, after_fit=after_fit)
        fit = trainer(ema)
        fit.fit(module, numbers(5))
        fit.save_checkpoint(tmp_path / "full.ckpt")
        fit.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
        assert load(tmp_path / "full.ckpt")["state_dict"]["weight"].item() == pytest.approx(WARMUP[4])
        assert extract_weights(tmp_path / "full.ckpt", "raw")["weight"].item() == THETA[4]
        assert load(tmp_path / "weights.ckpt")["state_dict"]["weight"].item() == module.weight.item()


def test_checkpoint_raw_keeps_the_average_beside(tmp_path):
    module, ema = Scripted(), EMA(0.9, checkpoint="raw")
    files = ModelCheckpoint(tmp_path, filename="full")
    fit = trainer(ema, files)
    fit.fit(module, numbers(5), numbers(1))
    assert module.seen == pytest.approx([WARMUP[4]])
    contents = load(tmp_path / "full.ckpt")
    assert contents["state_dict"]["weight"].item() == THETA[4]
    assert extract_weights(tmp_path / "full.ckpt")["weight"].item() == pytest.approx(WARMUP[4])
    assert extract_weights(tmp_path / "full.ckpt", "raw")["weight"].item() == THETA[4]


def test_weights_only_file_of_checkpoint_raw_is_raw_also_in_mid_validation(tmp_path):
    class Cut(unified.Callback):
        def on_validation_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "cut.ckpt", weights_only=True)

    trainer(Cut(), EMA(0.9, checkpoint="raw")).fit(Scripted(), numbers(5), numbers(1))
    contents = load(tmp_path / "cut.ckpt")
    assert contents["state_dict"]["weight"].item() == THETA[4]
    assert contents[RECORD_KEY]["state_dict"] == "raw"
    with pytest.raises(ValueError, match="got 'ema'; it has none, only the trained weights"):
        extract_weights(tmp_path / "cut.ckpt")


@pytest.mark.parametrize("order", [1, -1])
def test_several_averages_in_one_file(tmp_path, order):
    emas = [
        EMA(0.9, name="fast", checkpoint="raw"),
        EMA(ConstantDecay(0.5), name="slow", evaluate="raw", after_fit="raw"),
    ]

    class Cut(unified.Callback):
        def on_validation_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "cut.ckpt")

    module = Scripted()
    trainer(*emas[::order], Cut()).fit(module, numbers(5), numbers(1))
    path, slow = tmp_path / "cut.ckpt", follow(THETA[:5], [0.5] * 5)[-1]
    assert module.seen == pytest.approx([WARMUP[4]])
    assert load(path)["state_dict"]["weight"].item() == pytest.approx(slow)
    assert extract_weights(path, name="fast")["weight"].item() == pytest.approx(WARMUP[4])
    assert extract_weights(path, name="slow")["weight"].item() == pytest.approx(slow)
    assert extract_weights(path, "raw")["weight"].item() == THETA[4]
    with pytest.raises(ValueError, match="got 'ema'; it has 'fast', 'slow'"):
        extract_weights(path)

    again = [EMA(0.9, name="fast", checkpoint="raw"), EMA(ConstantDecay(0.5), name="slow", evaluate="raw")]
    restored = []

    class Look(unified.Callback):
        def on_train_start(self, trainer, pl_module):
            restored.extend(ema.average_state_dict()["weight"].item() for ema in again)
            restored.extend(ema.raw_state_dict()["weight"].item() for ema in again)
            restored.append(pl_module.weight.item())

    trainer(*again[::order], Look(), max_epochs=1).fit(Scripted(), numbers(5), ckpt_path=path)
    assert restored == pytest.approx([WARMUP[4], slow, THETA[4], THETA[4], THETA[4]])


def test_owner_of_the_files_that_has_not_begun_leaves_them_raw(tmp_path):
    class Cut(unified.Callback):
        def on_validation_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "cut.ckpt", weights_only=True)

    shown, owner = EMA(0.9, name="shown", checkpoint="raw"), EMA(0.9, evaluate="raw", start_step=100)
    trainer(shown, owner, Cut()).fit(module := Scripted(), numbers(5), numbers(1))
    assert module.seen == pytest.approx([WARMUP[4]])
    assert load(tmp_path / "cut.ckpt")["state_dict"]["weight"].item() == THETA[4]


def test_files_before_the_first_update_are_raw(tmp_path):
    class Cut(unified.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "full.ckpt")
            trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    for ema in (EMA(0.9, start_step=4), EMA(0.9, update_every_n_steps=4)):
        trainer(ema, Cut()).fit(Scripted(), numbers(3))
        for name in ("full", "weights"):
            assert load(tmp_path / f"{name}.ckpt")["state_dict"]["weight"].item() == THETA[2]
            assert extract_weights(tmp_path / f"{name}.ckpt", "raw")["weight"].item() == THETA[2]
        resumed = Scripted()
        trainer(ema := EMA(0.9, start_step=ema.start_step), max_epochs=2).fit(
            resumed, numbers(3), ckpt_path=tmp_path / "full.ckpt"
        )
        assert ema.raw_state_dict()["weight"].item() == THETA[5]
        assert ema.state_dict()["applied_steps"] == 6


def test_half_precision_average_is_saved_wide(tmp_path):
    torch.manual_seed(0)
    module, ema = Net(), EMA(0.9)
    fit = trainer(ema, ModelCheckpoint(tmp_path, filename="full"), precision="bf16-true")
    fit.fit(module, regression(), regression(8))
    average = extract_weights(tmp_path / "full.ckpt")
    assert average["net.0.weight"].dtype == torch.float32
    assert same(average, ema.average_state_dict())
    assert same(extract_weights(tmp_path / "full.ckpt", "raw"), ema.raw_state_dict())
    torch.manual_seed(0)
    again = EMA(0.9)
    trainer(again, precision="bf16-true", max_epochs=1).fit(Net(), regression(), ckpt_path=tmp_path / "full.ckpt")
    assert same(again.average_state_dict(), average)
    assert same(again.raw_state_dict(), ema.raw_state_dict())


# -- without a fit


@pytest.mark.parametrize("evaluate", ["average", "raw"])
@pytest.mark.parametrize("checkpoint", ["average", "raw"])
def test_a_file_that_is_only_evaluated_gives_the_wanted_set(tmp_path, evaluate, checkpoint):
    trainer(EMA(0.9, checkpoint=checkpoint), ModelCheckpoint(tmp_path, filename="full")).fit(Scripted(), numbers(5))
    module = Scripted()
    trainer(EMA(0.9, evaluate=evaluate, checkpoint=checkpoint)).validate(
        module, numbers(1), ckpt_path=tmp_path / "full.ckpt", verbose=False
    )
    assert module.seen == pytest.approx([WARMUP[4] if evaluate == "average" else THETA[4]])


def test_best_file_is_tested_as_it_was_scored(tmp_path):
    for after_fit in ("average", "raw"):
        module, ema = Scripted(), EMA(0.9, after_fit=after_fit)
        files = ModelCheckpoint(tmp_path / after_fit, monitor="val", mode="min")
        fit = trainer(ema, files, max_epochs=2)
        fit.fit(module, numbers(5), numbers(1))
        module.seen.clear()
        fit.test(module, numbers(1), ckpt_path="best", verbose=False)
        assert module.seen == pytest.approx([WARMUP[4]])


def test_plain_files_are_evaluated_and_extracted_as_they_are(tmp_path):
    module = Scripted()
    trainer(ModelCheckpoint(tmp_path, filename="plain")).fit(module, numbers(5))
    again = Scripted()
    trainer(EMA(0.9)).validate(again, numbers(1), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    assert again.seen == [THETA[4]]
    assert extract_weights(tmp_path / "plain.ckpt", "raw")["weight"].item() == THETA[4]
    with pytest.raises(ValueError, match=r"must be that of an average in .*plain.ckpt, got 'ema'; it has none"):
        extract_weights(tmp_path / "plain.ckpt")
