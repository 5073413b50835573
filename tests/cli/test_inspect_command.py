"""``inspect`` opens everything that the other commands read or write, as lines or as JSON."""

import json
import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from lightning_plugins import average_checkpoints
from lightning_plugins.cli import main
from tests.support.damaged_cases import write_whole_files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_whole_files(folder)
    torch.save({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.int64)}, folder / "plain.pt")
    save_file({"a": torch.zeros(2, 3)}, folder / "plain.safetensors", {"global_step": "7"})
    return folder


def inspected(capsys, path):
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["inspect", str(path), "--json"]) == 0
    return lines, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("1.ckpt", {"kind": "full", "global_step": 1}),
        ("legacy.ckpt", {"kind": "full", "global_step": 3}),
        ("average.ckpt", {"global_step": 2}),
        ("average.safetensors", {"kind": "safetensors", "global_step": 2}),
        ("plain.pt", {"kind": "state dict", "global_step": None}),
        ("plain.safetensors", {"kind": "safetensors", "global_step": 7}),
        ("sharded", {"kind": "sharded", "global_step": 3}),
    ],
)
def test_every_format(whole, capsys, name, expected):
    lines, found = inspected(capsys, whole / name)
    assert found | expected == found
    assert found["path"] == str(whole / name)
    assert found["state_dict"]["tensors"] >= 1
    assert any(line.startswith("global step") for line in lines)


def test_numbers_are_those_of_the_tensors(whole, capsys):
    found = inspected(capsys, whole / "plain.pt")[1]["state_dict"]
    assert (found["tensors"], found["elements"], found["bytes"]) == (2, 10, 24 + 32)
    assert found["types"] == ["float32", "int64"]


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_an_average_says_of_what(whole, tmp_path, capsys, suffix):
    sources = [whole / "1.ckpt", whole / "2.ckpt"]
    found = inspected(capsys, average_checkpoints(sources, tmp_path / f"mean{suffix}"))[1]
    assert found["state_dict"]["weights"].startswith("mean of 2 checkpoints")
    assert [name.rpartition("/")[2] for name in found["sources"]] == ["1.ckpt", "2.ckpt"]


def test_a_directory_is_a_line_for_each_checkpoint(whole, capsys):
    lines, found = inspected(capsys, whole)
    assert len(lines) == len(found) == 8
    assert [one["global_step"] for one in found if one["global_step"] is not None] == [1, 2, 2, 2, 3, 3, 7]
    assert [one["path"].rpartition("/")[2] for one in found if one["mean"]] == ["average.ckpt", "average.safetensors"]


