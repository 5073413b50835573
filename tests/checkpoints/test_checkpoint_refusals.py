"""What cannot be averaged is refused by name, and leaves nothing behind."""

from __future__ import annotations

import pickle

import pytest
import safetensors.torch
import torch

from lightning_plugins import average_checkpoints
from lightning_plugins.checkpoints import CheckpointError, read_manifest
from tests.support.checkpoints_models import write_files


class Malicious:
    def __reduce__(self):
        import os

        return os.system, ("touch pwned",)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = write_files(tmp_path, 2)
    content = torch.load(second)
    torch.save(content | {"hyper_parameters": Malicious()}, second)
    with pytest.raises(CheckpointError, match=r"names posix\.system.*trust=True") as caught:
        average_checkpoints([first, second], tmp_path / "out.ckpt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out.ckpt").exists()
    old = tmp_path / "old.pt"
    torch.save(content | {"hyper_parameters": Malicious()}, old, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"names posix\.system.*trust=True"):
        average_checkpoints([first, old])
    assert not (tmp_path / "pwned").exists()


class Harmless:
    pass


def test_trust_loads_foreign_classes_and_keeps_them(tmp_path):
    first, second = write_files(tmp_path, 2)
    net = torch.nn.Linear(2, 1)
    torch.save(torch.load(second) | {"hyper_parameters": {"of": Harmless(), "net": net}}, second)
    with pytest.raises(CheckpointError, match="Harmless"):
        average_checkpoints([first, second])
    written = average_checkpoints([first, second], tmp_path / "out.ckpt", trust=True)
    loaded = torch.load(written, weights_only=False)["hyper_parameters"]
    assert isinstance(loaded["of"], Harmless)
    assert torch.equal(loaded["net"].weight, net.weight)


@pytest.mark.parametrize("kept", [0, 3, 100, 1000])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_cut_file_is_refused_by_name(tmp_path, kept, suffix):
    paths = write_files(tmp_path, 2)
    cut = tmp_path / f"cut{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file({"a.weight": torch.randn(30, 30)}, cut)
    else:
        cut.write_bytes(paths[1].read_bytes())
    cut.write_bytes(cut.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{cut.name} cannot be read as a checkpoint") as caught:
        average_checkpoints([paths[0], cut])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a checkpoint"),
        ({"a": 1, "b": {}}, "holds no weights: expected `state_dict` or tensors by name, found `a`, `b`"),
        ({}, "found nothing"),
        (
            {"w": torch.sparse_coo_tensor([[0]], [1.0], (2,), check_invariants=True)},
            "`w` .* is stored as sparse_coo",
        ),
    ],
)
def test_a_file_without_dense_weights_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=message):
        average_checkpoints([*write_files(tmp_path, 1), tmp_path / "odd.pt"])


def test_garbage_that_is_no_archive_is_refused(tmp_path):
    for content in (pickle.dumps({"w": 1}), b"garbage garbage"):
        (tmp_path / "x.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.ckpt cannot be read as a checkpoint: ") as caught:
            average_checkpoints([*write_files(tmp_path, 1), tmp_path / "x.ckpt"])
        assert "PyTorch" not in str(caught.value)


def test_differences_are_named_up_to_ten(tmp_path):
    first, second = write_files(tmp_path, 2)
    content = torch.load(second)
    state = content["state_dict"]
    state["a.weight"], state["a.bias"] = torch.zeros(7, 5), state["a.bias"].double()
    state |= {f"extra{i}": torch.ones(1) for i in range(12)}
    torch.save(content, second)
    with pytest.raises(CheckpointError) as caught:
        average_checkpoints([first, second], tmp_path / "out.ckpt")
    text = str(caught.value)
    assert "`a.weight` has the shape (5, 7) in epoch=0-step=10.ckpt and (7, 5) in epoch=1-step=20.ckpt" in text
    assert "`a.bias` is float32 in epoch=0-step=10.ckpt and float64 in epoch=1-step=20.ckpt" in text
    assert "`extra7` is missing from epoch=0-step=10.ckpt" in text
    assert "extra8" not in text
    assert "and 4 more. Pass strict=False" in text
    assert "\n" not in text


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", [None, ".ckpt", ".safetensors"])
def test_nan_and_infinity_are_refused_by_name_unless_allowed(tmp_path, bad, suffix):
    paths = write_files(tmp_path, 3, w=lambda i: torch.tensor([1.0, bad if i == 1 else 1.0]))
    output = None if suffix is None else tmp_path / f"out{suffix}"
    with pytest.raises(CheckpointError, match=r"`w` holds NaN or infinity in .*epoch=1-step=20.ckpt"):
        average_checkpoints(paths, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in paths]
    allowed = average_checkpoints(paths, allow_nonfinite=True)
    assert not torch.isfinite(allowed["w"][1])
    assert allowed["w"][0] == 1.0


