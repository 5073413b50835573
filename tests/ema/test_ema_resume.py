"""A run that dies and is resumed is the run that would have been."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as unified
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_plugins import EMA, ConstantDecay, InverseGammaDecay, PostHocEMA, PowerDecay, extract_weights
from lightning_plugins.ema import describe_checkpoint
from lightning_plugins.ema.snapshots import list_snapshots
from tests.support import conditions
from tests.support.ema_runs import (
    THETA,
    ClassicNet,
    Net,
    Scripted,
    clone_state,
    numbers,
    regression,
    same,
    trainer,
)
from tests.support.snippets import python_path


class Cut(unified.Callback):
    """Writes a file at a certain moment and dies a little later."""

    def __init__(self, path, save, die):
        self.path, self.save, self.die = path, save, die

    def _meet(self, trainer, where, batch_idx):
        moment = (where, trainer.current_epoch, batch_idx)
        if moment == self.save:
            trainer.save_checkpoint(self.path)
        if moment == self.die:
            raise RuntimeError("killed")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._meet(trainer, "train", batch_idx)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._meet(trainer, "val", batch_idx)


def decays():
    return [
        EMA(0.9),
        EMA(InverseGammaDecay(), update_every_n_steps=3),
        EMA(PowerDecay(0.1), start_step=4),
        EMA(ConstantDecay(0.8), buffers="average", checkpoint="raw"),
    ]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize(
    ("save", "die"),
    [
        (("train", 1, 7), ("val", 1, 1)),  # the file is from the epoch's end, the crash in its validation
        (("train", 1, 7), ("train", 2, 4)),
    ],
)
def test_resume_from_an_epoch_boundary_is_bit_for_bit(tmp_path, which, save, die):
    def run(*callbacks, crash=False, **kwargs):
        torch.manual_seed(0)
        module, ema = Net(), decays()[which]
        fit = trainer(*callbacks, ema, max_epochs=4)
        if crash:
            with pytest.raises(RuntimeError, match="killed"):
                fit.fit(module, regression(), regression(8))
        else:
            fit.fit(module, regression(), regression(8), **kwargs)
        return ema, module

    class AtEpochEnd(Cut):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(self.path)

    whole, _ = run()
    run(AtEpochEnd(tmp_path / "cut.ckpt", None, die), crash=True)
    before = extract_weights(tmp_path / "cut.ckpt", "raw")
    resumed, _ = run(ckpt_path=tmp_path / "cut.ckpt")
    assert same(resumed.average_state_dict(), whole.average_state_dict())
    assert same(resumed.raw_state_dict(), whole.raw_state_dict())
    assert resumed.state_dict() == whole.state_dict()
    assert not same(before, whole.raw_state_dict())


@pytest.mark.parametrize(
    ("save", "die", "window"),
    [
        (("train", 0, 2), ("train", 0, 3), 1),  # in mid-epoch
        (("train", 0, 4), ("train", 1, 0), 2),  # in mid-window
        (("val", 0, 0), ("val", 0, 0), 1),  # in validation, the average in the module
        (("val", 0, 0), ("train", 1, 1), 3),
    ],
)
@pytest.mark.parametrize("every", [1, 2])
def test_resume_from_anywhere_continues_the_average(tmp_path, save, die, window, every):
    """The weights are scripted by the optimizer's own step, so the loader's position does not matter."""

    def make():
        return Scripted(), EMA(0.9, update_every_n_steps=every)

    def settings():
        return {"accumulate_grad_batches": window, "max_steps": 8, "max_epochs": -1}

    whole_module, whole = make()
    trainer(whole, **settings()).fit(whole_module, numbers(6), numbers(2))
    module, ema = make()
    with pytest.raises(RuntimeError, match="killed"):
        trainer(Cut(tmp_path / "cut.ckpt", save, die), ema, **settings()).fit(module, numbers(6), numbers(2))
    assert module.weight.item() in THETA  # raw again
    module, ema = make()
    trainer(ema, **settings()).fit(module, numbers(6), numbers(2), ckpt_path=tmp_path / "cut.ckpt")
    assert ema.raw_state_dict()["weight"].item() == THETA[7]
    assert torch.equal(ema.average_state_dict()["weight"], whole.average_state_dict()["weight"])
    assert ema.state_dict() == whole.state_dict()


def test_resume_across_the_two_namespaces(tmp_path):
    import pytorch_lightning as classic

    torch.manual_seed(0)
    whole = EMA(0.9)
    trainer(whole, max_epochs=2).fit(Net(), regression())
    torch.manual_seed(0)
    trainer(EMA(0.9), ModelCheckpoint(tmp_path, filename="half"), max_epochs=1).fit(Net(), regression())
    resumed = EMA(0.9)
    trainer(resumed, trainer_class=classic.Trainer, max_epochs=2).fit(
        ClassicNet(), regression(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert same(resumed.average_state_dict(), whole.average_state_dict())


def test_resume_compiled_from_plain(tmp_path):
    torch.manual_seed(0)
    trainer(EMA(0.9, checkpoint="raw"), ModelCheckpoint(tmp_path, filename="half"), max_epochs=1).fit(
        Net(), regression()
    )
    contents = torch.load(tmp_path / "half.ckpt", weights_only=True)
    module, ema = Net(), EMA(0.9, checkpoint="raw")
    module.net[0] = torch.compile(module.net[0], backend="aot_eager")
    contents["state_dict"] = dict(zip(module.state_dict(), contents["state_dict"].values(), strict=True))
    torch.save(contents, tmp_path / "half.ckpt")
    seen = {}

    class Look(unified.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update(ema.average_state_dict())

    trainer(ema, Look(), max_epochs=2).fit(module, regression(), ckpt_path=tmp_path / "half.ckpt")
    expected = contents["lightning_plugins_ema"]["averages"]["ema"]
    assert torch.equal(seen["net.0._orig_mod.weight"], expected["net.0.weight"])


PROGRAM = """
import sys, time, lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_plugins import EMA
from tests.support.ema_runs import Net, regression, trainer
import torch
torch.manual_seed(0)
class Slow(L.Callback):
    def on_validation_batch_start(self, trainer, pl_module, *args):
        print("validating", trainer.current_epoch, flush=True)
        if trainer.current_epoch == 2:
            time.sleep(60)
