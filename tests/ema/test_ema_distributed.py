"""Two real processes on one machine: DDP ranks agree, FSDP2 ranks average their shards."""

import signal

import pytest
import torch
from torch import nn

from lightning_plugins import (
    EMA,
    ConstantDecay,
    LatestWeightAveraging,
    WarmupDecay,
    average_checkpoints,
    extract_weights,
    synthesize_ema,
)
from lightning_plugins.checkpoints.record import read_record
from tests.support import ema_distributed
from tests.support.ema_distributed import launch
from tests.support.ema_runs import Net, clone_state, regression, same, trainer
from tests.support.ranks import ended_ranks


def whole_run(decay, epochs, *others, **kwargs):
    """The unsharded twin of the runs below: same data on both ranks, so the mean gradient is each rank's own."""
    torch.manual_seed(0)
    module = Net(width=5)
    module.net[1] = nn.Identity()
    ema = EMA(decay)
    seen = {}

    def validation_step(batch, batch_idx, original=module.validation_step):
        original(batch, batch_idx)
        if batch_idx == 0:
            seen["first"] = module(batch[0]).detach().clone()

    module.validation_step = validation_step
    trainer(ema, *others, max_epochs=epochs, **kwargs).fit(module, regression(), regression(n=8, seed=9))
    return ema, seen["first"]


