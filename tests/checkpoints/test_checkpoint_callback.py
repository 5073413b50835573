"""The callback in real fits: what it averages, what it writes, and that nobody notices its comparison."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from torch import nn

from lightning_plugins import CheckpointAveraging, select_checkpoints
from lightning_plugins.checkpoints import plan_average, read_manifest
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.support import conditions
from tests.support.checkpoints_models import (
    NAMESPACES,
    VALIDATION,
    Regressor,
    assert_is_mean,
    float64_mean,
    load_state,
    loader,
    model_checkpoint,
    module_class,
    sources,
    trainer,
)


@pytest.mark.parametrize("name", NAMESPACES)
def test_the_default_model_checkpoint_keeps_one_so_own_files_are_written(tmp_path, name, said):
    namespace = NAMESPACES[name]
    averaging = CheckpointAveraging(last=3)
    module = module_class(namespace)()
    run = trainer(tmp_path, namespace, callbacks=[averaging], max_epochs=5)
    run.fit(module, loader(), **VALIDATION)

    assert averaging.path == tmp_path / "checkpoints" / "averaged.ckpt"
    pool = sorted((tmp_path / "checkpoints" / "averaged_pool").iterdir())
    assert [path.name for path in pool] == [f"epoch={e}-step={4 * (e + 1)}.ckpt" for e in (2, 3, 4)]
    assert sources(averaging.path) == pool
    assert_is_mean(load_state(averaging.path), float64_mean(pool))
    assert sum("of its own" in line for line in said) == 1
    content = torch.load(averaging.path, weights_only=True)
    assert content["hyper_parameters"] == {"width": 4, "batch_norm": False, "rate": 0.05}
    assert not {"optimizer_states", "callbacks", "lr_schedulers"} & set(content)

    loaded = type(module).load_from_checkpoint(averaging.path)
    assert_is_mean(loaded.state_dict(), float64_mean(pool))
    direct = run.validate(loaded, loader(seed=1), verbose=False)
    by_path = run.validate(module, loader(seed=1), ckpt_path=averaging.path, verbose=False)
    assert direct[0]["val_loss"] == by_path[0]["val_loss"] == pytest.approx(averaging.scores["average"], rel=1e-6)
    again = trainer(tmp_path / "again", namespace, max_epochs=1, enable_checkpointing=False)
    again.fit(loaded, loader(), **VALIDATION)  # training goes on from the averaged weights
    assert again.global_step == 4


@pytest.mark.parametrize("save_last", [None, True, "link"])
def test_the_last_files_that_model_checkpoint_kept_are_averaged(tmp_path, save_last):
    averaging = CheckpointAveraging(last=3, compare=False)
    checkpoint = model_checkpoint(tmp_path / "c", save_top_k=-1, save_last=save_last)
    trainer(tmp_path, callbacks=[averaging, checkpoint], max_epochs=5).fit(Regressor(), loader(), **VALIDATION)
    assert averaging.path == tmp_path / "c" / "averaged.ckpt"
    expected = [tmp_path / "c" / f"epoch={e}-step={4 * (e + 1)}.ckpt" for e in (2, 3, 4)]
    assert sources(averaging.path) == expected
    assert_is_mean(load_state(averaging.path), float64_mean(expected))
    assert not (tmp_path / "c" / "averaged_pool").exists()
    assert averaging.scores is None
    assert select_checkpoints(tmp_path / "c", last=3) == expected


def test_files_that_are_still_being_written_in_the_background_are_waited_for(tmp_path):
    io = NAMESPACES["lightning.pytorch"].plugins.io

    class Slow(io.TorchCheckpointIO):
        def save_checkpoint(self, *args, **kwargs):
            time.sleep(0.2)
            super().save_checkpoint(*args, **kwargs)

    averaging = CheckpointAveraging(last=2, compare=False)
    checkpoint = model_checkpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    options = {"plugins": [io.AsyncCheckpointIO(Slow())], "max_epochs": 2}
    trainer(tmp_path, callbacks=[averaging, checkpoint], **options).fit(Regressor(), loader(), **VALIDATION)
    assert sources(averaging.path) == [tmp_path / f"epoch={epoch}.ckpt" for epoch in range(2)]


def test_what_writes_files_is_not_closed_before_the_last_one(tmp_path):
    calls = []

    class Connected(NAMESPACES["lightning.pytorch"].plugins.io.TorchCheckpointIO):
        def save_checkpoint(self, *args, **kwargs):
            calls.append("save")
            super().save_checkpoint(*args, **kwargs)

        def teardown(self):
            calls.append("close")

    callbacks = [CheckpointAveraging(last=2), model_checkpoint(tmp_path, save_top_k=-1, save_last=True)]
    trainer(tmp_path, callbacks=callbacks, plugins=[Connected()], max_epochs=2).fit(Regressor(), loader(), **VALIDATION)
    assert "save" in calls
    assert "close" not in calls[:-1]
    assert callbacks[0].path is not None


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_files_are_averaged_by_the_record_of_model_checkpoint(tmp_path, mode):
    averaging = CheckpointAveraging(best=2)
    checkpoint = model_checkpoint(tmp_path, monitor="val_loss", mode=mode, save_top_k=4)
    run = trainer(tmp_path, callbacks=[checkpoint, averaging], max_epochs=5)
    run.fit(Regressor(), loader(), **VALIDATION)
    scores = {Path(path): float(score) for path, score in checkpoint.best_k_models.items()}
    expected = sorted(scores, key=scores.get, reverse=mode == "max")[:2]
    assert sorted(sources(averaging.path)) == sorted(expected)
    assert_is_mean(load_state(averaging.path), float64_mean(expected))
    assert averaging.scores["best_single"] == pytest.approx(scores[expected[0]], rel=1e-6)
    assert averaging.metric == "val_loss"
    assert sorted(select_checkpoints(tmp_path, best=2)) == sorted(expected)


def test_own_files_are_kept_by_score_when_model_checkpoint_keeps_fewer(tmp_path):
    averaging = CheckpointAveraging(best=2)
    checkpoint = model_checkpoint(tmp_path, monitor="val_loss")
    losses = {}

    class Spy(NAMESPACES["lightning.pytorch"].Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                losses[trainer.global_step] = float(trainer.callback_metrics["val_loss"])

    run = trainer(tmp_path, callbacks=[averaging, checkpoint, Spy()], max_epochs=6)
    run.fit(Regressor(rate=0.5), loader(), **VALIDATION)
    expected = sorted(losses, key=losses.get)[:2]
    steps = sorted(file["step"] for file in read_manifest(averaging.path)["files"])
    assert steps == sorted(expected)
    assert len(list((tmp_path / "averaged_pool").iterdir())) == 2
    assert averaging.scores["best_single"] == pytest.approx(losses[expected[0]], rel=1e-6)


def test_a_metric_logged_at_the_very_end_of_the_epoch_decides_by_its_own_epoch(tmp_path):
    class LateMetric(Regressor):
        def on_train_epoch_end(self):
            self.log("late", [5.0, 1.0, 4.0, 2.0][self.current_epoch])

    checkpoint = model_checkpoint(tmp_path, monitor="late")
    averaging = CheckpointAveraging(best=2)
    trainer(tmp_path, callbacks=[averaging, checkpoint]).fit(LateMetric(), loader(), **VALIDATION)
    assert [file["epoch"] for file in read_manifest(averaging.path)["files"]] == [1, 3]


@pytest.mark.parametrize("order", [0, 1])
def test_any_order_of_callbacks_gives_the_same_file(tmp_path, order):
    digests = []
    for folder, flip in (("a", False), ("b", True)):
        torch.manual_seed(order)
        callbacks = [CheckpointAveraging(last=2), model_checkpoint(tmp_path / folder, save_top_k=-1)]
        run = trainer(tmp_path, callbacks=callbacks[::-1] if flip else callbacks)
        run.fit(Regressor(), loader(), **VALIDATION)
        digests.append(read_manifest(tmp_path / folder / "averaged.ckpt")["digest"])
    assert digests[0] == digests[1]


def test_without_any_model_checkpoint_own_files_are_written(tmp_path):
    averaging = CheckpointAveraging(last=2)
    run = trainer(tmp_path, callbacks=[averaging], enable_checkpointing=False)
    run.fit(Regressor(), loader(), **VALIDATION)
    assert averaging.path == tmp_path / "checkpoints" / "averaged.ckpt"
    assert len(sources(averaging.path)) == 2


@pytest.mark.parametrize("form", ["tensor", "mapping"])
def test_compares_by_the_loss_that_validation_returns_when_nothing_is_logged(tmp_path, form):
    class Silent(Regressor):
        def validation_step(self, batch, batch_idx):
            loss = self._loss(batch)
            return loss if form == "tensor" else {"loss": loss}

    averaging = CheckpointAveraging(last=3)
    module = Silent()
    trainer(tmp_path, callbacks=[averaging, model_checkpoint(tmp_path, save_top_k=-1)]).fit(
        module, loader(), **VALIDATION
    )
    assert averaging.metric == "returned loss"
    averaged = Silent()
    averaged.load_state_dict(load_state(averaging.path))
    with torch.no_grad():
        losses = [averaged._loss(batch).item() for batch in VALIDATION["val_dataloaders"]]
    assert averaging.scores["average"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert "validation_step" not in vars(module)


def test_safetensors_and_absolute_outputs(tmp_path):
    output = tmp_path / "elsewhere" / "mean.safetensors"
    output.parent.mkdir()
    averaging = CheckpointAveraging(last=2, output=str(output))
    trainer(tmp_path, callbacks=[averaging]).fit(Regressor(batch_norm=True), loader(), **VALIDATION)
    assert averaging.path == output
    assert read_manifest(output)["replaced"] == ["net.1.running_mean", "net.1.running_var"]
    assert averaging.scores is not None
    assert not list(output.parent.glob(".*"))


def test_fast_dev_run_writes_nothing_and_is_no_error(tmp_path):
    averaging = CheckpointAveraging(last=2)
    trainer(tmp_path, callbacks=[averaging], fast_dev_run=True).fit(Regressor(), loader(), **VALIDATION)
    assert averaging.path is None
    assert list(tmp_path.rglob("*")) == []


def test_one_epoch_is_nothing_to_average(tmp_path, said):
    averaging = CheckpointAveraging()
    trainer(tmp_path, callbacks=[averaging], max_epochs=1).fit(Regressor(), loader(), **VALIDATION)
    assert averaging.path is None
    assert any("1 checkpoint(s) on disk, nothing to average" in line for line in said)


def test_hyper_parameters_of_foreign_classes_are_trusted_in_the_runs_own_files(tmp_path):
    class Holder(Regressor):
        def __init__(self, kind=nn.ReLU, **more):
            super().__init__(**more)
            self.save_hyperparameters()

    averaging = CheckpointAveraging(last=2)
    trainer(tmp_path, callbacks=[averaging]).fit(Holder(), loader(), **VALIDATION)
    assert torch.load(averaging.path, weights_only=False)["hyper_parameters"]["kind"] is nn.ReLU


def test_files_of_another_run_in_the_directory_are_left_alone(tmp_path):
    trainer(tmp_path, callbacks=[model_checkpoint(tmp_path / "c", save_top_k=-1)]).fit(
        Regressor(), loader(), **VALIDATION
    )
    old = {path: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    averaging = CheckpointAveraging(last=8, compare=False)
    torch.manual_seed(1)
    checkpoint = model_checkpoint(tmp_path / "c", save_top_k=-1)
    trainer(tmp_path, callbacks=[averaging, checkpoint], max_epochs=2).fit(Regressor(), loader(), **VALIDATION)
    names = {path.name for path in sources(averaging.path)}
    assert names == {"epoch=0-step=4-v1.ckpt", "epoch=1-step=8-v1.ckpt"}
    assert all(path.read_bytes() == content for path, content in old.items())


def test_damaged_files_do_not_end_a_run(tmp_path):
    """One that lay there before is another run's; one that a kill cut off in this run is left out with a warning."""

    class Cutter(NAMESPACES["lightning.pytorch"].Callback):
        def on_train_end(self, trainer, pl_module):
            file = tmp_path / "epoch=2-step=12.ckpt"
            file.write_bytes(file.read_bytes()[:500])

    (tmp_path / "old.ckpt").write_bytes(b"PK\x03\x04 cut off")
    averaging = CheckpointAveraging(last=3)
    callbacks = [Cutter(), averaging, model_checkpoint(tmp_path, save_top_k=-1)]
    with pytest.warns(LightningPluginsWarning, match=r"Left out, as they cannot be read: epoch=2-step=12\.ckpt\."):
        trainer(tmp_path, callbacks=callbacks).fit(Regressor(), loader(), **VALIDATION)
    assert [file["epoch"] for file in read_manifest(averaging.path)["files"]] == [0, 1, 3]


