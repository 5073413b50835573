"""Files of others, files that do not fit, and reading files without a Trainer."""

import lightning.pytorch as unified
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_plugins import (
    EMA,
    ConstantDecay,
    PostHocEMA,
    PowerDecay,
    WarmupDecay,
    extract_weights,
    synthesize_ema,
)
from lightning_plugins.core import checkpoint_keys
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.ema.checkpoint_format import RECORD_KEY, Contents, fitting_average, read_contents
from lightning_plugins.ema.checkpoint_summary import describe_checkpoint
from lightning_plugins.ema.snapshots import list_snapshots
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


def load(path):
    return torch.load(path, weights_only=True)


@conditions.ema_weight_averaging
def test_files_of_lightnings_own_callback_are_resumed(tmp_path):
    torch.manual_seed(0)
    trainer(unified.callbacks.EMAWeightAveraging(decay=0.9), ModelCheckpoint(tmp_path, filename="theirs")).fit(
        Net(), regression()
    )
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


@pytest.mark.parametrize(("count", "updates"), [(torch.tensor(3), 3), (3, 3), (torch.tensor([3]), 3), (0, 0)])
def test_the_updates_of_lightnings_own_average_are_its_own_count(count, updates):
    file = {"state_dict": {}, "current_model_state": {}, "averaging_state": {"n_averaged": count}}
    assert read_contents(file).updates == updates
    assert isinstance(read_contents(file).updates, int)


@pytest.mark.parametrize("key", ["current_model_state", "averaging_state"])
def test_a_file_with_one_half_of_what_lightnings_own_callback_writes_is_none_of_its(key):
    assert read_contents({"state_dict": {}, key: {"n_averaged": 3}}) is None


@pytest.mark.parametrize("count", [{}, {"n_averaged": 1.5}, {"n_averaged": torch.tensor([1, 2])}, {"n_averaged": -1}])
def test_a_count_of_lightnings_own_average_that_is_none_is_refused(count):
    with pytest.raises((TypeError, ValueError), match="`n_averaged` must be"):
        read_contents({"state_dict": {}, "current_model_state": {}, "averaging_state": count})


def test_an_average_added_to_a_resumed_run_begins_there(tmp_path, caplog):
    trainer(ModelCheckpoint(tmp_path, filename="plain")).fit(Scripted(), numbers(5))
    module, ema = Scripted(), EMA(0.9, start_step=3)
    with caplog.at_level("INFO"):
        trainer(ema, max_epochs=2).fit(module, numbers(5), ckpt_path=tmp_path / "plain.ckpt")
    expected = follow(THETA[5:], [WarmupDecay(0.9)(n) for n in range(1, 6)], start=THETA[4])[-1]
    assert module.weight.item() == pytest.approx(expected)
    assert caplog.text.count("EMA(name='ema') joins at step 5: no average was restored") == 1


def test_counters_whose_averages_a_file_lacks_are_not_taken_over(tmp_path):
    def callbacks(folder):
        return EMA(0.9, checkpoint="raw"), PostHocEMA((0.1,), every_n_steps=4, dirpath=tmp_path / folder)

    trainer(*callbacks("first"), ModelCheckpoint(tmp_path, filename="full")).fit(Scripted(), numbers(5))
    contents = torch.load(tmp_path / "full.ckpt", weights_only=True)
    for key in (checkpoint_keys.EMA, checkpoint_keys.POSTHOC_EMA):
        del contents[key]
    torch.save(contents, tmp_path / "without.ckpt")
    ema, post = callbacks("second")
    trainer(ema, post, max_epochs=2).fit(Scripted(), numbers(5), ckpt_path=tmp_path / "without.ckpt")
    expected = follow(THETA[5:], [WarmupDecay(0.9)(n) for n in range(1, 6)], start=THETA[4])[-1]
    assert ema.average_state_dict()["weight"].item() == pytest.approx(expected)
    expected = follow(THETA[5:], [PowerDecay(0.1)(n) for n in range(1, 6)])[-1]
    assert synthesize_ema(tmp_path / "second", 0.1)["weight"].item() == pytest.approx(expected)
    assert [snapshot.step for snapshot in list_snapshots(tmp_path / "second")] == [4, 5]


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
        (lambda c: c[RECORD_KEY]["averages"]["ema"].update(x=torch.ones(1)), "average 'ema' must have .*unexpected: x"),
        (
            lambda c: c[RECORD_KEY]["averages"]["ema"].update({"net.0.bias": torch.ones(3)}),
            r"average 'ema' must have .*misshapen: net.0.bias \(3,\) for \(8,\)",
        ),
        (lambda c: c[RECORD_KEY].pop("state_dict"), f"`{RECORD_KEY}` must be a record of averaged weights, got dict"),
        (lambda c: c.update({RECORD_KEY: [1]}), f"`{RECORD_KEY}` must be a record of averaged weights, got list"),
        (lambda c: c[RECORD_KEY].update(raw=[1]), f"`{RECORD_KEY}` must have tensors by name as `raw`, got list"),
        (
            lambda c: c[RECORD_KEY]["averages"].update(x={"a": 1}),
            f"`{RECORD_KEY}` must have tensors by name as `averag",
        ),
        (lambda c: c[RECORD_KEY].update(name=5), f"`{RECORD_KEY}` must have a text as `name`, got 5"),
        (lambda c: c[RECORD_KEY].update(state_dict="mean"), "`state_dict` must be one of 'average', 'raw', got 'mean'"),
        (lambda c: c[RECORD_KEY].update(version=True), f"`{RECORD_KEY}` must be of version 1, got True"),
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
    with pytest.raises(ValueError, match=r"state of EMA must be of version 1, got version 3 .* later release"):
        EMA(0.9).load_state_dict({"version": 3})


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


def test_a_file_with_objects_is_read_when_it_is_trusted(tmp_path):
    """Clients save their own classes as hyper-parameters."""
    module, ema = Net(), EMA(0.9)
    fit = trainer(ema)
    fit.fit(module, regression())
    fit.save_checkpoint(tmp_path / "full.ckpt")
    contents = torch.load(tmp_path / "full.ckpt", weights_only=True)
    torch.save(contents | {"hyper_parameters": {"loss": nn.MSELoss()}}, tmp_path / "object.ckpt")
    for which in ("raw", "average"):
        with pytest.raises(ValueError, match=r"MSELoss.*pass trust=True \(--trust on the command line\)"):
            extract_weights(tmp_path / "object.ckpt", which)
        found = extract_weights(tmp_path / "object.ckpt", which, trust=True)
        expected = extract_weights(tmp_path / "full.ckpt", which)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="pass trust=True"):
        describe_checkpoint(tmp_path / "object.ckpt")
    assert describe_checkpoint(tmp_path / "object.ckpt", trust=True)["beside"].keys() == {"raw weights"}


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
    assert "EMA(name='ema')" in found["callbacks"]
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


@pytest.mark.parametrize("updates", [None, 3])
def test_a_state_dict_that_a_sharded_strategy_has_consumed_is_no_average(updates):
    contents = Contents("average", "ema", updates=updates)
    assert fitting_average(torch.nn.Linear(2, 2), contents, "ema", None, strict=True) is None
