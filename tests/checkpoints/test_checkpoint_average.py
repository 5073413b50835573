"""The mean itself, against NumPy in float64, and the files it comes from and goes to."""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch

from lightning_plugins import average_checkpoints
from lightning_plugins.checkpoints import CheckpointError, plan_average, read_manifest, weights_digest
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.support.checkpoints_models import Regressor, assert_is_mean, float64_mean, write_files


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_equals_the_float64_mean_and_keeps_the_dtype(tmp_path, count, dtype):
    paths = write_files(tmp_path, count, half=lambda i: torch.randn(11, 3).to(dtype))
    state = average_checkpoints(paths)
    assert_is_mean(state, float64_mean(paths))
    assert state["half"].dtype == dtype
    assert state["a.weight"].dtype == torch.float32


def test_a_tensor_longer_than_a_chunk_equals_the_float64_mean(tmp_path):
    paths = write_files(tmp_path, 3, long=lambda i: torch.randn((1 << 20) + 3), brief=lambda i: torch.randn(1 << 20))
    assert_is_mean(average_checkpoints(paths), float64_mean(paths))


def test_weights_are_normalized_and_applied_in_the_order_of_the_paths(tmp_path):
    paths = write_files(tmp_path, 4)
    weights = [0, 3, 1, 4]
    assert_is_mean(average_checkpoints(paths, weights=weights), float64_mean(paths, weights))


def test_float64_accumulation_rounds_once(tmp_path):
    paths = write_files(tmp_path, 7)
    state = average_checkpoints(paths, dtype=torch.float64)
    for name, expected in float64_mean(paths).items():
        np.testing.assert_array_equal(state[name].numpy(), expected.astype(np.float32))
    assert state["a.weight"].dtype == torch.float32
    again = average_checkpoints(paths, dtype="float64")
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_a_mean_in_bfloat16_is_that_of_float32_rounded_once(tmp_path):
    """Accumulated in bfloat16, 1 + 1/128 and seven ones would give 1."""
    values = [1.0] * 7 + [1.0 + 2 * 2**-7 * 4]
    paths = write_files(tmp_path, 8, half=lambda i: torch.tensor([values[i]], dtype=torch.bfloat16))
    assert average_checkpoints(paths)["half"].item() == 1.0 + 2**-7


def test_equal_files_give_back_their_own_numbers(tmp_path):
    value = torch.randn(1000) * 1e3
    paths = write_files(tmp_path, 7, same=lambda i: value)
    assert torch.equal(average_checkpoints(paths)["same"], value)


def test_the_mean_of_huge_numbers_does_not_overflow(tmp_path):
    huge = torch.finfo(torch.float32).max
    paths = write_files(
        tmp_path, 3, huge=lambda i: torch.full((3,), huge), half=lambda i: torch.full((3,), 65504.0).half()
    )
    state = average_checkpoints(paths)
    assert state["huge"].tolist() == [huge] * 3
    assert state["half"].tolist() == [65504.0] * 3


def test_complex_tensors_are_averaged(tmp_path):
    paths = write_files(tmp_path, 3, z=lambda i: torch.complex(torch.tensor([float(i)]), torch.tensor([2.0 * i])))
    state = average_checkpoints(paths)
    assert state["z"].dtype == torch.complex64
    assert torch.allclose(state["z"], torch.tensor([1 + 2j]))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("weights", [None, [1, 2, 4]])
@pytest.mark.parametrize("kind", [torch.complex32, torch.complex64, torch.complex128])
def test_complex_numbers_of_every_width_are_the_rounded_mean_of_their_parts(tmp_path, kind, weights):
    """Against NumPy, which rounds its float64 to float16 in one step; one of the files holds a lazy conjugate."""
    rows = np.random.default_rng(0).normal(size=(3, 1000, 2))
    parts = {torch.complex32: np.float16, torch.complex64: np.float32, torch.complex128: np.float64}[kind]
    rows = rows.astype(parts)
    numbers = [torch.view_as_complex(torch.from_numpy(row)) for row in rows]
    numbers[1] = torch.view_as_complex(torch.from_numpy(rows[1] * np.array([1, -1], parts))).conj()
    paths = write_files(tmp_path, 3, z=lambda i: numbers[i])
    expected = np.average(rows.astype(np.float64), axis=0, weights=weights).astype(parts)
    written = average_checkpoints(paths, tmp_path / "out.ckpt", weights=weights)
    for state in (average_checkpoints(paths, weights=weights), torch.load(written, weights_only=True)["state_dict"]):
        found = torch.view_as_real(state["z"]).numpy()
        assert found.dtype == parts
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15 if kind == torch.complex128 else 0)
    numbers[2][7] = complex(1, float("nan"))
    paths = write_files(tmp_path, 3, z=lambda i: numbers[i])
    with pytest.raises(CheckpointError, match=r"`z` holds NaN or infinity in .*epoch=2-step=30\.ckpt"):
        average_checkpoints(paths)


