"""Which files an average is made of: those in ModelCheckpoint's own record, whatever their folder and name."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_plugins import CheckpointAveraging, select_checkpoints
from lightning_plugins.checkpoints import plan_average, read_manifest
from lightning_plugins.core.validation import LightningPluginsWarning
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

LIGHTNING = NAMESPACES["lightning.pytorch"]


class Slashed(Regressor):
    """Logs under a name with a slash; ``factor`` makes the loss the same in its first digits, or not."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self._loss(batch))


def kept(checkpoint) -> dict[Path, float]:
    return {Path(path): float(score) for path, score in checkpoint.best_k_models.items()}


@pytest.mark.parametrize("filename", ["{epoch}-{val/loss:.2f}", "{epoch}/{step}", "deep/er/{epoch}", "{epoch}/same"])
@pytest.mark.parametrize("first", [True, False])
def test_the_best_lie_where_model_checkpoint_says_sub_folders_included(tmp_path, filename, first):
    """With "{epoch}/same" all files have one bare name, so that scores cannot go by it."""
    averaging = CheckpointAveraging(best=3)
    saving = model_checkpoint(tmp_path, monitor="val/loss", save_top_k=4, filename=filename)
    callbacks = [averaging, saving] if first else [saving, averaging]
    trainer(tmp_path, callbacks=callbacks, max_epochs=6).fit(Slashed(rate=0.3), loader(), **VALIDATION)
    scores = kept(saving)
    assert len(scores) == 4
    expected = sorted(scores, key=scores.get)[:3]
    assert sorted(sources(averaging.path)) == sorted(expected)
    assert_is_mean(load_state(averaging.path), float64_mean(expected))
    assert averaging.scores["best_single"] == pytest.approx(scores[expected[0]], rel=1e-6)
    assert sorted(select_checkpoints(tmp_path, best=3)) == sorted(expected)
    assert sorted(plan_average([tmp_path], best=3).paths) == sorted(expected)


def test_the_last_lie_in_sub_folders_too(tmp_path):
    averaging = CheckpointAveraging(last=3, compare=False)
    saving = model_checkpoint(tmp_path, save_top_k=-1, filename="{epoch}-{val/loss:.2f}")
    trainer(tmp_path, callbacks=[averaging, saving], max_epochs=5).fit(Slashed(), loader(), **VALIDATION)
    assert [file["epoch"] for file in read_manifest(averaging.path)["files"]] == [2, 3, 4]
    assert {path.parent.parent for path in sources(averaging.path)} == {tmp_path}
    assert select_checkpoints(tmp_path, last=3) == sources(averaging.path)


def test_other_checkpoints_below_a_directory_are_not_meant(tmp_path):
    """A sub-folder of another run, and the average's own pool."""
    trainer(tmp_path, callbacks=[model_checkpoint(tmp_path / "other", save_top_k=-1)]).fit(
        Regressor(), loader(), **VALIDATION
    )
    averaging = CheckpointAveraging(last=2, compare=False)
    trainer(tmp_path, callbacks=[averaging, model_checkpoint(tmp_path)]).fit(Regressor(), loader(), **VALIDATION)
    assert (tmp_path / "averaged_pool").is_dir()
    assert [path.parent for path in select_checkpoints(tmp_path)] == [tmp_path]


class Adds(LIGHTNING.Callback):
    """Brings a ModelCheckpoint of its own, as frameworks around Lightning do."""

    def __init__(self, hook, saving):
        self.hook, self.saving = hook, saving

    def setup(self, trainer, pl_module, stage):
        if self.hook == "setup":
            trainer.callbacks.append(self.saving)

    def on_fit_start(self, trainer, pl_module):
        if self.hook == "on_fit_start":
            trainer.callbacks.append(self.saving)


@pytest.mark.parametrize("hook", ["setup", "on_fit_start"])
@pytest.mark.parametrize("first", [True, False])
def test_a_model_checkpoint_that_another_callback_adds_is_followed(tmp_path, hook, first):
    saving = model_checkpoint(tmp_path, monitor="val_loss", save_top_k=3)
    averaging, adds = CheckpointAveraging(best=2, compare=False), Adds(hook, saving)
    callbacks = [averaging, adds] if first else [adds, averaging]
    run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=False)
    run.fit(Regressor(), loader(), **VALIDATION)
    scores = kept(saving)
    assert sorted(sources(averaging.path)) == sorted(sorted(scores, key=scores.get)[:2])


