"""``extract``, ``synthesize`` and ``inspect`` on the files of a real run."""

import pytest
import torch
from safetensors.torch import load_file

from lightning_plugins import EMA, PostHocEMA, extract_weights, synthesize_ema
from lightning_plugins.cli import main
from tests.support.training import loader, make_module, make_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run with an average and snapshots; returns its folder."""
    folder = tmp_path_factory.mktemp("run")
    callbacks = [EMA(0.9), PostHocEMA(every_n_steps=2, dirpath=str(folder / "snapshots"))]
    trainer = make_trainer(folder, callbacks=callbacks)
    trainer.fit(make_module(), loader(6))
    trainer.save_checkpoint(folder / "full.ckpt")
    return folder


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("weights", ["raw", "average"])
def test_extract(run, tmp_path, capsys, weights):
    expected = extract_weights(run / "full.ckpt", weights)
    for name, load in (("w.pt", lambda path: torch.load(path, weights_only=True)), ("w.safetensors", load_file)):
        output = tmp_path / name
        assert main(["extract", str(run / "full.ckpt"), "--weights", weights, "--output", str(output)]) == 0
        assert capsys.readouterr().out == f"{output}\n"
        assert same(load(output), expected)
    assert not same(extract_weights(run / "full.ckpt", "raw"), extract_weights(run / "full.ckpt", "average"))


def test_synthesize(run, tmp_path):
    output = tmp_path / "long.pt"
    command = ["synthesize", str(run / "snapshots"), "--sigma-rel", "0.08", "--output", str(output)]
    assert main(command) == 0
    assert same(torch.load(output, weights_only=True), synthesize_ema(run / "snapshots", 0.08))
    assert main([*command, "--step", "4", "--overwrite"]) == 0
    assert same(torch.load(output, weights_only=True), synthesize_ema(run / "snapshots", 0.08, 4))


def test_inspect(run, capsys):
    assert main(["inspect", str(run / "full.ckpt")]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    values = {name.strip(): value.strip() for name, value in lines.items()}
    assert values["global step"] == "6"
    assert values["kind"] == "full"
    assert "average of EMA 'ema'" in values["state dict"]
    assert "raw weights" in values["beside"]
    assert "EMA" in values["callbacks"]


def test_files_with_objects_are_read_when_they_are_trusted(run, tmp_path, capsys):
    contents = torch.load(run / "full.ckpt", weights_only=True) | {"hyper_parameters": {"loss": torch.nn.MSELoss()}}
    path, output = tmp_path / "object.ckpt", tmp_path / "w.pt"
    torch.save(contents, path)
    extract = ["extract", str(path), "--weights", "raw", "--output", str(output)]
    for command in (extract, ["inspect", str(path)]):
        assert main(command) == 2
        assert "pass trust=True (--trust on the command line)" in capsys.readouterr().err
        assert main([*command, "--trust"]) == 0
        capsys.readouterr()
    assert same(torch.load(output, weights_only=True), extract_weights(run / "full.ckpt", "raw"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "nowhere.ckpt", "--weights", "raw", "--output", "x.pt"], "nowhere.ckpt"),
        (["extract", "FULL", "--weights", "average", "--name", "other", "--output", "x.pt"], "`name` must be that of"),
        (["extract", "FULL", "--weights", "raw", "--output", "FULL"], "exists; pass overwrite=True (--overwrite"),
        (["extract", "FULL", "--weights", "raw", "--output", "no/such/folder.pt"], "does not exist"),
        (["extract", "FULL", "--weights", "raw", "--output", "../here.pt"], "is a directory"),
        (["synthesize", "nowhere", "--sigma-rel", "0.1", "--output", "x.pt"], "`dirpath` must be a directory with"),
        (["synthesize", "SNAPSHOTS", "--sigma-rel", "0.5", "--output", "x.pt"], "`sigma_rel` must be"),
        (["synthesize", "SNAPSHOTS", "--sigma-rel", "0.1", "--step", "99", "--output", "x.pt"], "`step` must be that"),
        (["inspect", "nowhere.ckpt"], "nowhere.ckpt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "here.pt").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    places = {"FULL": str(run / "full.ckpt"), "SNAPSHOTS": str(run / "snapshots")}
    assert main([places.get(word, word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-plugins: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here.pt", "work"]


def test_a_write_that_fails_keeps_the_old_file(run, tmp_path, monkeypatch):
    output = tmp_path / "w.pt"
    output.write_text("old")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    assert main(["extract", str(run / "full.ckpt"), "--weights", "raw", "--output", str(output), "--overwrite"]) == 2
    assert output.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]