def test_integers_booleans_and_other_entries_come_from_the_newest(tmp_path):
    paths = write_files(tmp_path, 3, flag=lambda i: torch.tensor([i == 1]), _extra_state=lambda i: {"note": f"of {i}"})
    newest_first = [paths[1], paths[2], paths[0]]
    state = average_checkpoints(newest_first)
    assert state["count"].item() == 2
    assert state["count"].dtype == torch.int64
    assert state["flag"].item() is False
    assert state["_extra_state"] == {"note": "of 2"}


def test_without_steps_the_later_path_is_the_newest(tmp_path):
    for name in "ab":
        torch.save({"count": torch.tensor(ord(name)), "w": torch.ones(2)}, tmp_path / f"{name}.pt")
    assert average_checkpoints([tmp_path / "b.pt", tmp_path / "a.pt"])["count"].item() == ord("a")


def test_tied_weights_are_averaged_once_and_stay_tied(tmp_path):
    paths = []
    for i in range(3):
        weight = torch.full((4, 2), float(i))
        state = {"embed.weight": weight, "head.weight": weight, "view": weight[:2], "free": weight.clone()}
        torch.save({"state_dict": state, "global_step": i}, tmp_path / f"{i}.ckpt")
        paths.append(tmp_path / f"{i}.ckpt")
    state = average_checkpoints(paths)
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()
    assert state["free"].data_ptr() != state["embed.weight"].data_ptr()
    assert all(value.unique().tolist() == [1.0] for value in state.values())
    written = average_checkpoints(paths, tmp_path / "out.ckpt")
    loaded = torch.load(written, weights_only=True)["state_dict"]
    assert loaded["embed.weight"].data_ptr() == loaded["head.weight"].data_ptr()
    names = [entry for entry in zipfile.ZipFile(written).namelist() if "/data/" in entry]
    assert len(names) == 3


def test_non_contiguous_tensors_are_averaged_by_element(tmp_path):
    paths = write_files(
        tmp_path,
        3,
        t=lambda i: torch.randn(4, 6).t(),
        cl=lambda i: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    )
    assert_is_mean(average_checkpoints(paths), float64_mean(paths))


def test_scalars_and_empty_tensors_pass(tmp_path):
    paths = write_files(tmp_path, 2, scalar=lambda i: torch.tensor(float(i)), empty=lambda i: torch.empty(0, 3))
    state = average_checkpoints(paths)
    assert state["scalar"].item() == 0.5
    assert state["empty"].shape == (0, 3)