def test_a_model_checkpoint_of_the_modules_own_is_followed(tmp_path):
    saving = model_checkpoint(tmp_path, monitor="val_loss", save_top_k=3)

    class Configures(Regressor):
        def configure_callbacks(self):
            return [saving]

    averaging = CheckpointAveraging(best=2, compare=False)
    trainer(tmp_path, callbacks=[averaging], enable_checkpointing=False).fit(Configures(), loader(), **VALIDATION)
    assert set(sources(averaging.path)) <= set(kept(saving))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_of_several_the_one_that_keeps_enough_is_followed(tmp_path, flip, together):
    few = model_checkpoint(tmp_path / "best", monitor="val_loss", save_top_k=1, filename="best-{epoch}")
    many = model_checkpoint(tmp_path / ("best" if together else "all"), save_top_k=-1, filename="all-{epoch}")
    savings = [many, few] if flip else [few, many]
    averaging = CheckpointAveraging(last=3, compare=False)
    trainer(tmp_path, callbacks=[averaging, *savings], max_epochs=5).fit(Regressor(), loader(), **VALIDATION)
    assert averaging.path.parent == Path(many.dirpath)
    manifest = read_manifest(averaging.path)
    assert [file["epoch"] for file in manifest["files"]] == [2, 3, 4]


def test_of_two_metrics_the_first_that_keeps_enough_ranks(tmp_path):
    class Two(Regressor):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("rising", float(self.current_epoch))

    by_loss = model_checkpoint(tmp_path / "loss", monitor="val_loss", save_top_k=1)
    by_rising = model_checkpoint(tmp_path / "rising", monitor="rising", mode="max", save_top_k=2)
    averaging = CheckpointAveraging(best=2, compare=False)
    trainer(tmp_path, callbacks=[by_loss, averaging, by_rising], max_epochs=5).fit(Two(), loader(), **VALIDATION)
    assert [file["epoch"] for file in read_manifest(averaging.path)["files"]] == [3, 4]
    assert averaging.path.parent == tmp_path / "rising"


def test_nothing_to_average_names_the_directory(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("lightning_plugins.checkpoints.callback.rank_zero_info", said.append)
    saving = model_checkpoint(tmp_path / "kept", save_top_k=-1, every_n_epochs=9)
    trainer(tmp_path, callbacks=[CheckpointAveraging(), saving]).fit(Regressor(), loader(), **VALIDATION)
    assert f"0 checkpoint(s) on disk, nothing to average, in {tmp_path / 'kept'}." in said[-1]


def test_an_empty_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"needed, found 0 in {tmp_path}"):
        plan_average([tmp_path])
    with pytest.raises(ValueError, match=f"`best` needs checkpoints, and there are none in {tmp_path}"):
        select_checkpoints(tmp_path, best=2)
    with pytest.warns(LightningPluginsWarning, match=f"5 checkpoints were asked for, 0 found in {tmp_path}"):
        assert select_checkpoints(tmp_path, last=5) == []


# --- resumed ---


class Crash(Regressor):
    at_epoch = -1

    def on_train_epoch_start(self):
        if self.current_epoch == self.at_epoch:
            raise RuntimeError("crash")


def fit(folder, saving, crash_at=-1, last=4, **options):
    torch.manual_seed(0)
    module = Crash()
    module.at_epoch = crash_at
    averaging = CheckpointAveraging(last=last, compare=False)
    trainer(folder, callbacks=[averaging, saving], max_epochs=5).fit(module, loader(), **VALIDATION, **options)
    return averaging


def crashed(folder, saving):
    with pytest.raises(RuntimeError, match="crash"):
        fit(folder, saving, crash_at=3)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("save_on_train_epoch_end", [True, False])
