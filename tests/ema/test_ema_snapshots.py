"""Snapshots on disk: what runs share a directory, what cannot be written, what files may claim."""

import os
import time

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_plugins import PostHocEMA, synthesize_ema
from lightning_plugins.core.lightning import MisconfigurationException
from lightning_plugins.core.validation import LightningPluginsWarning
from lightning_plugins.ema import snapshots as snapshots_module
from lightning_plugins.ema.snapshots import SnapshotContents, list_snapshots, write_snapshot
from tests.support.ema_runs import Scripted, numbers, trainer


def snapshot(path, at=5, run="", **changes):
    write_snapshot(path, at, [0.1], SnapshotContents([{"weight": torch.ones(())}], {}, run=run))
    if changes:
        name = path / f"step={at:010d}.pt"
        torch.save({**torch.load(name, weights_only=True), **changes}, name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("file_format", ["torch", "safetensors"])
def test_complex_averages_keep_their_imaginary_parts(tmp_path, dtype, file_format):
    averages = [{"real": torch.tensor([0.1]), "wave": torch.tensor([1 + 0.1j])}]
    kinds = {"dtype": getattr(torch, dtype), "file_format": file_format}
    write_snapshot(tmp_path, 5, [0.1], SnapshotContents(averages, {}), **kinds)
    (found,) = list_snapshots(tmp_path)
    (average,) = found.read().averages
    assert average["real"].dtype == getattr(torch, dtype)
    assert torch.equal(average["wave"], averages[0]["wave"])


def steps(path):
    return [found.step for found in list_snapshots(path)]


def run(folder, *callbacks, epochs=1, where="posthoc", **kwargs):
    post = PostHocEMA(every_n_steps=5, dirpath=folder / where)
    trainer(post, *callbacks, max_epochs=epochs).fit(Scripted(), numbers(5), **kwargs)
    return post


def test_a_state_cannot_make_snapshots_of_another_run_move(tmp_path):
    run(tmp_path, ModelCheckpoint(tmp_path, filename="x"), where="own")
    foreign = tmp_path / "posthoc_ema"
    for step in (7, 9):
        snapshot(foreign, step, run="ab" * 8)
    contents = torch.load(tmp_path / "x.ckpt", weights_only=True)
    contents["callbacks"]["PostHocEMA(sigma_rels=(0.05, 0.1))"]["directory"] = str(foreign)
    torch.save(contents, tmp_path / "lying.ckpt")
    post = PostHocEMA(every_n_steps=5)
    files = ModelCheckpoint(tmp_path / "files")
    trainer(post, files, max_epochs=2).fit(Scripted(), numbers(5), ckpt_path=tmp_path / "lying.ckpt")
    assert not (foreign / "superseded-1").exists()
    assert steps(foreign) == [7, 9, 10]
    with pytest.raises(ValueError, match=r"snapshots of one run, but .*0007.pt and .*0010.pt are of different"):
        synthesize_ema(foreign, 0.1)


def test_a_resumed_run_moves_its_own_later_snapshots(tmp_path):
    files = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run(tmp_path, files, epochs=3)
    assert steps(tmp_path / "posthoc") == [5, 10, 15]
    run(tmp_path, epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert steps(tmp_path / "posthoc") == [5, 10]
    assert steps(tmp_path / "posthoc" / "superseded-1") == [10, 15]


def test_a_directory_that_cannot_be_written_is_refused_at_setup(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MisconfigurationException, match=r"`dirpath` must be a directory that can be written to, got"):
        trainer(PostHocEMA(dirpath=tmp_path / "file" / "below")).fit(Scripted(), numbers(1))
    (tmp_path / "posthoc_ema").write_text("")
    with pytest.raises(MisconfigurationException, match=r"`dirpath` must be a directory that can be written to, got"):
        trainer(PostHocEMA(), default_root_dir=tmp_path).fit(Scripted(), numbers(1))


def test_a_disk_that_fails_later_warns_once_and_ends_no_fit(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots_module, "replacing", full)
    with pytest.warns(LightningPluginsWarning, match=r"of step 5 could not be written .*No space left") as seen:
        post = run(tmp_path, epochs=3)
    assert sum("could not be written" in str(one.message) for one in seen) == 1
    assert post.state_dict()["last_update"] == 15


def test_planted_links_are_not_followed(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "posthoc"
    victim.write_text("precious")
    folder.mkdir()
    for name in (".step=0000000005.pt.part", ".step=0000000005.pt.tmp", "step=0000000005.pt"):
        (folder / name).symlink_to(victim)
    snapshot(folder)
    assert victim.read_text() == "precious"
    assert not (folder / "step=0000000005.pt").is_symlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma_rels": [0.1] * 12_000}, "it has 12000 values of `sigma_rels`, which must be 1 to 100"),
        ({"sigma_rels": [0.5]}, "`sigma_rels` must be above 0 and below"),
        ({"sigma_rels": [1e-300]}, "`sigma_rels` must be at least"),
        ({"sigma_rels": []}, "it has 0 values of `sigma_rels`"),
        ({"step": 10**18}, "its name and its content differ"),
        ({"step": True}, "`step` must be a whole number"),
        ({"run": "a/../b"}, "`run` must be a text of hexadecimal digits"),
        ({"began": {"weight": 0}}, "`began` must be at least 1"),
        ({"first_names": {"weight": 5}}, "`first_names` must be names by name"),
        ({"tied": [1]}, "it is not whole"),
        ({"averages": "abc"}, "must be a list"),
    ],
)
def test_headers_are_checked_before_any_work(tmp_path, changes, message):
    snapshot(tmp_path, **changes)
    began = time.monotonic()
    with pytest.raises(ValueError, match=message):
        list_snapshots(tmp_path)
    assert time.monotonic() - began < 5


def test_a_pipe_with_a_snapshots_name_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "step=0000000005.pt")
    with pytest.raises(OSError, match=r"0005\.pt is a device or a pipe"):
        list_snapshots(tmp_path)


def test_more_averages_than_can_be_solved_for_are_refused(tmp_path, monkeypatch):
    from lightning_plugins.ema import posthoc

    monkeypatch.setattr(posthoc, "_MOST_AVERAGES", 2)
    for step in (1, 2, 3):
        snapshot(tmp_path, step)
    with pytest.raises(ValueError, match="must hold 2 averages at most, got 3"):
        synthesize_ema(tmp_path, 0.1)
