"""Where a run's checkpoints lie."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_plugins.core.checkpoints_of_run import (
    checkpoint_folder,
    followed,
    keeper_of,
    kept_scores,
    last_file,
    wait_for_files,
)


@pytest.mark.parametrize(
    ("log_dir", "dirpath", "folder"),
    [
        ("logs/version_0", "own", "own"),
        ("logs/version_0", None, "logs/version_0/checkpoints"),
        # no logger has a folder
        (None, None, "root/checkpoints"),
        (None, "own", "own"),
    ],
)
def test_the_folder_is_model_checkpoints_own_or_the_one_it_would_have(log_dir, dirpath, folder):
    trainer = SimpleNamespace(log_dir=log_dir, default_root_dir="root")
    assert checkpoint_folder(trainer, SimpleNamespace(dirpath=dirpath)) == folder
    if dirpath is None:
        assert checkpoint_folder(trainer, None) == folder


def keeping(count, monitor=None, **files):
    """Return what a ModelCheckpoint shows."""
    said = {"best_k_models": {}, "dirpath": None, "mode": "min", "best_model_path": "", "last_model_path": ""}
    return SimpleNamespace(save_top_k=count, monitor=monitor, **{**said, **files})


def test_the_first_that_keeps_enough_files_is_followed_or_else_the_first():
    one, three, every = keeping(1), keeping(3, "loss"), keeping(-1, "accuracy")
    trainer = SimpleNamespace(callbacks=[object(), one, three, every])
    assert [followed(trainer, count, monitoring=False) for count in (1, 2, 3, 4)] == [one, three, three, every]
    assert [followed(trainer, count, monitoring=True) for count in (1, 4)] == [three, every]
    trainer.callbacks = [object(), one, three]
    assert followed(trainer, 4, monitoring=False) is one
    assert followed(SimpleNamespace(callbacks=[object()]), 1, monitoring=False) is None


def test_a_file_is_kept_by_the_one_that_has_it_in_its_record():
    best, last = keeping(1, "loss", best_k_models={"a.ckpt": 0.5}), keeping(1, last_model_path="last.ckpt")
    newest = keeping(0, best_model_path="new.ckpt")
    trainer = SimpleNamespace(callbacks=[object(), best, last, newest])
    names = ("a.ckpt", "last.ckpt", "new.ckpt", "other.ckpt")
    assert [keeper_of(trainer, Path(name)) for name in names] == [best, last, newest, None]


def test_its_files_and_their_scores_are_read_from_it():
    best = keeping(2, "loss", best_k_models={"a.ckpt": torch.tensor(0.5)}, last_model_path="last.ckpt")
    assert kept_scores(best) == {Path("a.ckpt"): 0.5}
    assert (last_file(best), last_file(object())) == (Path("last.ckpt"), Path())


class AsyncCheckpointIO:
    """Writes in the background; to take it down is to wait."""

    def __init__(self, error=None):
        self.error, self.waited = error, 0

    def teardown(self):
        self.waited += 1
        if self.error is not None:
            raise self.error


class Own(AsyncCheckpointIO):
    """A user's subclass."""


class Other:
    """Another IO, which may let go of what later saves need."""

    waited = 0

    def teardown(self):
        self.waited += 1


def test_only_what_writes_in_the_background_is_waited_for():
    # what went wrong is reported by Lightning
    for io, times in ((AsyncCheckpointIO(), 1), (Own(), 1), (AsyncCheckpointIO(OSError("no space")), 1), (Other(), 0)):
        wait_for_files(SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=io)))
        assert io.waited == times
