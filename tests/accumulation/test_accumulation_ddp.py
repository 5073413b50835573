"""Two real processes: every step's gradient is that of the mean over the windows of both."""

import dataclasses

import pytest
import torch

from tests.support.accumulation_cases import BOUND, CASES, SHARDED
from tests.support.accumulation_runs import errors_of, relative_error
from tests.support.accumulation_worker import every_case
from tests.support.microbatch_cases import MICRO, close
from tests.support.ranks import run_ranks

PIECES = [(name, accumulate) for name in MICRO for accumulate in (1, 2) if name != "whole"]
PIECES += [(f"fsdp2 in pieces of {size}", 1) for size in (1, 3)]
# parameters that no rank uses, or one
PIECES += [(name, unused) for name in ("pieces of 3", "auto on rank 1") for unused in ("everywhere", "but on rank 1")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks saw, from one pair of processes for all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(every_case, str(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_windows_of_both_ranks(ranks, name, dtype, rank):
    case = dataclasses.replace(CASES[name], dtype=dtype)
    steps, global_step = ranks[rank]["ddp", name, dtype]
    assert global_step == len(case.windows)
    assert max(errors_of(case, steps, ranks=2)) <= BOUND[dtype]
    assert max(errors_of(case, steps, ranks=2, what="applied")) <= BOUND[dtype]


@pytest.mark.parametrize("name", SHARDED)
def test_gradient_is_right_when_fsdp2_shards_the_weights(ranks, name):
    steps, global_step = ranks[0]["fsdp2", name, torch.float32]
    assert global_step == len(CASES[name].windows)
    assert max(errors_of(CASES[name], steps, ranks=2)) <= BOUND[torch.float32]
    assert max(errors_of(CASES[name], steps, ranks=2, what="applied")) <= BOUND[torch.float32]


@pytest.mark.parametrize("name", [name for name in SHARDED if CASES[name].clip is None])
def test_gradient_is_right_when_fsdp1_shards_the_weights(ranks, name):
    steps, global_step = ranks[0]["fsdp1", name, torch.float32]
    assert global_step == len(CASES[name].windows)
    assert max(errors_of(CASES[name], steps, ranks=2)) <= BOUND[torch.float32]


def test_bfloat16_is_right_up_to_its_own_rounding(ranks):
    steps, _ = ranks[0]["bf16"]
    assert max(errors_of(CASES["uneven batches, short last window"], steps, ranks=2)) < 0.02


def test_stock_lightning_is_far_off_in_the_same_run(ranks):
    """The bound would notice: without the callback the same run is wrong by more than a tenth."""
    steps, _ = ranks[0]["stock"]
    assert min(errors_of(CASES["uneven batches, short last window"], steps, ranks=2)) > 0.1


def test_a_step_costs_one_scalar_collective(ranks):
    """Three steps, one more collective of one number each, and a broadcast at the first batch for the reference."""
    stock, ours = ranks[0]["collectives"]
    assert len(ours["all_reduce"]) == len(stock["all_reduce"]) + 3
    assert set(ours["all_reduce"]) == {1}
    assert ours["broadcast_object_list"] == stock["broadcast_object_list"] + 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("name", "accumulate"), PIECES)
def test_pieces_have_the_gradient_of_the_whole_batch(ranks, name, accumulate, rank):
    key = ("micro", name, accumulate)
    pieces, whole = ranks[rank][key], ranks[rank]["micro", "whole", accumulate]
    assert pieces["global_step"] == whole["global_step"]
    assert pieces["zeroed"] == whole["zeroed"]
    assert close(pieces["unused"], whole["unused"])
    for step, expected in zip(pieces["steps"], whole["steps"], strict=True):
        assert relative_error(step["gradient"], expected["gradient"]) <= 1e-14
    for batch, expected in zip(pieces["batches"], whole["batches"], strict=True):
        assert close(batch["logged"], expected["logged"])
        assert close(batch["outputs"], expected["outputs"])


@pytest.mark.parametrize(("name", "found"), [("auto", 2), ("auto on rank 1", 3), ("auto that fits", None)])
def test_ranks_agree_on_the_size(ranks, name, found):
    assert [results["micro", name, 1]["found"] for results in ranks] == [found, found]


def test_ranks_settle_on_a_size_and_then_take_ddps_own_way(ranks):
    """14 batches; the size is found at the first, and the last one runs unguarded."""
    assert [results["micro", "auto on rank 1", 1]["settled"] for results in ranks] == [True, True]


def test_no_rank_waits_for_one_that_nothing_fits_on(ranks):
    assert ranks[0]["nothing fits"].startswith("Another rank ran out of memory with a single sample.")
    assert ranks[1]["nothing fits"].startswith(
        "CUDA out of memory (simulated).\nMicroBatching found no size that fits."
    )


def test_resuming_in_a_carried_window_goes_on_with_it(ranks):
    """The checkpoint holds the sum over the ranks; resumed, the next step is that of the uninterrupted run."""
    for results in ranks:
        whole, resumed = results["carried"]
        assert len(whole) == 5
        assert len(resumed) == 3
        for step, expected in zip(resumed, whole[2:], strict=True):
            assert relative_error(step["gradient"], expected["gradient"]) <= 1e-14
