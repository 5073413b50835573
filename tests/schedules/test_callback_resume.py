"""Resuming: the resumed run is the run that would have been, also with another horizon or from a foreign checkpoint."""

import logging

import lightning.pytorch as unified
import pytest
import torch

from lightning_plugins import LearningRateScheduler, Linear, WarmupCosine, WarmupLinear
from lightning_plugins.core.lightning import CallbackOfBoth
from tests.support.training import loader, make_module, make_trainer, rates

# Plain Lightning does not fast-forward a loader without state; rates do not depend on the data.
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


class Crash(CallbackOfBoth):
    """Saves a checkpoint after ``step`` steps and dies."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)
            raise RuntimeError("killed")


def fit(path, callbacks, *, module=None, ckpt_path=None, namespace=unified, **options):
    module = module or make_module(namespace)
    trainer = make_trainer(path, namespace, callbacks=callbacks, **options)
    trainer.fit(module, loader(10), ckpt_path=ckpt_path)
    return rates(module)


def crashed(path, step, callbacks, *, module=None, **options):
    """Run until ``step``, die, and return the checkpoint."""
    checkpoint = path / "crash.ckpt"
    with pytest.raises(RuntimeError, match="killed"):
        fit(path, [*callbacks, Crash(checkpoint, step)], module=module, **options)
    return checkpoint


@pytest.mark.parametrize("step", [3, 10, 14])  # in the first epoch, at its end, in the second
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_uses_the_rates_of_an_uninterrupted_one(tmp_path, namespace, step, accumulate):
    def ours():
        return LearningRateScheduler(WarmupCosine("20%"))

    options = {"max_epochs": 4, "accumulate_grad_batches": accumulate, "namespace": namespace}
    whole = fit(tmp_path, [ours()], **options)
    checkpoint = crashed(tmp_path, step // accumulate, [ours()], **options)
    assert fit(tmp_path, [ours()], ckpt_path=checkpoint, **options) == whole[step // accumulate :]
    # and the comparison would notice a state that is not restored
    assert fit(tmp_path, [ours()], **options)[: len(whole) - step // accumulate] != whole[step // accumulate :]


def test_a_longer_horizon_is_followed_from_the_first_step(tmp_path):
    checkpoint = crashed(tmp_path, 10, [LearningRateScheduler(WarmupCosine(2))], max_epochs=1)
    resumed = fit(tmp_path, [LearningRateScheduler(WarmupCosine(2))], max_epochs=3, ckpt_path=checkpoint)
    longer = WarmupCosine(2, total=30)
    assert resumed == pytest.approx([0.1 * longer(step) for step in range(10, 30)])
    assert resumed[0] > 0.05  # the old curve had ended at 0


def test_a_different_accumulation_after_the_resume_counts_only_from_there_and_goes_on_continuously(tmp_path):
    checkpoint = crashed(tmp_path, 10, [LearningRateScheduler(Linear(None, 1, 0))], max_epochs=3)
    resumed = fit(
        tmp_path,
        [LearningRateScheduler(Linear(None, 1, 0))],
        max_epochs=3,
        accumulate_grad_batches=5,
        ckpt_path=checkpoint,
    )
    # 10 of 30 steps are taken, 2 epochs of 2 are to come: they take the rate from 2/3 to the end
    assert resumed == pytest.approx([0.1 * 2 / 3 * (1 - step / 4) for step in range(4)])


def test_the_base_rate_is_the_checkpoints_unless_given(tmp_path):
    checkpoint = crashed(tmp_path, 10, [LearningRateScheduler(Linear(20, 1, 0))], max_epochs=2)
    schedule = Linear(20, 1, 0)

    def resume(**options):
        callback = LearningRateScheduler(schedule, **options)
        return fit(tmp_path, [callback], module=make_module(lr=0.7), max_epochs=2, ckpt_path=checkpoint)

    assert resume() == pytest.approx([0.1 * schedule(step) for step in range(10, 20)])
    assert resume(base_lr=0.3) == pytest.approx([0.3 * schedule(step) for step in range(10, 20)])


def test_added_to_a_run_that_had_none_it_starts_at_the_steps_already_taken(tmp_path, caplog):
    checkpoint = crashed(tmp_path, 14, [], max_epochs=2)
    with caplog.at_level(logging.INFO):
        resumed = fit(tmp_path, [LearningRateScheduler(WarmupLinear(4))], max_epochs=2, ckpt_path=checkpoint)
    schedule = WarmupLinear(4, total=20)
    assert resumed == pytest.approx([0.1 * schedule(step) for step in range(14, 20)])
    assert "joins a run that has taken 14 steps" in caplog.text


# Lightning names every callback whose state it found and that is not there any more
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_removed_from_a_resumed_run_the_rate_stays(tmp_path):
    checkpoint = crashed(tmp_path, 10, [LearningRateScheduler(Linear(20, 1, 0))], max_epochs=2)
    resumed = fit(tmp_path, [], max_epochs=2, ckpt_path=checkpoint)
    assert resumed == pytest.approx([0.05] * 10)


def test_a_foreign_schedulers_state_is_recognized_and_not_loaded(tmp_path, caplog):
    def halving(optimizer):
        return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5), "interval": "step"}

    checkpoint = crashed(tmp_path, 10, [], module=make_module(scheduler=halving), max_epochs=2)
    with caplog.at_level(logging.INFO):
        resumed = fit(
            tmp_path,
            [LearningRateScheduler(Linear(None, 1, 0), existing="replace")],
            module=make_module(scheduler=halving),
            max_epochs=2,
            ckpt_path=checkpoint,
        )
    schedule = Linear(20, 1, 0)
    assert resumed == pytest.approx([0.1 * schedule(step) for step in range(10, 20)])
    assert "does not load the state of the scheduler that was here before it" in caplog.text


def test_our_state_is_plain_and_small(tmp_path):
    checkpoint = crashed(tmp_path, 10, [LearningRateScheduler(Linear(20, 1, 0))], max_epochs=2)
    loaded = torch.load(checkpoint, weights_only=True)
    assert loaded["lr_schedulers"] == [{"format": "lightning_plugins.ScheduleLR", "version": 1, "position": 10}]
    ahead = {
        "batches_per_epoch": 10,
        "accumulation": [[0, 1]],
        "unit": "epoch",
        "carry": False,
        "stands": [0, 0, 0],
    }
    assert loaded["callbacks"] == {
        "LearningRateScheduler(optimizer=None)": {
            "version": 1,
            "run": {"curve": ahead, "latest": None, "begin": 0, "position": 0.0},
        }
    }


def test_a_checkpoint_written_after_the_fit_resumes(tmp_path):
    module = make_module()
    trainer = make_trainer(tmp_path, callbacks=[LearningRateScheduler(Linear(None, 1, 0))])
    trainer.fit(module, loader(10))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    resumed = fit(
        tmp_path, [LearningRateScheduler(Linear(None, 1, 0))], max_epochs=2, ckpt_path=tmp_path / "after.ckpt"
    )
    assert resumed == pytest.approx([0.1 * Linear(20, 1, 0)(step) for step in range(10, 20)])


@pytest.mark.parametrize(("written", "read"), [(0, 1), (1, 0)])
def test_resumes_across_the_two_namespaces(tmp_path, written, read):
    import pytorch_lightning

    names = (unified, pytorch_lightning)
    checkpoint = crashed(
        tmp_path, 10, [LearningRateScheduler(Linear(20, 1, 0))], max_epochs=2, namespace=names[written]
    )
    resumed = fit(
        tmp_path,
        [LearningRateScheduler(Linear(20, 1, 0))],
        max_epochs=2,
        namespace=names[read],
        ckpt_path=checkpoint,
    )
    assert resumed == pytest.approx([0.1 * Linear(20, 1, 0)(step) for step in range(10, 20)])
