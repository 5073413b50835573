"""After a fit: whatever is written into the module is never taken for the average, which survives it."""

import copy
import itertools
import pickle
import sys
from pathlib import Path

import lightning.pytorch as unified
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_plugins
from lightning_plugins import EMA, ConstantDecay, PostHocEMA, WarmupDecay
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.ema.checkpoint_format import RECORD_KEY
from lightning_plugins.ema.digest import digest
from tests.support.ema_runs import THETA, WARMUP, Net, Scripted, clone_state, numbers, regression, same, trainer


def load_sevens(module):
    module.load_state_dict({name: torch.full_like(value, 7) for name, value in module.state_dict().items()})


def through_data(module):
    for parameter in module.parameters():
        parameter.data.fill_(7)


def other_memory(module):
    for parameter in module.parameters():
        parameter.data = torch.full_like(parameter, 7)


def signs(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.neg_()


def one_number(module):
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1e-6


def other_parameters(module):
    module.net[0] = nn.Linear(4, 8)


WAYS = [load_sevens, through_data, other_memory, signs, one_number, other_parameters]


@pytest.mark.parametrize("write", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", [{}, {"after_fit": "raw"}, {"checkpoint": "raw"}])
def test_a_file_saved_after_other_weights_were_loaded_is_a_plain_file(tmp_path, write, options):
    module, ema = Net(), EMA(0.9, **options)
    fit = trainer(ema, ModelCheckpoint(tmp_path, filename="last"), max_epochs=2)
    fit.fit(module, regression(), regression(8))
    average = ema.average_state_dict()
    write(module)
    held = clone_state(module)
    fit.save_checkpoint(tmp_path / "full.ckpt")
    fit.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for name in ("full.ckpt", "weights.ckpt"):
        found = torch.load(tmp_path / name, weights_only=True)
        assert same(dict(found["state_dict"]), held)
        assert RECORD_KEY not in found
    assert same(ema.average_state_dict(), average)
    start = {}

    class First(unified.Callback):
        def on_train_start(self, trainer, pl_module):
            start.update(clone_state(pl_module))

    again = EMA(0.9, **options)
    trainer(again, First(), max_epochs=3).fit(Net(), regression(), regression(8), ckpt_path=tmp_path / "full.ckpt")
    assert same(start, held)
    assert again.state_dict()["origin"] == 16


def test_the_average_survives_parts_that_are_taken_out_after_the_fit():
    """As adapters are that were merged into their weights."""
    module, ema = Net(), EMA(0.9)
    trainer(ema).fit(module, regression())
    average = ema.average_state_dict()
    module.net = nn.Sequential(*module.net[:2])
    assert same(ema.average_state_dict(), average)
    fresh = Net()
    fresh.load_state_dict(ema.average_state_dict())


def test_a_post_hoc_file_saved_after_other_weights_were_loaded_has_no_averages(tmp_path):
    module, post = Net(), PostHocEMA(every_n_steps=8, dirpath=tmp_path / "snapshots")
    fit = trainer(post, EMA(0.9), max_epochs=2)
    fit.fit(module, regression())
    fit.save_checkpoint(tmp_path / "with.ckpt")
    load_sevens(module)
    fit.save_checkpoint(tmp_path / "without.ckpt")
    assert "lightning_plugins_posthoc_ema" in torch.load(tmp_path / "with.ckpt", weights_only=True)
    assert "lightning_plugins_posthoc_ema" not in torch.load(tmp_path / "without.ckpt", weights_only=True)


@pytest.mark.parametrize("order", [1, -1])
def test_an_ema_and_a_post_hoc_one_go_on_in_a_second_fit(tmp_path, order):
    module, ema, post = Net(), EMA(0.9), PostHocEMA(every_n_steps=4, dirpath=tmp_path)
    for _ in range(2):
        trainer(*[ema, post][::order]).fit(module, regression())
    assert ema.state_dict()["last_update"] == post.state_dict()["last_update"] == 16


@pytest.mark.parametrize("after_fit", ["average", "raw"])
def test_the_final_average_is_still_there_after_a_test_of_the_best_file(tmp_path, after_fit):
    module, ema = Net(), EMA(0.9, after_fit=after_fit)
    fit = trainer(ema, ModelCheckpoint(tmp_path, monitor="val_loss", mode="max"), max_epochs=3)
    fit.fit(module, regression(), regression(8))
    average, before = ema.average_state_dict(), clone_state(module)
    fit.test(module, regression(8), ckpt_path="best", verbose=False)
    assert not same(clone_state(module), before)
    assert same(ema.average_state_dict(), average)  # batch statistics included


@pytest.mark.parametrize("how", ["on_train_end", "another callback"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_weights_written_as_the_training_ends_are_not_the_average(how, first):
    class Writes(Scripted):
        def on_train_end(self):
            if how == "on_train_end":
                self.weight.data.fill_(-1)

    class Writer(unified.Callback):
        def on_train_end(self, trainer, pl_module):
            if how == "another callback":
                pl_module.weight.data.fill_(-1)

    module, ema = Writes(), EMA(0.9)
    fit = trainer(*([Writer(), ema] if first else [ema, Writer()]))
    fit.fit(module, numbers(5))
    assert ema.average_state_dict()["weight"].item() == pytest.approx(WARMUP[4])
    written_before = first and how == "another callback"  # then it is the last of the training
    assert module.weight.item() == (pytest.approx(WARMUP[4]) if written_before else -1)
    fit.validate(module, numbers(1), verbose=False)
    assert module.seen == [pytest.approx(WARMUP[4]) if written_before else -1]


def test_a_compiled_module_is_the_same_module():
    module, ema = Net(), EMA(0.9, after_fit="raw")
    compiled = torch.compile(module, backend="eager")
    trainer(ema).fit(compiled, regression())
    raw = clone_state(module)
    with ema.averaged(compiled) as shown:
        assert shown is compiled
        assert same(clone_state(module), ema.average_state_dict())
    with ema.averaged(module):
        assert same(clone_state(module), ema.average_state_dict())
    assert same(clone_state(module), raw)


@pytest.mark.parametrize("after_fit", ["raw", "average"])
def test_an_evaluation_inside_a_block_does_not_end_it(after_fit):
    module, ema = Scripted(), EMA(0.9, after_fit=after_fit)
    fit = trainer(ema)
    fit.fit(module, numbers(5))
    held = module.weight.item()
    with ema.averaged(module):
        fit.validate(module, numbers(1), verbose=False)
        assert module.weight.item() == pytest.approx(WARMUP[4])
        with ema.averaged(module):
            fit.test(module, numbers(1), verbose=False)
        assert module.weight.item() == pytest.approx(WARMUP[4])
    assert module.weight.item() == held
    assert module.seen == pytest.approx([WARMUP[4]] * 2)


def test_a_fit_inside_a_block_is_refused():
    module, ema = Scripted(), EMA(0.9)
    trainer(ema).fit(module, numbers(5))
    with pytest.raises(MisconfigurationException, match="must not begin inside a `with` block"), ema.averaged(module):
        trainer(ema).fit(module, numbers(5))
    assert ema.raw_state_dict()["weight"].item() == THETA[4]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_notices_what_is_written_into_its_module(copied):
    module, ema = Net(), EMA(0.9)
    trainer(ema).fit(module, regression())
    module._trainer = None
    average = clone_state(module)
    twin, its = copied((module, ema))
    through_data(twin)
    with its.averaged(twin):
        assert next(twin.parameters()).flatten()[0].item() == 7
    assert same(its.average_state_dict(), average)
    with ema.averaged(module):
        assert same(clone_state(module), average)


def test_digest_tells_signs_orders_and_single_bits():
    base = torch.arange(-50.0, 50.0)
    others = [base.flip(0), -base, base.roll(1), base + torch.eye(100)[3] * 1e-5, base.double(), base.view(10, 10)]
    swapped = torch.stack([base[:50], base[50:]])
    others += [swapped[[1, 0]].view(-1), torch.where(base > 0, -base, base)]
    found = [digest([tensor]) for tensor in (base, *others)]
    assert len({str(each) for each in found}) == len(found)
    assert digest([base.clone()]) == found[0]
    for kind in (torch.float16, torch.bfloat16, torch.complex64, torch.float64):
        assert digest([base.to(kind)]) == digest([base.to(kind).clone()]) != digest([-base.to(kind)])
    assert digest([]) == []
    assert digest([torch.zeros(0)]) == digest([torch.zeros(0)])


@pytest.mark.parametrize("after_fit", ["average", "raw"])
def test_a_module_that_was_moved_after_its_fit_is_evaluated_with_the_average(after_fit):
    module, ema = Scripted(), EMA(0.9, after_fit=after_fit)
    fit = trainer(ema)
    fit.fit(module, numbers(5))
    # what `module.to(device)` does
    module.weight.data = module.weight.data.clone()
    fit.validate(module, numbers(1), verbose=False)
    assert module.seen == pytest.approx([WARMUP[4]], rel=1e-6)
    assert module.weight.item() == pytest.approx(WARMUP[4] if after_fit == "average" else THETA[4], rel=1e-6)


# -- states are checked like arguments


STATE = {"version": 1, "applied_steps": 5, "origin": 0, "last_update": 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"applied_steps": -1}, "`applied_steps` must be at least 0 steps, got -1"),
        ({"applied_steps": 2.5}, "`applied_steps` must be a whole number of steps, got 2.5"),
        (
            {"applied_steps": 10**15},
            "`last_update` must be at most the steps since .* got 5 with 1000000000000000 steps",
        ),
        ({"applied_steps": 10**30}, "`applied_steps` must be at most"),
        ({"origin": -2}, "`origin` must be at least -1 steps"),
        ({"origin": 4}, "`last_update` must be at most the steps since"),
        ({"origin": None}, "`origin` must be a whole number"),
        ({"last_update": 6}, "`last_update` must be at most the steps since"),
        ({"last_update": "5"}, "`last_update` must be a whole number"),
        ({"version": 2}, "state of EMA must be of version 1, got version 2"),
        ({"version": True}, "state of EMA must be of version 1, got version True"),
    ],
)
def test_counters_are_checked_like_arguments(change, message):
    ema = EMA(WarmupDecay(1.0))
    trainer(ema).fit(Scripted(), numbers(5))
    ema._fitting = True
    with pytest.raises((TypeError, ValueError), match=message):
        ema.load_state_dict({**STATE, **change})
    for name in STATE.keys() - {"version"}:
        with pytest.raises(ValueError, match=f"must have `{name}`, which is missing"):
            ema.load_state_dict({key: value for key, value in STATE.items() if key != name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"written": -1}, "`written` must be at least 0 steps"),
        ({"written": 99}, "`written` must be at most `last_update`"),
        ({"directory": 5}, "`directory` must be a path, got 5"),
        ({"directory": "a\0b"}, "`directory` must be a path that a file can have"),
        ({"run": "../x"}, "`run` must be a text of hexadecimal digits"),
        ({"began": {"w": -1}}, "`began` must be at least 1"),
        ({"began": [1]}, "`began` must be steps by name"),
        ({"first_names": {"w": 1}}, "`first_names` must be names by name"),
        ({"first_names": ["w"]}, "`first_names` must be names by name"),
    ],
)
def test_a_post_hoc_state_is_checked_like_arguments(tmp_path, change, message):
    post = PostHocEMA(every_n_steps=5, dirpath=tmp_path)
    trainer(post).fit(Scripted(), numbers(5))
    state = post.state_dict()
    post._fitting = True
    with pytest.raises((TypeError, ValueError), match=message):
        post.load_state_dict({**state, **change})


