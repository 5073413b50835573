"""A mean of checkpoints says what it is of, to every reader in the package: `inspect`, `extract`, `extract_weights`."""

from __future__ import annotations

import pytest
import torch

from lightning_plugins import EMA, CheckpointAveraging, average_checkpoints, extract_weights
from lightning_plugins.checkpoints import read_manifest
from lightning_plugins.cli import main
from lightning_plugins.core.checkpoint_keys import mean_manifest
from lightning_plugins.ema import describe_checkpoint
from tests.support.checkpoints_models import (
    NAMESPACES,
    VALIDATION,
    Regressor,
    assert_is_mean,
    float64_mean,
    load_state,
    loader,
    trainer,
)


def averaged(folder, *more):
    averaging = CheckpointAveraging(last=3, compare=False)
    saving = NAMESPACES["lightning.pytorch"].callbacks.ModelCheckpoint(folder, save_top_k=-1)
    trainer(folder, callbacks=[*more, averaging, saving]).fit(Regressor(), loader(), **VALIDATION)
    return averaging.path


RUNS = {
    "averages of EMA": ((EMA(0.5),), "mean of 3 checkpoints, of EMA averages"),
    "raw weights of a run with EMA": ((EMA(0.5, checkpoint="raw"),), "mean of 3 checkpoints, of trained weights"),
    "a run without EMA": ((), "mean of 3 checkpoints, of trained weights"),
}


@pytest.mark.parametrize("run", RUNS)
def test_inspect_says_what_the_mean_is_of_and_from_which_files(tmp_path, run, capsys):
    callbacks, words = RUNS[run]
    path = averaged(tmp_path, *callbacks)
    found = describe_checkpoint(path)
    files = ["epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt", "epoch=3-step=16.ckpt"]
    assert (found["state_dict"]["weights"], found["sources"]) == (words, files)
    assert found["other"] == ["hparams_name", "hyper_parameters"]
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert words in printed
    assert all(file in printed for file in files)
    assert describe_checkpoint(tmp_path / files[0])["sources"] == []
    assert describe_checkpoint(tmp_path / files[0])["other"] == ["hparams_name", "hyper_parameters"]


@pytest.mark.parametrize("run", RUNS)
def test_the_trained_weights_are_refused_and_the_mean_is_the_average(tmp_path, run, capsys):
    callbacks, words = RUNS[run]
    path = averaged(tmp_path, *callbacks)
    with pytest.raises(ValueError, match=f"`which` must be 'average' for .*: it is the {words}, and holds no trained"):
        extract_weights(path, "raw")
    weights = extract_weights(path)
    assert_is_mean(weights, float64_mean([tmp_path / file["path"] for file in read_manifest(path)["files"]]))
    assert main(["extract", str(path), "--weights", "raw", "--output", str(tmp_path / "raw.pt")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "raw.pt").exists()


def test_the_mean_of_another_emas_averages_is_refused_by_name(tmp_path):
    path = averaged(tmp_path, EMA(0.5, name="slow"))
    assert read_manifest(path)["ema_name"] == "slow"
    with pytest.raises(ValueError, match=r"`name` must be 'slow' for .*, got 'ema': it is the mean of 3 checkpoints"):
        extract_weights(path)
    assert set(extract_weights(path, name="slow")) == set(load_state(path))


@pytest.mark.parametrize(
    ("record", "weights", "name"),
    [
        ({"state_dict": "average", "name": "slow"}, "average", "slow"),
        # a name that is no text, as another program may write
        ({"state_dict": "average", "name": 5}, "average", None),
        ({"state_dict": "average"}, "average", None),
        ({"state_dict": "raw", "name": "slow"}, "raw", None),
        ({"state_dict": 5, "name": "slow"}, "raw", None),
        ("average", "raw", None),
        (None, "raw", None),
    ],
    ids=str,
)
def test_a_manifest_repeats_what_the_files_say_of_their_weights(tmp_path, record, weights, name):
    for number in range(2):
        told = {} if record is None else {"lightning_plugins_ema": record}
        torch.save({"state_dict": {"w": torch.ones(1)}, "global_step": number, **told}, tmp_path / f"{number}.ckpt")
    found = read_manifest(average_checkpoints(sorted(tmp_path.glob("*.ckpt")), tmp_path / "mean.ckpt"))
    assert (found["weights"], found["ema_name"]) == (weights, name)


def test_a_mean_of_means_is_one_too(tmp_path):
    one, other = averaged(tmp_path / "a"), averaged(tmp_path / "b")
    path = average_checkpoints([one, other], tmp_path / "both.ckpt")
    assert describe_checkpoint(path)["state_dict"]["weights"].startswith("mean of 2 checkpoints")
    assert describe_checkpoint(path)["sources"] == ["a/averaged.ckpt", "b/averaged.ckpt"]


@pytest.mark.parametrize("lie", [1, "x", [], {}, {"files": 1}, {"files": [1]}, {"files": {}}])
def test_what_is_no_manifest_is_refused_in_one_line(tmp_path, lie, capsys):
    torch.save({"state_dict": {"w": torch.ones(1)}, "checkpoint_averaging": lie}, tmp_path / "x.ckpt")
    for read in (describe_checkpoint, extract_weights):
        with pytest.raises(ValueError, match=r"`checkpoint_averaging` must be the manifest of a mean"):
            read(tmp_path / "x.ckpt")
    assert main(["inspect", str(tmp_path / "x.ckpt")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_no_manifest_is_no_mean():
    assert mean_manifest({"state_dict": {}}) is None
