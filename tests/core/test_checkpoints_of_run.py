"""Where a run's checkpoints lie."""

from types import SimpleNamespace

import pytest

from lightning_plugins.core.checkpoints_of_run import checkpoint_folder


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
