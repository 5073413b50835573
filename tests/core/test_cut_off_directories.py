"""Every callback that marks directories refuses one of two saves, whatever the Trainer is to do with it."""

import shutil

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.distributed.checkpoint import save

from lightning_plugins import EMA, CheckpointAveraging, GradientAccumulation, LatestWeightAveraging, PostHocEMA
from lightning_plugins.core.checkpoint_file import CheckpointError
from lightning_plugins.core.save_marks import new_save, write_marked
from tests.support.training import make_trainer

MARKING = [
    CheckpointAveraging(),
    EMA(),
    EMA(evaluate="raw", checkpoint="raw", after_fit="raw"),
    GradientAccumulation(batches=2, carry=True),
    LatestWeightAveraging(),
    PostHocEMA(),
]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A directory of the step 8 with a rank's file of the step 4."""
    place = tmp_path_factory.mktemp("saves")
    for step in (4, 8):
        path = place / str(step)
        with pytest.warns(UserWarning, match="single process"):
            said = write_marked(save, {"model": {"a": torch.ones(2)}}, path, save=new_save(), step=step, rank=0)
        torch.save({"global_step": step, "epoch": 0, "lightning_plugins_save": said}, path / "meta.pt")
    shutil.copy(place / "4" / "__0_0.distcp", place / "8")
    return place / "8"


@pytest.mark.parametrize("task", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("callback", MARKING, ids=lambda callback: callback.state_key)
def test_a_directory_of_two_saves_is_refused_before_it_is_read(tmp_path, mixture, callback, task):
    trainer = make_trainer(tmp_path, callbacks=[callback])
    with pytest.raises(CheckpointError, match=r"8 is incomplete: its __0_0\.distcp and meta\.pt, of step 8, are of"):
        getattr(trainer, task)(BoringModel(), ckpt_path=mixture)
    # and nothing is left of the check
    assert "load_checkpoint" not in vars(trainer.strategy)
