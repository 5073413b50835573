"""Places that cannot be written: refused before training by the given path, or later one warning; a fit goes on."""

from __future__ import annotations

import warnings

import pytest
import torch

from lightning_plugins import CheckpointAveraging
from lightning_plugins.checkpoints import averaged_file, read_manifest
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.support.checkpoints_models import NAMESPACES, VALIDATION, Regressor, loader, model_checkpoint, trainer

LIGHTNING = NAMESPACES["lightning.pytorch"]


class Steps(LIGHTNING.Callback):
    def __init__(self):
        self.steps = 0

    def on_train_batch_end(self, trainer, *args):
        self.steps = trainer.global_step


def below_a_file(folder):
    (folder / "file").write_text("")
    return folder / "file" / "averaged.ckpt"


def a_directory(folder):
    (folder / "taken.ckpt").mkdir()
    return folder / "taken.ckpt"


def a_link_to_nothing(folder):
    (folder / "link.ckpt").symlink_to(folder / "nowhere" / "x.ckpt")
    return folder / "link.ckpt"


def no_average(folder):
    (folder / "mine.ckpt").write_bytes(b"PK\x03\x04 something else")
    return folder / "mine.ckpt"


def a_checkpoint(folder):
    torch.save({"state_dict": Regressor().state_dict()}, folder / "mine.ckpt")
    return folder / "mine.ckpt"


@pytest.mark.parametrize("place", [below_a_file, a_directory, a_link_to_nothing, no_average, a_checkpoint])
def test_an_output_that_cannot_be_written_is_refused_before_training(tmp_path, place):
    output, steps = place(tmp_path), Steps()
    run = trainer(tmp_path, callbacks=[steps, CheckpointAveraging(output=str(output))])
    with pytest.raises(MisconfigurationException, match=f"`output` of CheckpointAveraging .*{output}"):
        run.fit(Regressor(), loader(), **VALIDATION)
    assert steps.steps == 0


def test_nothing_is_left_by_looking_whether_a_place_can_be_written(tmp_path):
    class Looks(LIGHTNING.Callback):
        def on_train_batch_start(self, trainer, *args):
            self.found = sorted(path.name for path in tmp_path.rglob("*"))
            trainer.should_stop = True

    looks = Looks()
    output = tmp_path / "new" / "deep" / "averaged.ckpt"
    run = trainer(tmp_path, callbacks=[CheckpointAveraging(output=str(output)), looks], max_epochs=1)
    run.fit(Regressor(), loader(), **VALIDATION)
    assert looks.found == []


def test_the_directory_of_an_output_is_made(tmp_path):
    averaging = CheckpointAveraging(last=2, output="new/deep/averaged.ckpt", compare=False)
    files = model_checkpoint(tmp_path, save_top_k=-1)
    trainer(tmp_path, callbacks=[averaging, files], max_epochs=2).fit(Regressor(), loader(), **VALIDATION)
    assert averaging.path == tmp_path / "new" / "deep" / "averaged.ckpt"
    assert averaging.path.exists()


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


class FailsFrom(LIGHTNING.Callback):
    """From an epoch on, weights-only files cannot be written."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            save = trainer.save_checkpoint

            def failing(path, weights_only=False, **more):
                return full_disk() if weights_only else save(path, weights_only, **more)

            trainer.save_checkpoint = failing


def test_files_of_our_own_that_cannot_be_written_are_one_warning(tmp_path):
    averaging, steps = CheckpointAveraging(last=4), Steps()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, callbacks=[averaging, steps, FailsFrom(2)], max_epochs=5).fit(
            Regressor(), loader(), **VALIDATION
        )
    said = [str(w.message) for w in caught if issubclass(w.category, LightningPluginsWarning)]
    assert len(said) == 1
    assert "epoch=2-step=12.ckpt: [Errno 28] No space left on device. The average will lack this epoch" in said[0]
    assert steps.steps == 20
    assert [file["epoch"] for file in read_manifest(averaging.path)["files"]] == [0, 1]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_an_average_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, batch_norm):
    monkeypatch.setattr(averaged_file, "replacing", full_disk)
    averaging, steps = CheckpointAveraging(last=2), Steps()
    module = Regressor(batch_norm=batch_norm)
    run = trainer(tmp_path, callbacks=[averaging, steps, model_checkpoint(tmp_path, save_top_k=-1)])
    with pytest.warns(LightningPluginsWarning, match="made no average: .Errno 28. No space left on device"):
        run.fit(module, loader(), **VALIDATION)
    assert steps.steps == 16
    assert (averaging.path, averaging.scores) == (None, None)
    assert not list(tmp_path.glob(".*"))
    assert run.callbacks[0] is not None


def test_checkpoints_that_cannot_be_averaged_are_a_warning(tmp_path):
    """A layer that grows in mid-run: files of several shapes."""

    class Grows(Regressor):
        def on_train_epoch_end(self):
            if self.current_epoch == 2:
                self.register_buffer("extra", torch.zeros(3))

    averaging, steps = CheckpointAveraging(last=4), Steps()
    run = trainer(tmp_path, callbacks=[averaging, steps, model_checkpoint(tmp_path, save_top_k=-1)])
    with pytest.warns(LightningPluginsWarning, match="made no average: The checkpoints differ: `extra` is missing"):
        run.fit(Grows(), loader(), **VALIDATION)
    assert steps.steps == 16
    assert averaging.path is None


def test_a_nan_in_a_checkpoint_is_a_warning(tmp_path):
    class Breaks(Regressor):
        def on_train_epoch_end(self):
            if self.current_epoch == 2:
                self.net[0].weight.data.fill_(float("nan"))

    averaging = CheckpointAveraging(last=4)
    run = trainer(tmp_path, callbacks=[averaging, model_checkpoint(tmp_path, save_top_k=-1)])
    with pytest.warns(LightningPluginsWarning, match=r"made no average: `net\.0\.weight` holds NaN or infinity in"):
        run.fit(Breaks(), loader(), **VALIDATION)
    assert averaging.path is None


def test_old_files_that_cannot_be_deleted_are_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_plugins.checkpoints.pool.remove", full_disk)
    averaging = CheckpointAveraging(last=2, compare=False)
    with pytest.warns(LightningPluginsWarning, match="could not delete old files in") as caught:
        trainer(tmp_path, callbacks=[averaging]).fit(Regressor(), loader(), **VALIDATION)
    assert sum("could not delete" in str(w.message) for w in caught) == 1
    assert [file["epoch"] for file in read_manifest(averaging.path)["files"]] == [2, 3]


def test_a_second_fit_warns_anew(tmp_path):
    averaging = CheckpointAveraging(last=2, compare=False)
    for _ in range(2):
        with pytest.warns(LightningPluginsWarning, match="could not write"):
            trainer(tmp_path, callbacks=[averaging, FailsFrom(0)], max_epochs=2).fit(
                Regressor(), loader(), **VALIDATION
            )
