"""Four ranks on one mesh after another: every gradient is that of the window, every average the recursion's."""

from itertools import pairwise

import pytest
import torch

from lightning_plugins import ConstantDecay, PowerDecay, extract_weights, synthesize_ema
from tests.support import conditions
from tests.support.accumulation_runs import errors_of
from tests.support.mesh_worker import CANCELLED, DECAY, RANKS, SETUPS, case_of, every_setup
from tests.support.ranks import run_ranks

# the window of every setup is carried into the second epoch
pytestmark = conditions.carry_under_fsdp1
NAMES = [name for name in SETUPS if conditions.HAS_FSDP2_ON_CPU or name.startswith("fsdp1")]
MORE = ["effective_batch_size", "cancelled"] if conditions.HAS_FSDP2_ON_CPU else []
RESUMED = [name for name in NAMES if name != "activation checkpointing"]
# parameters and activations in bfloat16
BOUND = dict.fromkeys(NAMES, 1e-13) | {"mixed precision": 0.02}
DATA_RANKS = {"fsdp2 x tensor parallel": 2, "tensor parallel": 1, "distributed checkpoints": 2}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder of the files, and what the four ranks saw, from one launch for all setups."""
    folder = tmp_path_factory.mktemp("meshes")
    run_ranks(every_setup, str(folder), [*NAMES, *MORE], world_size=RANKS)
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def alike(found, expected, name):
    """The same in every bit; FSDP1 adds the batches of a window up before the ranks, and after a resume else."""
    if not name.startswith("fsdp1"):
        return same(found, expected)
    return all(torch.allclose(found[key], value, rtol=1e-13, atol=1e-15) for key, value in expected.items())


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_the_window_of_all_data_parallel_ranks(ranks, name):
    """In pieces, over the end of an epoch, and whatever shards the weights."""
    for rank in ranks[1]:
        case = case_of(name)
        assert rank[name]["global_step"] == len(case.windows)
        assert max(errors_of(case, rank[name]["steps"], ranks=DATA_RANKS.get(name, RANKS))) <= BOUND[name]


@pytest.mark.parametrize("name", NAMES)
def test_average_is_the_recursion_over_the_weights(ranks, name):
    for rank in ranks[1]:
        found = rank[name]
        weights = [step["weights"] for step in found["steps"]]
        weights.append({key.removeprefix("net."): value for key, value in found["raw"].items()})
        for average, decay in (("average", ConstantDecay(DECAY)), ("power", PowerDecay(0.1))):
            for key, value in found[average].items():
                expected = weights[0][key.removeprefix("net.")].double()
                for n, after in enumerate(weights[1:], 1):
                    expected = decay(n) * expected + (1 - decay(n)) * after[key.removeprefix("net.")].double()
                bound = 1e-6 if value.dtype == torch.float32 else 1e-14
                torch.testing.assert_close(value.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", NAMES)
def test_files_hold_both_sets_and_plain_names(ranks, name):
    folder, (first, *_) = ranks
    path = folder / name / "epoch=1.ckpt"
    assert list(first[name]["average"]) == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    assert same(extract_weights(path), first[name]["average"])
    assert same(extract_weights(path, "raw"), first[name]["raw"])
    snapshot = synthesize_ema(folder / name / "snapshots", 0.1)
    assert {key: value.shape for key, value in snapshot.items()} == {
        key: value.shape for key, value in first[name]["raw"].items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_averaged_file_is_the_mean_of_the_files(ranks, name):
    folder, (first, *_) = ranks
    files = [extract_weights(folder / name / f"epoch={epoch}.ckpt") for epoch in (0, 1)]
    averaged = torch.load(first[name]["averaged"], weights_only=True)["state_dict"]
    for key, value in averaged.items():
        mean = (files[0][key].double() + files[1][key].double()) / 2
        torch.testing.assert_close(value, mean.to(value.dtype), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_in_mid_window_is_bit_for_bit(ranks, name):
    for rank in ranks[1]:
        whole, resumed = rank[name], rank[name, "resumed"]
        assert len(resumed["steps"]) == 3
        for step, expected in zip(resumed["steps"], whole["steps"][2:], strict=True):
            assert alike(step["gradient"], expected["gradient"], name)
        assert alike(resumed["average"], whole["average"], name)
        assert alike(resumed["raw"], whole["raw"], name)


@pytest.mark.parametrize("name", NAMES)
def test_an_update_of_the_average_runs_no_collective(ranks, name):
    for rank in ranks[1]:
        assert rank[name]["collectives"] == [0] * 2 * len(case_of(name).windows)


@conditions.fsdp2_on_cpu
def test_ranks_that_share_a_batch_are_one_in_the_effective_batch_size(ranks):
    assert [rank["effective_batch_size"] for rank in ranks[1]] == [((0, 2),)] * RANKS


@conditions.fsdp2_on_cpu
def test_a_batch_that_one_rank_cancels_is_cancelled_for_those_that_share_it(ranks):
    for rank in ranks[1]:
        assert rank["cancelled"]["global_step"] == 5
        assert max(errors_of(CANCELLED, rank["cancelled"]["steps"], ranks=2)) <= 1e-13


def test_steps_are_those_of_one_run(ranks):
    """Each gradient leads to the weights of the next step: what was looked at is one training."""
    for name in NAMES:
        steps, momentum = ranks[1][0][name]["steps"], {}
        for before, after in pairwise(steps):
            for key, value in before["weights"].items():
                momentum[key] = 0.9 * momentum.get(key, 0) + before["gradient"][key]
                torch.testing.assert_close(after["weights"][key], value - 0.2 * momentum[key], rtol=1e-6, atol=1e-6)