def test_a_directory_is_read_to_its_end_and_what_cannot_be_read_is_named(whole, tmp_path, capsys):
    (tmp_path / "a.ckpt").write_bytes((whole / "2.ckpt").read_bytes()[:-9])
    (tmp_path / "b.ckpt").write_bytes((whole / "2.ckpt").read_bytes())
    (tmp_path / "c.safetensors").touch()
    (tmp_path / "d.ckpt").write_bytes((whole / "1.ckpt").read_bytes())
    (tmp_path / "error.ckpt").write_text("<html>not found</html>")
    (tmp_path / "vocabulary.bin").write_text("of another program, which no one said is a checkpoint")
    (tmp_path / "last.ckpt").symlink_to("gone.ckpt")
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "step=3.ckpt").mkdir()
    (tmp_path / "step=3.ckpt" / "__0_0.distcp").write_bytes(b"of a save that was killed")
    (tmp_path / "z.ckpt").write_bytes((whole / "1.ckpt").read_bytes())
    for options in ([], ["--json"]):
        assert main(["inspect", str(tmp_path), *options]) == 2
        output = capsys.readouterr()
        lines = output.err.splitlines()
        for line, (name, why) in zip(
            lines,
            [
                ("a.ckpt", "it is cut off"),
                ("c.safetensors", "it is empty"),
                ("error.ckpt", "it is a web page"),
                ("last.ckpt", "No such file"),
                ("pipe.ckpt", "is a device or a pipe"),
                ("step=3.ckpt", "is incomplete: it has no .metadata"),
            ],
            strict=True,
        ):
            assert line.startswith(f"lightning-plugins: error: {tmp_path / name} ")
            assert why in line
    found = json.loads(output.out)
    assert [(one["path"].rpartition("/")[2], one["global_step"]) for one in found] == [
        ("d.ckpt", 1),
        ("z.ckpt", 1),
        ("b.ckpt", 2),
        ("vocabulary.bin", None),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "a Git LFS pointer; get the file with"),
        (b"\n<!DOCTYPE html><html>not found</html>", "a web page; the download of the file has failed"),
        (b"\x1f\x8b\x08\x00rest", "compressed; unpack it first"),
        (b"just a text\n", "a text"),
        (b"\x89HDF\r\n\x1a\n", "of another program"),
    ],
)
@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors", "x.pt"])
def test_a_file_that_is_something_else_is_called_what_it_is(tmp_path, capsys, content, message, name):
    (tmp_path / name).write_bytes(content)
    assert main(["inspect", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_safetensors_file_under_another_name_is_told(whole, tmp_path, capsys):
    (tmp_path / "x.ckpt").write_bytes((whole / "plain.safetensors").read_bytes())
    assert main(["inspect", str(tmp_path / "x.ckpt")]) == 2
    assert "a .safetensors file under another name" in capsys.readouterr().err


def test_sparse_tensors_are_counted(tmp_path, capsys):
    weights = {"a": torch.eye(3).to_sparse(), "b": torch.ones(2)}
    torch.save({"state_dict": weights, "global_step": 1}, tmp_path / "sparse.ckpt")
    torch.save(weights, tmp_path / "sparse.pt")
    found = inspected(capsys, tmp_path / "sparse.ckpt")[1]["state_dict"]
    assert (found["tensors"], found["elements"]) == (2, 11)
    assert inspected(capsys, tmp_path / "sparse.pt")[1]["state_dict"]["tensors"] == 1


def test_a_program_of_torchscript_is_told_as_what_it_is(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
        archive.writestr("program/constants.pkl", b"\x80\x02).")
        archive.writestr("program/code/__torch__.py", "class Linear(Module): ...", zipfile.ZIP_DEFLATED)
    assert main(["inspect", str(tmp_path / "program.pt")]) == 2
    assert "it is a TorchScript archive, not a checkpoint" in capsys.readouterr().err


def test_lines_are_made_for_reading(tmp_path, capsys):
    """Tied tensors are counted once, numbers have commas, and what there is not is a dash."""
    weight = torch.ones(3, 500)
    state = {"w": weight, "tied": weight, "n": torch.tensor(3), "note": "x"}
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": {"w": weight}, "global_step": 10**400}, tmp_path / "huge.ckpt")
    lines, found = inspected(capsys, tmp_path / "plain.pt")
    assert [line for line in lines if not line.startswith(("path", "file bytes"))] == [
        "kind         state dict",
        "epoch        -",
        "global step  -",
        "state dict   weights weights, tensors 3, elements 3,001, bytes 6,008, types float32, int64",
        "sources      -",
        "other        note",
    ]
    assert found["state_dict"]["bytes"] == 6008
    assert max(map(len, inspected(capsys, tmp_path / "huge.ckpt")[0])) < 700


def test_a_directory_is_listed_by_steps_and_what_has_none_comes_last(tmp_path, capsys):
    for name, said in {"a": {}, "b": {"global_step": 0}, "c": {"global_step": 12_000}, "d": {"global_step": 7}}.items():
        torch.save({"state_dict": {"w": torch.ones(1)}, **said}, tmp_path / f"{name}.ckpt")
    lines, found = inspected(capsys, tmp_path)
    assert [one["global_step"] for one in found] == [0, 7, 12_000, None]
    assert ["step 0," in lines[0], "step 7," in lines[1], "step 12,000," in lines[2], "step -," in lines[3]] == [
        True
    ] * 4
