"""The callback's arguments: what is refused, its state before and after a fit, and how a YAML writes it."""

from __future__ import annotations

import pickle

import pytest
import torch

from lightning_plugins import CheckpointAveraging
from lightning_plugins.core.lightning import MisconfigurationException
from tests.support.checkpoints_models import (
    NAMESPACES,
    VALIDATION,
    Regressor,
    loader,
    sources,
    trainer,
)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"last": 2, "best": 2}, ValueError, "`last` and `best` cannot be given together, got last=2 and best=2"),
        ({"last": 1}, ValueError, "`last` must be at least 2 checkpoints, got 1"),
        ({"best": "3"}, TypeError, "`best` must be a whole number of checkpoints, got '3'"),
        ({"output": "x.pt"}, ValueError, r"`output` must end in .ckpt or .safetensors, got 'x.pt'"),
        ({"refresh_batch_norm": "yes"}, ValueError, "`refresh_batch_norm` must be 'auto', True or False, got 'yes'"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        CheckpointAveraging(**options)


def test_what_clashes_with_the_trainer_is_refused_at_setup(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"CheckpointAveraging\(best=2\) needs a ModelCheckpoint with"):
        trainer(tmp_path, callbacks=[CheckpointAveraging(best=2)]).fit(Regressor(), loader(), **VALIDATION)
    (tmp_path / "mine.ckpt").write_bytes(b"PK\x03\x04 something else")
    mine = trainer(tmp_path, callbacks=[CheckpointAveraging(output=str(tmp_path / "mine.ckpt"))])
    with pytest.raises(MisconfigurationException, match="is a file that it did not write"):
        mine.fit(Regressor(), loader(), **VALIDATION)
    torch.save({"state_dict": Regressor().state_dict()}, tmp_path / "mine.ckpt")
    with pytest.raises(MisconfigurationException, match="is a file that it did not write"):
        mine.fit(Regressor(), loader(), **VALIDATION)
    run = trainer(tmp_path, callbacks=[CheckpointAveraging()])
    run.strategy.__class__ = type("DeepSpeedStrategy", (type(run.strategy),), {})
    with pytest.raises(MisconfigurationException, match="CheckpointAveraging was not tested under DeepSpeedStrategy"):
        run.fit(Regressor(), loader(), **VALIDATION)


def test_two_instances_need_different_outputs(tmp_path):
    both = [CheckpointAveraging(last=2), CheckpointAveraging(last=3, output="three.ckpt")]
    trainer(tmp_path, callbacks=list(both)).fit(Regressor(), loader(), **VALIDATION)
    assert [len(sources(averaging.path)) for averaging in both] == [2, 3]
    twins = [CheckpointAveraging(last=2), CheckpointAveraging(last=3)]
    with pytest.raises(MisconfigurationException, match=r"another `output`, or remove it"):
        trainer(tmp_path, callbacks=twins).fit(Regressor(), loader(), **VALIDATION)
    # the last of them would share the folder of its own files, and the other one prunes it
    for output, place in [
        ("./averaged.ckpt", ".ckpt"),
        ("x/../averaged.ckpt", ".ckpt"),
        ("averaged.safetensors", "_pool"),
    ]:
        disguised = [CheckpointAveraging(last=2), CheckpointAveraging(last=3, output=output)]
        with pytest.raises(MisconfigurationException, match=rf"callbacks would write .*/averaged{place}; give"):
            trainer(tmp_path, callbacks=disguised).fit(Regressor(), loader(), **VALIDATION)


def test_pickle_and_state_before_and_after_a_fit(tmp_path):
    averaging = pickle.loads(pickle.dumps(CheckpointAveraging(best=3)))
    assert (averaging.by_score, averaging.count) == (True, 3)
    assert averaging.state_key == "CheckpointAveraging(output='averaged.ckpt')"
    fitted = CheckpointAveraging(last=2)
    trainer(tmp_path, callbacks=[fitted]).fit(Regressor(), loader(), **VALIDATION)
    torch.save(fitted.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["version"] == 2
    assert set(state["history"]) == {4, 8, 12, 16}
    fresh = CheckpointAveraging(last=2)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == fitted.state_dict()


def test_a_yaml_can_write_it():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(NAMESPACES["pytorch_lightning"].Callback, "callback")
    text = {
        "class_path": "lightning_plugins.CheckpointAveraging",
        "init_args": {"best": 3, "refresh_batch_norm": False},
    }
    made = parser.instantiate(parser.parse_object({"callback": text})).callback
    assert isinstance(made, CheckpointAveraging)
    assert (made.count, made.by_score, made.refresh_batch_norm) == (3, True, False)