@pytest.mark.parametrize("save_top_k", [-1, 1])
@pytest.mark.parametrize("monitor", [None, "val_loss"])
@pytest.mark.parametrize("move", ["same", "new directory", "moved"])
def test_a_resumed_run_averages_what_it_wrote_before(tmp_path, save_on_train_epoch_end, save_top_k, monitor, move):
    """Into the same directory, into a new one as loggers make for every fit, or from a copy on another disk."""
    options = {"save_top_k": save_top_k, "monitor": monitor, "save_on_train_epoch_end": save_on_train_epoch_end}
    whole = fit(tmp_path, model_checkpoint(tmp_path / "whole", **options))
    crashed(tmp_path, model_checkpoint(tmp_path / "first", **options))
    before = tmp_path / "first"
    if move == "moved":
        before = Path(shutil.move(before, tmp_path / "moved"))
    second = tmp_path / "second" if move == "new directory" else before
    (newest,) = before.glob("epoch=2*.ckpt")
    resumed = fit(tmp_path, model_checkpoint(second, **options), ckpt_path=newest)
    steps = [[file["step"] for file in read_manifest(a.path)["files"]] for a in (whole, resumed)]
    assert steps[0] == steps[1] == [8, 12, 16, 20]
    assert read_manifest(resumed.path)["digest"] == read_manifest(whole.path)["digest"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("monitor", [None, "val_loss"])
def test_the_first_checkpoint_is_averaged_after_a_resume_from_it_into_a_new_directory(tmp_path, monitor):
    """Its own state cannot list it, so that what ModelCheckpoint says in it tells who keeps it."""
    options = {"save_top_k": -1, "monitor": monitor}
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path, model_checkpoint(tmp_path / "first", **options), crash_at=1)
    (newest,) = (tmp_path / "first").glob("epoch=0*.ckpt")
    averaging = fit(tmp_path, model_checkpoint(tmp_path / "second", **options), last=5, ckpt_path=newest)
    assert [file["step"] for file in read_manifest(averaging.path)["files"]] == [4, 8, 12, 16, 20]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_the_file_that_is_resumed_from_stays_with_the_model_checkpoint_that_wrote_it(tmp_path):
    """Of two in one directory: after the resume into a new one, only what the one that is followed wrote counts."""

    def run(folder, crash_at=-1, **options):
        module = Crash()
        module.at_epoch = crash_at
        followed = model_checkpoint(folder, save_top_k=-1)
        other = LIGHTNING.callbacks.ModelCheckpoint(folder, "other-{epoch}", save_top_k=-1, every_n_epochs=2)
        averaging = CheckpointAveraging(last=9, compare=False)
        fitting = trainer(tmp_path, callbacks=[averaging, followed, other], max_epochs=4)
        fitting.fit(module, loader(), **VALIDATION, **options)
        return averaging

    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path / "first", crash_at=2)
    averaging = run(tmp_path / "second", ckpt_path=tmp_path / "first" / "other-epoch=1.ckpt")
    before = [path for file in read_manifest(averaging.path)["files"] if "first" in (path := file["path"])]
    assert len(before) == 2
    assert not [path for path in before if "other" in path]


def test_added_on_resume_it_begins_with_the_file_resumed_from(tmp_path):
    trainer(tmp_path, callbacks=[model_checkpoint(tmp_path, save_top_k=-1)], max_epochs=3).fit(
        Regressor(), loader(), **VALIDATION
    )
    (newest,) = tmp_path.glob("epoch=2*.ckpt")
    averaging = CheckpointAveraging(last=5, compare=False)
    run = trainer(tmp_path, callbacks=[averaging, model_checkpoint(tmp_path, save_top_k=-1)], max_epochs=5)
    run.fit(Regressor(), loader(), **VALIDATION, ckpt_path=newest)
    assert [file["epoch"] for file in read_manifest(averaging.path)["files"]] == [2, 3, 4]


