"""``average``: a table of what goes in, then one file that loads."""

import pytest
import torch

from lightning_plugins import average_checkpoints
from lightning_plugins.cli import main


@pytest.fixture
def folder(tmp_path):
    """Five checkpoints as Lightning lays them out."""
    for step in range(1, 6):
        weights = {"weight": torch.full((3,), float(step)), "count": torch.tensor(step)}
        content = {"state_dict": weights, "global_step": step, "epoch": step - 1, "pytorch-lightning_version": "2.6.6"}
        torch.save(content, tmp_path / f"step={step}.ckpt")
    return tmp_path


def test_averages_the_last_and_says_what_went_in(folder, capsys):
    output = folder / "out" / "averaged.ckpt"
    output.parent.mkdir()
    assert main(["average", str(folder), "--last", "3", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "epoch", "score", "weight", "MB", "checkpoint"]
    assert [line.split()[0] for line in lines[1:4]] == ["3", "4", "5"]
    assert lines[-1] == str(output)
    averaged = torch.load(output, weights_only=True)["state_dict"]
    assert averaged["weight"].tolist() == [4.0] * 3
    assert averaged["count"].item() == 5


def test_weights_and_steps(folder):
    output = folder / "out.safetensors"
    command = ["average", str(folder), "--steps", "2:4", "--weights", "1,0,3", "--output", str(output)]
    assert main(command) == 0
    paths = [folder / f"step={step}.ckpt" for step in (2, 3, 4)]
    expected = average_checkpoints(paths, weights=[1, 0, 3])
    assert expected["weight"].tolist() == [3.5] * 3
    from safetensors.torch import load_file

    assert torch.equal(load_file(output)["weight"], expected["weight"])


def test_a_dry_run_writes_nothing(folder, capsys):
    before = sorted(folder.iterdir())
    assert main(["average", str(folder), "--last", "2", "--dry-run"]) == 0
    assert "step=5.ckpt" in capsys.readouterr().out
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DIR", "--last", "3"], "--output must name the file to write; or pass --dry-run"),
        (["DIR", "--last", "1", "--output", "OUT"], "At least two checkpoints are needed"),
        (["nowhere", "--output", "OUT"], "nowhere does not exist"),
        (["DIR", "--steps", "a:b", "--output", "OUT"], "`steps` must be written A:B"),
        (["DIR", "--last", "2", "--weights", "1,x", "--output", "OUT"], "--weights must be numbers with commas"),
        (["DIR", "--last", "2", "--weights", "1", "--output", "OUT"], "`weights`"),
        (["DIR", "--last", "2", "--output", "DIR/step=1.ckpt"], "exists; pass overwrite=True (--overwrite"),
    ],
)
def test_bad_input_is_one_line_status_2_and_no_output(folder, tmp_path, capsys, arguments, message):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    words = [word.replace("DIR", str(folder)).replace("OUT", str(folder / "out.ckpt")) for word in arguments]
    assert main(["average", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-plugins: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "averaged"),
    [
        (["--last", "2"], ["4", "5"]),
        (["--steps", "3:"], ["3", "4", "5"]),
        (["--steps", "3:", "--last", "2"], ["4", "5"]),
    ],
)
def test_what_cannot_be_read_and_was_not_asked_for_is_named_and_left_out(folder, capsys, options, averaged):
    for name in ("step=2.ckpt", "epoch=0-step=1.ckpt"):
        (folder / name).write_bytes((folder / "step=1.ckpt").read_bytes()[:-5])
    (folder / "last.ckpt").symlink_to("gone.ckpt")
    assert main(["average", str(folder), *options, "--output", str(folder / "out.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : len(averaged) + 1]] == averaged
    for name, why in (("step=2.ckpt", "cut off"), ("epoch=0-step=1.ckpt", "cut off"), ("last.ckpt", "No such file")):
        (line,) = [line for line in lines if f"{folder / name} " in line]
        assert line.startswith("Left out: ")
        assert why in line


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("step=4.ckpt", []),
        ("step=4.ckpt", ["--last", "3"]),
        ("epoch=8-step=9.ckpt", ["--last", "3"]),
        ("last.ckpt", ["--last", "3"]),
        ("global_step=1.ckpt", ["--last", "3"]),
        ("step=1.5.ckpt", ["--last", "3"]),
        ("step=4.ckpt", ["--steps", "2:4"]),
        ("last.ckpt", ["--steps", "2:4"]),
        ("step=1.ckpt", ["--last", "9"]),
        ("step=1.ckpt", ["--last", "9", "--dry-run"]),
    ],
)
def test_what_cannot_be_read_and_may_have_been_asked_for_is_refused_by_name(folder, capsys, name, options):
    (folder / name).write_bytes((folder / "step=1.ckpt").read_bytes()[:-5])
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(["average", str(folder), *options, "--output", str(folder / "out.ckpt")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{folder / name} cannot be read as a checkpoint: it is cut off. " in error
    assert "take it out of the directory, or name the files" in error
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "inputs", [["DIR", "DIR"], ["DIR", "DIR/step=1.ckpt"], ["DIR/step=1.ckpt", "LINK/step=1.ckpt"]]
)
def test_a_file_that_would_count_twice_is_refused_before_it_is_planned(folder, tmp_path_factory, capsys, inputs):
    link = tmp_path_factory.mktemp("link") / "link"
    link.symlink_to(folder)
    words = [word.replace("DIR", str(folder)).replace("LINK", str(link)) for word in inputs]
    assert main(["average", *words, "--dry-run"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "step=1.ckpt are the same file; use `weights`" in output.err


def test_a_directory_of_deepspeed_is_told_what_to_do_with(folder, capsys):
    """By itself and in a directory; nothing of its own can be averaged."""
    for step in (7, 8):
        place = folder / f"deep{step}.ckpt"
        (place / "checkpoint").mkdir(parents=True)
        (place / "latest").write_text("checkpoint")
        torch.save({"global_steps": step}, place / "checkpoint" / "mp_rank_00_model_states.pt")
    for inputs in ([str(folder), "--last", "2"], [str(folder / "step=1.ckpt"), str(folder / "deep7.ckpt")]):
        assert main(["average", *inputs, "--output", str(folder / "out.ckpt")]) == 2
        assert (
            "is a directory of DeepSpeed. Where DeepSpeed is installed, `lightning-plugins ex"
            in capsys.readouterr().err
        )
    assert main(["inspect", str(folder)]) == 0
    assert [line.split("global step ")[1][0] for line in capsys.readouterr().out.splitlines()] == list("1234578")


@pytest.mark.parametrize("path", ["s3://bucket/last.ckpt", "file:///somewhere/last.ckpt"])
@pytest.mark.parametrize(
    "command",
    [
        ["average", "PATH", "PATH", "--dry-run"],
        ["inspect", "PATH"],
        ["extract", "PATH", "--weights", "raw", "--output", "OUT"],
    ],
)
def test_a_path_of_another_machine_is_called_one(folder, capsys, command, path):
    words = [word.replace("PATH", path).replace("OUT", str(folder / "out.pt")) for word in command]
    assert main(words) == 2
    assert f"{path} is not on this machine; copy it to a local file first." in capsys.readouterr().err


@pytest.mark.parametrize("command", [["average", "", "--dry-run"], ["inspect", ""]])
def test_an_empty_name_is_not_the_directory_at_hand(folder, monkeypatch, capsys, command):
    """As from a variable of the shell that is not set."""
    monkeypatch.chdir(folder)
    assert main(command) == 2
    assert "must be a path that a file can have, got ''" in capsys.readouterr().err


def test_last_and_best_exclude_each_other(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["average", str(folder), "--last", "2", "--best", "2", "--output", "x.ckpt"])
    assert "not allowed with" in capsys.readouterr().err


def test_a_pickle_that_would_run_code_is_refused_unless_trusted(folder, capsys):
    class Payload:
        def __reduce__(self):
            return print, ("code ran",)

    paths = [folder / "a.ckpt", folder / "b.ckpt"]
    for path in paths:
        torch.save({"state_dict": {"weight": torch.ones(2)}, "payload": Payload()}, path)
    command = ["average", *map(str, paths), "--output", str(folder / "out.ckpt")]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "code ran" not in captured.out
    assert "trust" in captured.err
    assert not (folder / "out.ckpt").exists()
