"""Accumulated gradients under ZeRO 1, 2 and 3 are the full batch's, in unequal and in incomplete windows."""

import pytest
import torch

from tests.deepspeed import zero_runs
from tests.deepspeed.references import full_batch_steps, windows_of
from tests.support.ranks import run_ranks

UNEQUAL = [zero_runs.Batches(sizes, seed=rank).batches for rank, sizes in enumerate(zero_runs.SIZES)]
EQUAL = [zero_runs.Batches((4,) * 5, seed=rank).batches for rank in range(2)]


def window(begin, end):
    return [batch for batches in UNEQUAL for batch in batches[begin:end]]


# one batch in each of the first two windows, then three: the epoch's end makes one of two
SCHEDULED = [window(0, 1), window(1, 2), window(2, 3), window(3, 5), window(0, 3), window(3, 5)]
EXPECTED = {
    "batches": lambda: full_batch_steps(windows_of(UNEQUAL, 2, epochs=2)),
    "clipped": lambda: full_batch_steps(windows_of(UNEQUAL, 2), clip=0.05),
    "schedule": lambda: full_batch_steps(SCHEDULED),
    "effective": lambda: full_batch_steps(windows_of(EQUAL, 2)),
}
STEPS = {"batches": 6, "clipped": 3, "schedule": 6, "effective": 3}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(zero_runs.accumulation, timeout=400)


@pytest.mark.parametrize("case", EXPECTED)
@pytest.mark.parametrize("stage", zero_runs.STAGES)
def test_the_gradient_is_that_of_the_mean_over_the_window_on_all_ranks(ranks, stage, case):
    expected = EXPECTED[case]()
    for rank in ranks:
        found = rank[f"{stage} {case}"]
        # DeepSpeed steps where Lightning does, also at the end of an epoch that is no multiple of the window
        assert found["steps"] == [STEPS[case]] * 2
        assert found["weights"].keys() == expected.keys()
        for name, value in found["weights"].items():
            torch.testing.assert_close(torch.tensor(value, dtype=torch.float64), expected[name], rtol=0, atol=3e-7)


def test_what_cannot_be_exact_is_refused(ranks):
    for rank in ranks:
        assert "The nearest to CPUDeepSpeed is GradientAccumulation without carry." in rank["refused carry"]
        assert "needs ZeRO of stage 1, 2 or 3, got 0" in rank["refused stage 0"]