def test_the_same_file_twice_is_refused(tmp_path):
    first, second = write_files(tmp_path, 2)
    (tmp_path / "last.ckpt").symlink_to(second)
    with pytest.raises(ValueError, match="are the same file; use `weights`"):
        average_checkpoints([first, second, tmp_path / "last.ckpt"])


def test_too_few_paths_and_wrong_arguments_are_refused(tmp_path):
    paths = write_files(tmp_path, 2)
    for given in ([], paths[:1]):
        with pytest.raises(ValueError, match=rf"`paths` must name at least two checkpoints, got {len(given)}\."):
            average_checkpoints(given)
    with pytest.raises(TypeError, match="`paths` must be several paths, got"):
        average_checkpoints(str(tmp_path))
    with pytest.raises(ValueError, match="`weights` must have one number for each of the 2 checkpoints, got 3"):
        average_checkpoints(paths, weights=[1, 1, 1])
    with pytest.raises(ValueError, match="`weights` must be at least 0, got -1"):
        average_checkpoints(paths, weights=[1, -1])
    with pytest.raises(ValueError, match="`weights` must not all be 0"):
        average_checkpoints(paths, weights=[0, 0])
    with pytest.raises(TypeError, match="`weights` must be a number, got 'a'"):
        average_checkpoints(paths, weights=["a", 1])
    with pytest.raises(ValueError, match=r"`dtype` must be torch.float32 or torch.float64, got torch.bfloat16"):
        average_checkpoints(paths, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"`dtype` must be torch.float32 or torch.float64, got 'nonsense'"):
        average_checkpoints(paths, dtype="nonsense")
    with pytest.raises(ValueError, match=r"`output` must end in .ckpt or .safetensors, got 'x.pt'"):
        average_checkpoints(paths, "x.pt")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt does not exist"):
        average_checkpoints([*paths, tmp_path / "nowhere.ckpt"])
    with pytest.raises(CheckpointError, match="is a directory without a sharded checkpoint"):
        average_checkpoints([*paths, tmp_path])
    with pytest.raises(CheckpointError, match="is not on this machine"):
        average_checkpoints([*paths, "s3://bucket/x.ckpt"])


def test_an_existing_output_is_only_replaced_when_asked(tmp_path):
    paths = write_files(tmp_path, 2)
    output = tmp_path / "out.ckpt"
    output.write_text("precious")
    with pytest.raises(FileExistsError, match=r"out\.ckpt exists; pass overwrite=True"):
        average_checkpoints(paths, output)
    assert output.read_text() == "precious"
    average_checkpoints(paths, output, overwrite=True)
    assert read_manifest(output) is not None
    with pytest.raises(FileNotFoundError, match="The directory of `output`"):
        average_checkpoints(paths, tmp_path / "nowhere" / "out.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    with pytest.raises(FileExistsError, match="`output` is a directory"):
        average_checkpoints(paths, tmp_path / "folder.ckpt", overwrite=True)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_what_safetensors_cannot_hold_is_refused(tmp_path):
    paths = write_files(tmp_path, 2, _extra_state=lambda i: "text")
    with pytest.raises(CheckpointError, match=r"`_extra_state` is no dense tensor, which \.safetensors cannot hold"):
        average_checkpoints(paths, tmp_path / "out.safetensors")
    for kind in ("complex32", "complex128"):
        paths = write_files(tmp_path, 2, z=lambda i, kind=kind: torch.ones(1).to(getattr(torch, kind)))
        with pytest.raises(CheckpointError, match=rf"`z` is torch\.{kind}, which \.safetensors cannot hold"):
            average_checkpoints(paths, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_damaged_safetensors_headers_are_refused(tmp_path):
    (good,) = write_files(tmp_path, 1)
    texts = ["[]", '{"a": 1}', '{"a": {"dtype": "F32"}}', "no json"]
    for text in texts:
        file = tmp_path / "x.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text.encode())
        with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read as a checkpoint: "):
            average_checkpoints([good, file])


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2", "I4"])
def test_safetensors_numbers_of_less_than_a_byte_are_refused_by_name(tmp_path, code):
    """As the format's own library counts them: several numbers to a byte."""
    (good,) = write_files(tmp_path, 1)
    file = tmp_path / "x.safetensors"
    text = f'{{"a.weight": {{"dtype": "{code}", "shape": [8], "data_offsets": [0, 4]}}}}'
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + b"1234")
    message = rf"x\.safetensors .*: `a\.weight` has the dtype '{code}', which is not known"
    with pytest.raises(CheckpointError, match=message):
        average_checkpoints([good, file])