class Crash(Regressor):
    at_epoch = -1

    def on_train_epoch_start(self):
        if self.current_epoch == self.at_epoch:
            raise RuntimeError("crash")


@pytest.mark.parametrize(("save_top_k", "resume_from"), [(1, "newest"), (-1, "newest"), (-1, "older")])
def test_a_crashed_and_resumed_run_writes_what_an_uninterrupted_one_would(tmp_path, save_top_k, resume_from):
    def fit(folder, crash_at=-1, ckpt_path=None):
        torch.manual_seed(0)
        module = Crash()
        module.at_epoch = crash_at
        averaging = CheckpointAveraging(last=4)
        callbacks = [averaging, model_checkpoint(tmp_path / folder, save_top_k=save_top_k)]
        run = trainer(tmp_path, callbacks=callbacks, max_epochs=5)
        run.fit(module, loader(), **VALIDATION, ckpt_path=ckpt_path)
        return averaging

    whole = fit("whole")
    with pytest.raises(RuntimeError, match="crash"):
        fit("crashed", crash_at=3)
    (newest,) = (tmp_path / "crashed").glob("epoch=2*.ckpt")
    older = tmp_path / "crashed" / "epoch=1-step=8.ckpt"
    resumed = fit("crashed", ckpt_path=newest if resume_from == "newest" else older)
    steps = [[file["step"] for file in read_manifest(a.path)["files"]] for a in (whole, resumed)]
    assert steps[0] == steps[1] == [8, 12, 16, 20]
    assert read_manifest(resumed.path)["digest"] == read_manifest(whole.path)["digest"]
    assert resumed.scores == whole.scores


