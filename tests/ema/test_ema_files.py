"""What the files hold: the weights that were scored, both sets, nothing half loaded."""

import lightning.pytorch as unified
import pytest
import pytorch_lightning as classic
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.callbacks import ModelCheckpoint as ClassicModelCheckpoint
from torch import nn

from lightning_plugins import EMA, ConstantDecay, PostHocEMA, WarmupDecay, extract_weights
from lightning_plugins._lightning import MisconfigurationException
from lightning_plugins.ema.describe import describe_checkpoint
from lightning_plugins.ema.files import RECORD_KEY
from lightning_plugins.ema.seam import CheckpointSeam
from tests.support.ema_runs import (
    THETA,
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

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    pytest.mark.filterwarnings(r"ignore:`.fit\(ckpt_path=None\)` was called without a model"),
    pytest.mark.filterwarnings(r"ignore:.fit\(ckpt_path=\"last\"\) is set, but there is no last checkpoint"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]
WARMUP = follow(THETA, [WarmupDecay(0.9)(n) for n in range(1, 11)])


def load(path):
    return torch.load(path, weights_only=True)


def scored(module_class, trainer_class, files, **kwargs):
    """A run that remembers the weights that every validation saw."""
    torch.manual_seed(0)
    module, ema, seen = module_class(), EMA(0.9, after_fit="raw"), []

    class Look(unified.Callback):
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
    """Lightning's weights-only files hold the raw ones (user-needs 1)."""
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
    """Lightning exchanges the labels of a file that is written inside validation (defect 4)."""

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
        assert load(path)["callbacks"]["EMA{'name': 'ema'}"]["last_update"] == batch_idx + 1


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("where", ["val", "train"])
def test_on_exception_checkpoint_is_labelled_right(tmp_path, where, first):
    """With Lightning's callback a resume would train on from the average (user-needs 2)."""
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
    """Lightning has lost the raw weights by then (defect 2)."""
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
        trainer(ema := EMA(0.9, **{k: getattr(ema._pace, k) for k in ("start_step",)}), max_epochs=2).fit(
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


# -- files of others


def test_files_of_lightnings_own_callback_are_resumed(tmp_path):
    torch.manual_seed(0)
    trainer(EMAWeightAveraging(decay=0.9), ModelCheckpoint(tmp_path, filename="theirs")).fit(Net(), regression())
    path = tmp_path / "theirs.ckpt"
    theirs = load(path)
    assert same(extract_weights(path, "raw"), dict(theirs["current_model_state"]))
    assert same(extract_weights(path), dict(theirs["state_dict"]))
    module, ema = Net(), EMA(ConstantDecay(0.9))
    seen = {}

    class Look(unified.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update(raw=clone_state(pl_module), average=ema.average_state_dict(), state=ema.state_dict())

    trainer(ema, Look(), max_epochs=2).fit(module, regression(), ckpt_path=path)
    assert same(seen["raw"], dict(theirs["current_model_state"]))
    for name, _ in module.named_parameters():
        assert torch.equal(seen["average"][name], theirs["state_dict"][name])
    assert seen["state"] == {"version": 1, "applied_steps": 8, "origin": 0, "last_update": 8}
    assert ema.state_dict()["last_update"] == 16


def test_an_average_added_to_a_resumed_run_begins_there(tmp_path, caplog):
    trainer(ModelCheckpoint(tmp_path, filename="plain")).fit(Scripted(), numbers(5))
    module, ema = Scripted(), EMA(0.9, start_step=3)
    with caplog.at_level("INFO"):
        trainer(ema, max_epochs=2).fit(module, numbers(5), ckpt_path=tmp_path / "plain.ckpt")
    expected = follow(THETA[5:], [WarmupDecay(0.9)(n) for n in range(1, 6)], start=THETA[4])[-1]
    assert module.weight.item() == pytest.approx(expected)
    assert caplog.text.count("EMA{'name': 'ema'} joins at step 5: no average was restored") == 1


def test_removing_the_average_trains_on_from_it_and_extract_goes_back(tmp_path):
    trainer(EMA(0.9), ModelCheckpoint(tmp_path, filename="full")).fit(Scripted(), numbers(5))
    module, start = Scripted(), []

    class Look(unified.Callback):
        def on_train_start(self, trainer, pl_module):
            start.append(pl_module.weight.item())

    trainer(Look(), max_epochs=2).fit(module, numbers(5), ckpt_path=tmp_path / "full.ckpt")
    assert start == pytest.approx([WARMUP[4]])
    contents = load(tmp_path / "full.ckpt")
    contents["state_dict"] = extract_weights(tmp_path / "full.ckpt", "raw")
    torch.save(contents, tmp_path / "raw.ckpt")
    trainer(Look(), max_epochs=2).fit(module, numbers(5), ckpt_path=tmp_path / "raw.ckpt")
    assert start[1] == THETA[4]


def other_net(**changes):
    module = Net(**changes.pop("kwargs", {}))
    for name, part in changes.items():
        setattr(module, name, part)
    return module


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[RECORD_KEY]["averages"]["ema"].pop("net.0.bias"), "average 'ema' must have .*missing: net.0.bias"),
        (lambda c: c[RECORD_KEY]["averages"]["ema"].update(x=torch.ones(1)), "average 'ema' must have .*unexpected: x"),
        (
            lambda c: c[RECORD_KEY]["averages"]["ema"].update({"net.0.bias": torch.ones(3)}),
            r"average 'ema' must have .*misshapen: net.0.bias \(3,\) for \(8,\)",
        ),
        (lambda c: c.update({RECORD_KEY: [1]}), f"`{RECORD_KEY}` must be a record of averaged weights, got list"),
        (lambda c: c[RECORD_KEY].update(version=9), f"`{RECORD_KEY}` must be of version 1, got 9"),
    ],
)
def test_an_average_that_does_not_fit_is_refused_and_nothing_is_loaded(tmp_path, change, message):
    trainer(EMA(0.9, checkpoint="raw"), ModelCheckpoint(tmp_path, filename="full")).fit(Net(), regression())
    contents = load(tmp_path / "full.ckpt")
    change(contents)
    torch.save(contents, tmp_path / "changed.ckpt")
    module, ema = Net(), EMA(0.9, checkpoint="raw")
    with pytest.raises(MisconfigurationException, match=message):
        trainer(ema, max_epochs=2).fit(module, regression(), ckpt_path=tmp_path / "changed.ckpt")
    with pytest.raises(RuntimeError, match="has no weights to give"):
        ema.average_state_dict()
    assert same(clone_state(module), dict(contents["state_dict"]))