def close(a, b, tolerance=1e-6):
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module", params=["fsdp1", "fsdp2"])
def sharded(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return directory, launch(getattr(ema_distributed, request.param), directory)


def test_ddp_ranks_agree_bit_for_bit(tmp_path):
    """Two ranks with different data hold one average, which is the formula's over their common weights."""
    first, second = launch(ema_distributed.ddp, tmp_path)
    for key in ("average", "slow", "raw"):
        parameters = {k: v for k, v in first[key].items() if "running" not in k and "batches" not in k}
        assert all(torch.equal(value, second[key][k]) for k, value in parameters.items()), key
    names = [name for name, _ in Net(width=5).named_parameters()]
    assert all(torch.equal(first["module"][name], first["average"][name]) for name in names)
    assert same(extract_weights(tmp_path / "end.ckpt"), first["average"])
    assert same(extract_weights(tmp_path / "end.ckpt", "raw"), first["raw"])
    assert same(extract_weights(tmp_path / "end.ckpt", name="slow"), first["slow"])
    assert same(extract_weights(first["file"]), first["average"])  # weights-only, scored last
    assert same(first["samples"], first["steps"])  # 64 samples are 8 steps of 2 ranks with 4 each


def test_sharded_average_equals_the_unsharded_one(sharded):
    directory, ranks = sharded
    # uneven and empty shards are among them
    assert [rank["empty"] for rank in ranks] == {"fsdp1": [2, 1], "fsdp2": [0, 2]}[directory.name[:5]]
    latest = LatestWeightAveraging(**ema_distributed.LATEST)
    ema, seen = whole_run(ConstantDecay(0.8), 2, latest)
    for rank in ranks:
        close(rank["average"], ema.average_state_dict())
        close(rank["latest"], latest.average_state_dict())
        close(rank["raw"], ema.raw_state_dict())
        torch.testing.assert_close(rank["seen"], seen, rtol=1e-5, atol=1e-6)  # validation used the average
    assert same(ranks[0]["average"], ranks[1]["average"])


def test_sharded_files_hold_both_sets(sharded):
    directory, ranks = sharded
    for path in (directory / "end.ckpt", directory / "full" / "epoch=1.ckpt"):
        assert same(extract_weights(path), ranks[0]["average"])
        assert same(extract_weights(path, "raw"), ranks[0]["raw"])
        assert same(extract_weights(path, name="lawa"), ranks[0]["latest"])
    (light,) = (directory / "weights").glob("epoch=1*.ckpt")
    assert same(extract_weights(light), ranks[0]["average"])
    with pytest.raises(ValueError, match="it is a weights-only file"):
        extract_weights(light, "raw")


def test_other_weights_that_the_first_rank_puts_into_a_sharded_runs_file_stay_there(sharded):
    assert torch.load(sharded[0] / "own.ckpt", weights_only=True)["state_dict"] == {"own": torch.ones(1)}


def test_sharded_resume_is_bit_for_bit(sharded):
    for rank in sharded[1]:
        assert same(rank["resumed_average"], rank["average"])
        assert same(rank["resumed_latest"], rank["latest"])
        assert same(rank["resumed_raw"], rank["raw"])


def test_sharded_validation_after_fit_uses_the_average(sharded):
    for rank in sharded[1]:
        torch.testing.assert_close(rank["validated"], rank["seen"], rtol=1e-6, atol=1e-7)
        assert same(rank["validated_raw"], rank["raw"])


def test_sharded_resume_on_another_number_of_ranks(sharded):
    directory, ranks = sharded
    fsdp1 = directory.name.startswith("fsdp1")
    (alone,) = launch(ema_distributed.other_ranks_fsdp1 if fsdp1 else ema_distributed.other_ranks, directory, ranks=1)
    close(alone["average"], ranks[0]["average"])
    close(alone["raw"], ranks[0]["raw"])


def test_sharded_half_precision_keeps_the_wide_average(sharded):
    for rank in sharded[1]:
        assert all(value.dtype == torch.float32 for value in rank["half_average"].values())
        assert all(value.dtype == torch.bfloat16 for value in rank["half_raw"].values())
        assert same(rank["again_average"], rank["half_average"])
        assert same(rank["again_raw"], rank["half_raw"])


def test_sharded_module_is_raw_after_a_crash_in_validation(sharded):
    ema, _ = whole_run(WarmupDecay(0.9), 1)
    for rank in sharded[1]:
        assert same(rank["crashed_raw"], rank["kept_raw"])
        close(rank["crashed_raw"], ema.raw_state_dict())


def test_hidden_parameters_are_refused_by_name(sharded):
    directory, ranks = sharded
    named = "`use_orig_params` must be True under FSDP1, got False" if directory.name[:5] == "fsdp1" else ""
    assert all(named in rank["refused"] for rank in ranks)


@pytest.mark.parametrize("sharded", ["fsdp1"], indirect=True)
def test_sharded_files_of_fsdp1_resume_bit_for_bit(sharded):
    """Every rank writes its part of the average; the raw weights lie beside it."""
    directory, ranks = sharded
    for rank, first in enumerate(ranks):
        found = torch.load(directory / f"fsdp1-parts-{rank}.pt", weights_only=True)
        for when in ("whole", "resumed"):
            assert same(found[f"{when}_average"], first["average"])
            assert same(found[f"{when}_raw"], first["raw"])
            assert same(found[f"{when}_latest"], first["latest"])
        assert same(found["resumed_slow"], found["whole_slow"])
    means = [average_checkpoints([directory / kind / f"epoch={n}.ckpt" for n in (0, 1)]) for kind in ("parts", "full")]
    assert same(*means)
    for kind in ("parts", "full"):
        assert same(extract_weights(directory / kind / "epoch=1.ckpt"), ranks[0]["average"])
        assert same(extract_weights(directory / kind / "epoch=1.ckpt", "raw"), ranks[0]["raw"])
    assert same(extract_weights(directory / "parts" / "epoch=1.ckpt", name="slow"), found["whole_slow"])


@pytest.mark.parametrize("sharded", ["fsdp1"], indirect=True)
def test_a_directory_of_fsdp1_of_two_saves_is_refused(sharded):
    """Files have the same names and sizes in both, and the index the same places."""
    directory, _ = sharded
    old, new = (directory / "parts" / f"epoch={n}.ckpt" for n in (0, 1))
    assert [path.name for path in sorted(old.iterdir())] == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
    places = sorted((directory / "mixtures").iterdir())
    assert len(places) == 3 + 2 * 4
    for rank in range(2):
        messages = torch.load(directory / f"fsdp1-parts-{rank}.pt", weights_only=True)["refused"]
        assert list(messages) == [place.name for place in places]
        assert all(message.startswith("CheckpointError: ") for message in messages.values())
    for place in places:
        for read in (extract_weights, read_record, lambda path: average_checkpoints([path, new])):
            with pytest.raises(ValueError, match=r"incomplete: it(s .*, of step (8|16), are of| has no)") as error:
                read(place)
            assert str(error.value).startswith(str(place))
            assert "\n" not in str(error.value)
        assert str(error.value) == messages[place.name].removeprefix("CheckpointError: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".metadata", r"it has no \.metadata, which is written when all others are there"),
        ("meta.pt", r"its \.metadata and meta\.pt, of step 8, are of different saves"),
    ],
)
def test_a_run_of_fsdp1_that_is_killed_while_it_replaces_a_directory(tmp_path, name, message):
    (rank,) = ended_ranks(ema_distributed.killed, str(tmp_path), name, world_size=1)
    assert rank.code == -signal.SIGKILL, rank.output[-2000:]
    place = tmp_path / "same.ckpt"
    assert torch.load(place / "meta.pt", weights_only=True)["global_step"] == 8
    with pytest.raises(ValueError, match=message):
        extract_weights(place)


def test_sharded_snapshots_are_written_whole(sharded):
    directory, ranks = sharded
    state = synthesize_ema(directory / "snapshots", 0.1)
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in ranks[0]["average"].items()
    }
    module = Net(width=5)
    module.net[1] = nn.Identity()
    module.load_state_dict(state)
    assert clone_state(module)