trainer(EMA(0.9), Slow(), ModelCheckpoint(sys.argv[1], filename="{epoch}", save_top_k=-1), max_epochs=4).fit(
    Net(), regression(), regression(8))
"""


def test_resume_after_a_real_kill(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": python_path(root), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=root, env=environment, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    try:
        for line in process.stdout:
            if line.startswith("validating 2") or time.monotonic() > deadline:
                break
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=20) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    torch.manual_seed(0)
    whole = EMA(0.9)
    trainer(whole, max_epochs=4).fit(Net(), regression(), regression(8))
    resumed = EMA(0.9)
    trainer(resumed, max_epochs=4).fit(Net(), regression(), regression(8), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same(resumed.average_state_dict(), whole.average_state_dict())
    assert same(resumed.raw_state_dict(), whole.raw_state_dict())


@pytest.mark.parametrize("file_format", ["torch", "safetensors"])
def test_post_hoc_snapshots_of_a_resumed_run_are_the_same(tmp_path, file_format):
    def run(where, *callbacks, crash=None, **kwargs):
        torch.manual_seed(0)
        module = Net()
        module.crash = crash
        post = PostHocEMA(every_n_steps=5, dirpath=tmp_path / where, file_format=file_format)
        fit = trainer(post, *callbacks, max_epochs=3)
        if crash:
            with pytest.raises(RuntimeError, match="killed"):
                fit.fit(module, regression(), regression(8))
        else:
            fit.fit(module, regression(), regression(8), **kwargs)
        return [snapshot.step for snapshot in list_snapshots(tmp_path / where)]

    assert run("whole") == [5, 10, 15, 20, 24]
    assert run("killed", ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), crash=("train", 1, 5)) == [5, 10]
    assert run("killed", ckpt_path=tmp_path / "epoch=0.ckpt") == [5, 10, 15, 20, 24]
    assert (tmp_path / "killed" / "superseded-1").is_dir()  # the step-10 snapshot of the run that died
    for a, b in zip(list_snapshots(tmp_path / "whole"), list_snapshots(tmp_path / "killed"), strict=True):
        assert a.sigma_rels == b.sigma_rels
        for x, y in zip(a.read().averages, b.read().averages, strict=True):
            assert same(x, y)
        assert same(a.read().rest, b.read().rest)


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("other", [[], [EMA(0.5, name="other")]], ids=["plain file", "another average's file"])
def test_an_average_that_has_not_begun_is_in_no_file_whenever_the_weights_are_restored(tmp_path, late, other):
    class Strategy(SingleDeviceStrategy):
        restore_checkpoint_after_setup = late

    trainer(Cut(tmp_path / "first.ckpt", ("train", 0, 1), None), *copy.deepcopy(other)).fit(Scripted(), numbers(5))
    again = Cut(tmp_path / "early.ckpt", ("train", 0, 3), None)
    ema = EMA(0.9, start_step=5)
    trainer(ema, again, strategy=Strategy()).fit(Scripted(), numbers(8), ckpt_path=tmp_path / "first.ckpt")
    assert describe_checkpoint(tmp_path / "early.ckpt")["beside"] == {}
    assert ema.state_dict()["origin"] == 5


def test_state_is_unchanged_by_saving(tmp_path):
    module, ema = Net(), EMA(0.9)
    fit = trainer(ema)
    fit.fit(module, regression())
    before = clone_state(module)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    assert same(clone_state(module), before)


def test_a_run_that_died_at_its_very_end_ends_when_it_is_resumed(tmp_path):
    """Lightning trains nothing then and calls neither ``on_train_start`` nor ``on_train_end``."""

    class Death(unified.Callback):
        def on_train_end(self, trainer, pl_module):
            raise RuntimeError("killed")

    def run(where, *callbacks, **kwargs):
        torch.manual_seed(0)
        module, ema = Net(), EMA(0.9)
        post = PostHocEMA(every_n_steps=7, dirpath=tmp_path / where)
        saving = ModelCheckpoint(tmp_path / where / "files", filename="{epoch}", save_top_k=-1)
        fit = trainer(*callbacks, ema, post, saving, max_epochs=2)
        fit.fit(module, regression(), regression(8), **kwargs)
        assert "run" not in vars(fit.fit_loop)
        return module, ema

    module, ema = run("whole")
    with pytest.raises(RuntimeError, match="killed"):
        run("broken", Death())
    assert [snapshot.step for snapshot in list_snapshots(tmp_path / "broken")] == [7, 14]
    resumed, again = run("broken", ckpt_path=tmp_path / "broken" / "files" / "epoch=1.ckpt")
    assert same(clone_state(resumed), clone_state(module))  # the average, as `after_fit` says
    assert same(again.raw_state_dict(), ema.raw_state_dict())
    assert not same(again.raw_state_dict(), clone_state(module))
    pairs = list(zip(list_snapshots(tmp_path / "whole"), list_snapshots(tmp_path / "broken"), strict=True))
    assert [one.step for one, _ in pairs] == [7, 14, 16]
    assert all(same(a, b) for one, two in pairs for a, b in zip(one.read().averages, two.read().averages, strict=True))


@conditions.save_on_exception
def test_a_file_that_is_written_as_a_run_dies_lacks_no_step(tmp_path):
    """The exception comes after the optimizer's step and before the average's turn."""

    class Death(unified.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                raise RuntimeError("killed")

    def run(*callbacks, **kwargs):
        torch.manual_seed(0)
        ema, post = EMA(0.9), PostHocEMA(every_n_steps=5, dirpath=tmp_path / "posthoc")
        trainer(*callbacks, ema, post, **kwargs).fit(Net(), regression())
        return ema

    with pytest.raises(RuntimeError, match="killed"):
        run(Death(), ModelCheckpoint(tmp_path, filename="{step}", save_on_exception=True))
    assert [snapshot.step for snapshot in list_snapshots(tmp_path / "posthoc")] == [5]
    whole = run(max_steps=5)
    assert same(extract_weights(tmp_path / "step=5.ckpt"), whole.average_state_dict())
    assert same(extract_weights(tmp_path / "step=5.ckpt", "raw"), whole.raw_state_dict())