def test_raw_weights_that_do_not_fit_are_refused(tmp_path):
    trainer(EMA(0.9), ModelCheckpoint(tmp_path, filename="full")).fit(Net(), regression())
    contents = load(tmp_path / "full.ckpt")
    contents[RECORD_KEY]["raw"] = {f"old.{name}": value for name, value in contents[RECORD_KEY]["raw"].items()}
    torch.save(contents, tmp_path / "changed.ckpt")
    with pytest.raises(MisconfigurationException, match=r"unexpected: old\.net.0.weight"):
        trainer(EMA(0.9), max_epochs=2).fit(Net(), regression(), ckpt_path=tmp_path / "changed.ckpt")


def test_without_strict_loading_names_may_differ(tmp_path):
    trainer(EMA(0.9, checkpoint="raw"), ModelCheckpoint(tmp_path, filename="full")).fit(Net(), regression())
    contents = load(tmp_path / "full.ckpt")
    contents[RECORD_KEY]["averages"]["ema"]["extra"] = torch.ones(1)
    del contents[RECORD_KEY]["averages"]["ema"]["net.0.bias"]
    torch.save(contents, tmp_path / "changed.ckpt")
    module, ema = Net(), EMA(0.9, checkpoint="raw")
    module.strict_loading = False
    trainer(ema, max_epochs=1).fit(module, regression(), ckpt_path=tmp_path / "changed.ckpt")
    assert torch.equal(ema.average_state_dict()["net.0.bias"], contents["state_dict"]["net.0.bias"])


def test_counters_of_another_version_are_refused():
    from lightning_plugins.ema.pace import Pace

    with pytest.raises(ValueError, match="state of an average must be of version 1, got 3"):
        Pace().load_state_dict({"version": 3})


