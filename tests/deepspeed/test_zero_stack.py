"""Rates, statistics, files, events and an average beside accumulation under ZeRO 1, 2 and 3, against a plain loop."""

import math

import pytest
import torch

from tests.deepspeed import zero_runs, zero_stack
from tests.deepspeed.references import full_batch_trajectory, recursion, windows_of
from tests.support.ranks import run_ranks

TRAINED = [zero_runs.Batches(sizes, seed=rank).batches for rank, sizes in enumerate(zero_runs.SIZES)]
# WarmupCosine(warmup=2) over 6 steps of a rate of 0.1
RATES = [0.0, 0.05, *(0.05 * (1 + math.cos(math.pi * step / 4)) for step in range(4))]
# of the steps that the batches of two epochs belong to, whose last window is short
STEP_OF_BATCH = [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(zero_stack.stack, str(tmp_path_factory.mktemp("stack")), timeout=400)


@pytest.mark.parametrize("stage", zero_runs.STAGES)
def test_the_weights_are_those_of_the_scheduled_rates_and_so_is_their_average(ranks, stage):
    trajectory = full_batch_trajectory(windows_of(TRAINED, 2, epochs=2), rates=RATES)
    expected = {"weights": trajectory[-1], "average": recursion(trajectory, [0.5] * len(RATES))}
    for rank in ranks:
        found = rank[str(stage)]
        assert found["steps"] == 6
        for kind, weights in expected.items():
            for name, value in weights.items():
                weight = torch.tensor(found[kind][name], dtype=torch.float64)
                torch.testing.assert_close(weight, value, rtol=0, atol=3e-7)
        assert found["extracted"]


@pytest.mark.parametrize("stage", zero_runs.STAGES)
def test_the_files_have_every_batch_and_its_rate(ranks, stage):
    rows = ranks[0][str(stage)]["rows"]
    assert [(int(row["epoch"]), int(row["batch"])) for row in rows] == [(e, b) for e in (1, 2) for b in range(1, 6)]
    assert [float(row["lr"]) for row in rows] == pytest.approx([RATES[step] for step in STEP_OF_BATCH], abs=1e-12)
    assert ranks[0][str(stage)]["board"] == 2


@pytest.mark.parametrize("stage", zero_runs.STAGES)
def test_statistics_are_those_of_all_ranks(ranks, stage):
    first, second = (rank[str(stage)] for rank in ranks)
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert first["metrics"][name] == second["metrics"][name]
    assert first["metrics"]["val_loss"] == pytest.approx(first["metrics"]["val_own"], rel=1e-5)
    # of the second epoch, batch by batch
    last = [loss for rank in (first, second) for loss in rank["losses"][5:]]
    assert first["metrics"]["train_loss"] == pytest.approx(sum(last) / len(last), rel=1e-5)


@pytest.mark.parametrize("stage", zero_runs.STAGES)
def test_events_come_with_every_batch(ranks, stage):
    for rank in ranks:
        events = rank[str(stage)]["events"]
        assert events["fitStart"] == events["fitEnd"] == 1
        assert events["trainingStart"] == events["trainingEnd"] == events["validationEnd"] == 2
        assert events["updateStart"] == len(STEP_OF_BATCH)
        assert events["batchEnd"] == len(STEP_OF_BATCH) + 4


def test_a_clock_that_cannot_be_right_is_refused(ranks):
    for rank in ranks:
        assert "`clock` must be 'attempted' under DeepSpeed" in rank["refused"]