def test_lost_files_of_the_future_are_not_averaged(tmp_path):
    """Resumed from epoch 1 with other data, the run writes epoch=2-...-v1 beside the lost future's epoch=2."""
    callbacks = lambda: [CheckpointAveraging(last=3, compare=False), model_checkpoint(tmp_path, save_top_k=-1)]  # noqa: E731
    trainer(tmp_path, callbacks=callbacks(), max_epochs=4).fit(Regressor(), loader(), **VALIDATION)
    (start,) = tmp_path.glob("epoch=1*.ckpt")
    second = callbacks()
    trainer(tmp_path, callbacks=second, max_epochs=3).fit(Regressor(), loader(seed=9), **VALIDATION, ckpt_path=start)
    names = [path.name for path in sources(second[0].path)]
    assert names == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt", "epoch=2-step=12-v1.ckpt"]


def test_a_second_fit_goes_on(tmp_path):
    averaging = CheckpointAveraging(last=4)
    module = Regressor()
    run = trainer(tmp_path, callbacks=[averaging], max_epochs=2)
    run.fit(module, loader(), **VALIDATION)
    run.fit_loop.max_epochs = 4
    run.fit(module, loader(), **VALIDATION)
    assert [file["epoch"] for file in read_manifest(averaging.path)["files"]] == [0, 1, 2, 3]


@conditions.ema_weight_averaging
def test_with_ema_the_files_state_dict_is_averaged_and_that_is_said(tmp_path, said):
    averaging = CheckpointAveraging(last=2, compare=False)
    checkpoint = model_checkpoint(tmp_path, save_top_k=-1)
    trainer(tmp_path, callbacks=[averaging, checkpoint, lightning_callbacks.EMAWeightAveraging(decay=0.5)]).fit(
        Regressor(), loader(), **VALIDATION
    )
    note = "a second set of weights (`current_model_state`) lies beside `state_dict`, which is averaged"
    assert said.count(f"CheckpointAveraging: the run has an EMA; {note}.") == 1
    assert read_manifest(averaging.path)["ema"] == note
    files = sources(averaging.path)
    assert plan_average(files).notes == [f"A run with an EMA: {note}."]
    assert_is_mean(load_state(averaging.path), float64_mean(files))
    assert "current_model_state" in torch.load(files[0], weights_only=False)
    assert not {"current_model_state", "averaging_state"} & set(torch.load(averaging.path))