# -- extract and describe


def test_extract_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="`checkpoint_path` must be a checkpoint file, got"):
        extract_weights(tmp_path / "absent.ckpt")
    (tmp_path / "text.ckpt").write_text("no")
    with pytest.raises(ValueError, match="`checkpoint_path` must"):
        extract_weights(tmp_path / "text.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"must be a Lightning checkpoint, but .* has no `state_dict`"):
        extract_weights(tmp_path / "list.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": nn.Linear(1, 1)}, tmp_path / "object.ckpt")
    with pytest.raises(ValueError, match=r"must hold only tensors and plain values.*torch\.nn"):
        extract_weights(tmp_path / "object.ckpt")
    with pytest.raises(ValueError, match=r"`which` must be one of 'average', 'raw', got 'both'"):
        extract_weights(tmp_path / "object.ckpt", "both")


def test_describe_says_what_a_file_holds(tmp_path):
    module, ema = Net(), EMA(0.9)
    fit = trainer(ema, ModelCheckpoint(tmp_path, filename="full"), max_epochs=2)
    fit.fit(module, regression())
    found = describe_checkpoint(tmp_path / "full.ckpt")
    assert found["epoch"] == 1
    assert found["global_step"] == 16
    assert found["state_dict"] == {
        "weights": "average of EMA 'ema'",
        "tensors": 9,
        "elements": sum(value.numel() for value in module.state_dict().values()),
        "bytes": sum(value.nbytes for value in module.state_dict().values()),
        "types": ["float32", "int64"],
    }
    assert found["beside"] == {"raw weights": sum(p.nbytes for p in module.parameters())}
    assert "EMA{'name': 'ema'}" in found["callbacks"]
    assert found["kind"] == "full"
    assert found["file_bytes"] == (tmp_path / "full.ckpt").stat().st_size
    fit.callbacks.append(EMA(0.5, name="b", evaluate="raw", checkpoint="raw", after_fit="raw"))
    fit.callbacks.append(PostHocEMA((0.1,), dirpath=tmp_path))
    fit.fit_loop.max_epochs = 3
    fit.fit(module, regression())
    fit.save_checkpoint(tmp_path / "more.ckpt")
    found = describe_checkpoint(tmp_path / "more.ckpt")
    size = sum(p.nbytes for p in module.parameters())
    assert list(found["beside"].values()) == [size] * 3
    assert set(found["beside"]) >= {"raw weights", "average of EMA 'b'"}
    assert found["other"] == ["hparams_name", "hyper_parameters"]
    fit.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    found = describe_checkpoint(tmp_path / "weights.ckpt")
    assert found["kind"] == "weights only"
    assert found["state_dict"]["weights"] == "trained weights"
    assert found["callbacks"] == []


# -- the seam


class Strategy:
    """What the seam needs of one."""

    def __init__(self):
        self.saved = []
        self.torn_down = False

    def lightning_module_state_dict(self):
        return {"w": 0}

    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        self.saved.append((checkpoint, filepath))

    def teardown(self):
        self.torn_down = True


def test_seam_respects_wrappers_below_and_above_it():
    strategy = Strategy()
    strategy.save_checkpoint = below = lambda checkpoint, path: strategy.saved.append(("below", checkpoint))
    seam = CheckpointSeam(strategy, lambda s: s.update(w=1), lambda c: c.update(stamp=True))
    inner = strategy.lightning_module_state_dict
    strategy.lightning_module_state_dict = lambda: {**inner(), "above": True}
    assert strategy.lightning_module_state_dict() == {"w": 1, "above": True}
    checkpoint = {}
    strategy.save_checkpoint(checkpoint, "p")
    assert strategy.saved == [("below", {"stamp": True})]
    assert seam.active
    strategy.teardown()
    assert strategy.torn_down
    assert not seam.active
    assert strategy.save_checkpoint is below
    assert strategy.lightning_module_state_dict() == {"w": 0, "above": True}  # the one above stays, ours is inert
    seam.remove()
    other = {}
    strategy.save_checkpoint(other, "p")
    assert other == {}