def test_inputs_are_not_changed(tmp_path):
    paths = write_files(tmp_path, 3)
    before = [path.read_bytes() for path in paths]
    state = average_checkpoints(paths)
    state["a.weight"].zero_()
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_written_file_holds_the_same_as_the_returned_state(tmp_path, suffix):
    paths = write_files(
        tmp_path, 3, half=lambda i: torch.randn(5).bfloat16(), z=lambda i: torch.randn(2, dtype=torch.complex64)
    )
    state = average_checkpoints(paths)
    written = average_checkpoints(paths, tmp_path / f"out{suffix}")
    assert written == tmp_path / f"out{suffix}"
    loaded = safetensors.torch.load_file(written) if suffix == ".safetensors" else torch.load(written)["state_dict"]
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], state[name]) and loaded[name].dtype == state[name].dtype for name in state)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_the_manifest_names_files_steps_weights_and_digest(tmp_path, suffix):
    paths = write_files(tmp_path, 2)
    (tmp_path / "out").mkdir()
    written = average_checkpoints(paths, tmp_path / "out" / f"mean{suffix}", weights=[1, 3])
    manifest = read_manifest(written)
    assert manifest["files"] == [
        {"path": "../epoch=0-step=10.ckpt", "step": 10, "epoch": 0, "weight": 0.25},
        {"path": "../epoch=1-step=20.ckpt", "step": 20, "epoch": 1, "weight": 0.75},
    ]
    assert manifest["accumulated_in"] == "float64"
    if suffix == ".ckpt":
        loaded = torch.load(written, weights_only=True)
        assert manifest["digest"] == weights_digest(loaded["state_dict"])
        assert (loaded["global_step"], loaded["epoch"]) == (20, 1)
    else:
        with safetensors.safe_open(written, "pt") as file:
            metadata = file.metadata()
            loaded = OrderedDict((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118  # not a mapping
        assert metadata["weights_digest"] == weights_digest({name: loaded[name] for name in average_checkpoints(paths)})
        assert (metadata["global_step"], metadata["epoch"]) == ("20", "1")
        assert json.loads(metadata["checkpoint_averaging"])["newest"] == "../epoch=1-step=20.ckpt"
    assert read_manifest(paths[0]) is None


def test_the_digest_is_sha256_of_names_and_bytes():
    import hashlib

    state = {"w": torch.tensor([1.0, 2.0])}
    text = b"w|torch.float32|(2,)\n" + np.array([1.0, 2.0], dtype=np.float32).tobytes()
    assert weights_digest(state) == "sha256:" + hashlib.sha256(text).hexdigest()


def test_the_written_archive_is_a_sound_zip_and_maps_aligned(tmp_path):
    written = average_checkpoints(write_files(tmp_path, 2), tmp_path / "out.ckpt")
    with zipfile.ZipFile(written) as archive:
        assert archive.testzip() is None
    mapped = torch.load(written, mmap=True, weights_only=True)["state_dict"]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in mapped.values())
    assert torch.serialization.get_unsafe_globals_in_checkpoint(written) == []


def test_equal_inputs_write_equal_bytes(tmp_path):
    paths = write_files(tmp_path, 3)
    files = [average_checkpoints(paths, tmp_path / f"{i}.ckpt").read_bytes() for i in range(2)]
    assert files[0] == files[1]


def test_all_dtypes_survive_a_checkpoint(tmp_path):
    kinds = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.bool]
    kinds += [torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {str(kind): lambda i, kind=kind: torch.tensor([0.0, 1.0]).to(kind) for kind in kinds}
    paths = write_files(tmp_path, 2, **tensors)
    for suffix in (".ckpt", ".safetensors"):
        written = average_checkpoints(paths, tmp_path / f"out{suffix}")
        loaded = torch.load(written)["state_dict"] if suffix == ".ckpt" else safetensors.torch.load_file(written)
        for kind in kinds:
            assert loaded[str(kind)].dtype == kind
            assert loaded[str(kind)].float().tolist() == [0.0, 1.0]


def test_module_versions_in_the_state_dict_are_kept(tmp_path):
    module = torch.nn.BatchNorm1d(3)
    for i in range(2):
        torch.save({"state_dict": module.state_dict(), "global_step": i}, tmp_path / f"{i}.ckpt")
    state = average_checkpoints([tmp_path / "0.ckpt", tmp_path / "1.ckpt"])
    assert state._metadata[""]["version"] == module.state_dict()._metadata[""]["version"]
    written = average_checkpoints([tmp_path / "0.ckpt", tmp_path / "1.ckpt"], tmp_path / "out.ckpt")
    assert torch.load(written)["state_dict"]._metadata == module.state_dict()._metadata


def test_training_state_is_dropped_and_the_rest_is_kept(tmp_path):
    paths = write_files(tmp_path, 2)
    for path in paths:
        content = torch.load(path)
        weights = {name: value + 1 for name, value in content["state_dict"].items()}
        content |= {
            "optimizer_states": [{"state": {0: torch.ones(3)}}],
            "lr_schedulers": [{}],
            "callbacks": {"EMA": {"raw": weights}},
            "current_model_state": weights,
            "hyper_parameters": {"width": 4, "scale": torch.tensor([1.0, 2.0])},
            "my_own_key": [1, 2],
        }
        torch.save(content, path)
    loaded = torch.load(average_checkpoints(paths, tmp_path / "out.ckpt"), weights_only=True)
    assert set(loaded) == {
        "epoch", "global_step", "pytorch-lightning_version", "state_dict", "hyper_parameters", "my_own_key",
        "checkpoint_averaging",
    }  # fmt: skip
    assert loaded["hyper_parameters"]["width"] == 4
    assert loaded["hyper_parameters"]["scale"].tolist() == [1.0, 2.0]
    assert loaded["my_own_key"] == [1, 2]


@pytest.mark.parametrize("kind", ["average", "raw"])
def test_the_record_of_an_ema_says_what_is_averaged_and_is_not_kept(tmp_path, kind):
    """As our EMA writes it, weights-only, with the other set nowhere in the file."""
    paths = write_files(tmp_path, 2)
    for path in paths:
        torch.save(
            torch.load(path) | {"lightning_plugins_ema": {"version": 1, "state_dict": kind, "name": "ema"}}, path
        )
    written = average_checkpoints(paths, tmp_path / "out.ckpt")
    words = {"average": "EMA's averaged weights", "raw": "the raw weights, not EMA's average"}
    assert read_manifest(written)["ema"] == f"`state_dict`, which is averaged, holds {words[kind]}"
    assert "lightning_plugins_ema" not in torch.load(written)
    assert len(plan_average(paths).notes) == 1


def test_safetensors_and_plain_and_lightning_inputs_mix(tmp_path):
    (lightning,) = write_files(tmp_path, 1)
    state = torch.load(lightning)["state_dict"]
    plain, tensors = tmp_path / "plain.pt", tmp_path / "tensors.safetensors"
    torch.save({name: value + 1 for name, value in state.items()}, plain)
    safetensors.torch.save_file({name: value + 5 for name, value in state.items()}, tensors)
    mean = average_checkpoints([lightning, plain, tensors])
    assert torch.allclose(mean["a.weight"], state["a.weight"] + 2, atol=1e-6)
    wrapped = tmp_path / "fabric.pt"
    torch.save({"model": state, "optimizer": {}}, wrapped)
    assert torch.equal(average_checkpoints([lightning, wrapped])["a.bias"], state["a.bias"])


def test_files_of_the_oldest_torch_format_are_read(tmp_path):
    state = {"w": torch.arange(3.0)}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"w": torch.arange(3.0) + 2}, tmp_path / "new.pt")
    assert average_checkpoints([tmp_path / "old.pt", tmp_path / "new.pt"])["w"].tolist() == [1.0, 2.0, 3.0]