class Scripted(Regressor):
    """The second epoch's weights are the worst of the first three."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.tensor([1.0, 3.0, 2.0, 9.0])[self.current_epoch])


@pytest.mark.parametrize("newest", ["epoch=2*", "last"])
def test_a_file_that_a_kill_left_before_its_deletion_is_not_averaged(tmp_path, monkeypatch, newest):
    """ModelCheckpoint writes the better file, deletes the worse one, replaces its ``last.ckpt``, in this order."""

    def run(folder, **options):
        torch.manual_seed(0)
        saving = model_checkpoint(folder, monitor="val_loss", save_top_k=2, save_last=True)
        averaging = CheckpointAveraging(last=2, compare=False)
        fitting = trainer(tmp_path, callbacks=[averaging, saving], max_epochs=4)
        fitting.fit(Scripted(), loader(), **VALIDATION, **options)
        return read_manifest(averaging.path)

    def die(strategy, path):
        if Path(path).name.startswith("epoch=1") and newest != "last":
            raise RuntimeError("killed")

    whole = run(tmp_path / "whole")
    # before 2.6, Lightning wrote a last.ckpt of the fourth epoch, which is none of the best
    assert [file["epoch"] for file in whole["files"]] in ([0, 2], [2, 3])
    monkeypatch.setattr(LIGHTNING.strategies.SingleDeviceStrategy, "remove_checkpoint", die)
    folder = tmp_path / "killed"
    with contextlib.suppress(RuntimeError):
        run(folder)
    assert len(list(folder.glob("epoch=1*"))) == 1
    monkeypatch.undo()
    (path,) = folder.glob(f"{newest}.ckpt")
    assert run(folder, ckpt_path=path)["files"] == whole["files"]


# --- two runs in one directory ---


@pytest.mark.parametrize("name", NAMESPACES)
@pytest.mark.parametrize("epochs", [(4, 4), (5, 3), (3, 5)])
def test_two_runs_in_one_directory_are_not_mixed(tmp_path, name, epochs):
    namespace = NAMESPACES[name]
    folder = tmp_path / "c"
    for count in epochs:
        averaging = CheckpointAveraging(last=9, compare=False)
        saving = model_checkpoint(folder, namespace, save_top_k=-1)
        run = trainer(tmp_path, namespace, callbacks=[averaging, saving], max_epochs=count)
        run.fit(module_class(namespace)(), loader(), **VALIDATION)
    newest = sources(averaging.path)
    assert len(newest) == epochs[1]
    if epochs[0] > 0:
        with pytest.warns(LightningPluginsWarning, match="they are of another run than the newest in"):
            assert select_checkpoints(folder) == newest
    plan = plan_average([folder], last=3)
    assert plan.paths == newest[-3:]
    [note] = [note for note in plan.notes if "another run" in note]
    assert sum(path.name in note for path in folder.glob("epoch*.ckpt")) >= 3


def test_what_a_resumed_run_has_lost_is_another_run(tmp_path):
    folder = tmp_path / "c"

    def callbacks():
        return [CheckpointAveraging(last=9, compare=False), model_checkpoint(folder, save_top_k=-1)]

    trainer(tmp_path, callbacks=callbacks(), max_epochs=5).fit(Regressor(), loader(), **VALIDATION)
    (start,) = folder.glob("epoch=1*.ckpt")
    again = callbacks()
    run = trainer(tmp_path, callbacks=again, max_epochs=4)
    run.fit(Regressor(), loader(seed=9), **VALIDATION, ckpt_path=start)
    expected = ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt", "epoch=2-step=12-v1.ckpt", "epoch=3-step=16-v1.ckpt"]
    assert [path.name for path in sources(again[0].path)] == expected
    with pytest.warns(LightningPluginsWarning, match="another run"):
        assert [path.name for path in select_checkpoints(folder)] == expected


def plain_file(folder, name, step, epoch):
    torch.save({"state_dict": {"w": torch.tensor([float(step)])}, "global_step": step, "epoch": epoch}, folder / name)


def test_without_a_name_an_epoch_that_falls_while_the_step_rises_is_another_run(tmp_path):
    """Epochs of 10 and of 15 steps, interleaved; the run with the highest step is the newest."""
    for epoch in range(4):
        plain_file(tmp_path, f"short-{epoch}.ckpt", 10 * (epoch + 1), epoch)
        plain_file(tmp_path, f"long-{epoch}.ckpt", 15 * (epoch + 1), epoch)
    with pytest.warns(LightningPluginsWarning, match=r"short-0\.ckpt, short-1\.ckpt, short-2\.ckpt, short-3\.ckpt\."):
        found = select_checkpoints(tmp_path, last=3)
    assert [path.name for path in found] == ["long-1.ckpt", "long-2.ckpt", "long-3.ckpt"]
    one_after_the_other = tmp_path / "b"
    one_after_the_other.mkdir()
    for number, (step, epoch) in enumerate([(10, 0), (20, 1), (30, 2), (40, 0), (80, 1)]):
        plain_file(one_after_the_other, f"{number}.ckpt", step, epoch)
    with pytest.warns(LightningPluginsWarning, match=r"newest in .*: 0\.ckpt, 1\.ckpt, 2\.ckpt\."):
        assert [path.name for path in select_checkpoints(one_after_the_other)] == ["3.ckpt", "4.ckpt"]


def test_files_that_are_named_are_all_averaged(tmp_path):
    plain_file(tmp_path, "a.ckpt", 20, 1)
    plain_file(tmp_path, "b.ckpt", 30, 0)
    assert plan_average([tmp_path / "a.ckpt", tmp_path / "b.ckpt"]).notes == []
    assert len(plan_average([tmp_path / "a.ckpt", tmp_path / "b.ckpt"], last=2).paths) == 2


def test_a_run_that_validates_and_saves_within_epochs_is_one_run(tmp_path):
    saving = model_checkpoint(tmp_path, save_top_k=-1, every_n_train_steps=3)
    trainer(tmp_path, callbacks=[saving], max_epochs=4).fit(Regressor(), loader(), **VALIDATION)
    assert len(select_checkpoints(tmp_path)) == 5


def test_a_frozen_network_has_the_files_of_its_run(tmp_path):
    """A weights-only file holds no callbacks' state; the run's name is in it all the same."""
    module = Regressor()
    nn.Module.requires_grad_(module.net[0], False)
    saving = model_checkpoint(tmp_path, save_top_k=-1, save_weights_only=True)
    averaging = CheckpointAveraging(last=2, compare=False)
    trainer(tmp_path, callbacks=[averaging, saving]).fit(module, loader(), **VALIDATION)
    found = [torch.load(path, weights_only=True) for path in sources(averaging.path)]
    assert all("callbacks" not in content for content in found)
    names = [content["lightning_plugins_run"]["fits"] for content in found]
    assert [fits[-1][1] for fits in names] == [12, 16]
    assert len({fits[-1][0] for fits in names}) == 1