def test_the_state_of_the_first_release_is_read(tmp_path):
    """Its keys were spelled otherwise."""
    trainer(EMA(0.9), PostHocEMA(every_n_steps=5, dirpath=tmp_path), ModelCheckpoint(tmp_path, filename="x")).fit(
        Scripted(), numbers(5)
    )
    found = torch.load(tmp_path / "x.ckpt", weights_only=True)
    old = {"EMA(name='ema')": "EMA{'name': 'ema'}"}
    old["PostHocEMA(sigma_rels=(0.05, 0.1))"] = "PostHocEMA{'sigma_rels': (0.05, 0.1)}"
    for where in (found["callbacks"], found["lightning_plugins_posthoc_ema"]):
        for key in [key for key in where if key in old]:
            where[old[key]] = where.pop(key)
    torch.save(found, tmp_path / "old.ckpt")
    whole, resumed = EMA(0.9), EMA(0.9)
    trainer(whole, max_epochs=2).fit(Scripted(), numbers(5))
    post = PostHocEMA(every_n_steps=5, dirpath=tmp_path)
    trainer(resumed, post, max_epochs=2).fit(Scripted(), numbers(5), ckpt_path=tmp_path / "old.ckpt")
    assert resumed.state_dict() == whole.state_dict()
    assert same(resumed.average_state_dict(), whole.average_state_dict())
    assert post.state_dict()["last_update"] == 10


# -- the way through the house


def test_a_step_takes_few_calls_files_and_moves():
    """Half of what it took in the first release: 46 calls of functions in 10 files, and 20 moves between them."""
    root, calls, watching = str(Path(lightning_plugins.__file__).parent), [], []

    def note(frame, event, _):
        code = frame.f_code
        # without what stands for the idle profiler: Lightning calls it for every hook of every part
        if event == "call" and watching and code.co_filename.startswith(root) and code.co_name != "<lambda>":
            calls.append(code.co_filename)

    class Start(unified.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                watching.append(True)

    class Stop(unified.Callback):
        def on_train_batch_end(self, *args):
            watching.clear()

    before = sys.getprofile()
    try:
        sys.setprofile(note)
        trainer(Start(), EMA(ConstantDecay(0.9)), Stop()).fit(Net(), regression())
    finally:
        sys.setprofile(before)
    moves = sum(one != other for one, other in itertools.pairwise(calls))
    assert len(calls) <= 23
    assert len(set(calls)) <= 5
    assert moves <= 10