def test_load_from_checkpoint_opens_the_mean_of_plain_state_dicts(tmp_path):
    for i in range(2):
        torch.save(Regressor(width=2).state_dict(), tmp_path / f"{i}.pt")
    written = average_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.ckpt")
    module = Regressor.load_from_checkpoint(written, width=2)
    assert_is_mean(module.state_dict(), float64_mean([tmp_path / "0.pt", tmp_path / "1.pt"]))


def test_strict_false_averages_what_is_shared_and_names_the_rest(tmp_path):
    first, second = write_files(tmp_path, 2)
    content = torch.load(second)
    del content["state_dict"]["a.bias"]
    content["state_dict"] |= {"new": torch.ones(1), "count": torch.zeros(2, dtype=torch.int64)}
    content["state_dict"]["a.weight"] = content["state_dict"]["a.weight"].half()
    torch.save(content, second)
    with pytest.warns(LightningPluginsWarning, match="Left out: `a.weight` is float32 in .* and float16 in") as caught:
        state = average_checkpoints([first, second], strict=False)
    assert list(state) == ["a.weight"]
    assert state["a.weight"].dtype == torch.float16
    assert all(name in str(caught[0].message) for name in ("`a.bias`", "`new`", "`count`"))
    with pytest.warns(LightningPluginsWarning):
        written = average_checkpoints([first, second], tmp_path / "out.ckpt", strict=False)
    assert read_manifest(written)["left_out"] == ["a.bias", "count", "new"]


def test_progress_is_shown_when_asked_for(tmp_path, capsys):
    average_checkpoints(write_files(tmp_path, 2), progress=True)
    assert "averaging" in capsys.readouterr().err
    average_checkpoints(write_files(tmp_path, 2))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("place", "second"),
    [
        ("model_ema", lambda weights: weights),
        ("ema", lambda weights: {"shadow": weights}),
        ("trainer", lambda weights: {"averager": {"module": {f"module.{name}": w for name, w in weights.items()}}}),
    ],
)
def test_a_second_set_of_weights_is_not_written_wherever_it_lies(tmp_path, place, second):
    """It would be that of one file, beside the mean of all."""
    paths = write_files(tmp_path, 2)
    for path in paths:
        content = torch.load(path)
        weights = {name: value + 1 for name, value in content["state_dict"].items()}
        torch.save(content | {place: second(weights), "kept": {"a": torch.ones(1)}}, path)
    loaded = torch.load(average_checkpoints(paths, tmp_path / "out.ckpt"), weights_only=True)
    assert place not in loaded
    assert loaded["kept"]["a"].item() == 1
    assert "a second set of weights" in read_manifest(tmp_path / "out.ckpt")["ema"]


def test_a_warning_points_to_the_callers_line(tmp_path):
    first, second = write_files(tmp_path, 2)
    content = torch.load(second)
    del content["state_dict"]["a.bias"]
    torch.save(content, second)
    with pytest.warns(LightningPluginsWarning) as caught:
        average_checkpoints([first, second], strict=False)
    assert caught[0].filename == __file__
