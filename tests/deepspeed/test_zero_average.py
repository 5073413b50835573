"""EMA under ZeRO 1, 2 and 3 averages the float32 masters, evaluates with them, and finds them again in its files."""

import pytest

from tests.deepspeed import zero_averages, zero_runs
from tests.support.ranks import run_ranks

CASES = [f"{stage} {precision}" for stage in zero_runs.STAGES for precision in ("bf16-true", "32-true")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(zero_averages.averages, str(tmp_path_factory.mktemp("averages")), timeout=550)


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    return run_ranks(zero_averages.beside, str(tmp_path_factory.mktemp("beside")), timeout=400)


@pytest.mark.parametrize("case", CASES)
def test_the_average_is_the_recursion_over_the_masters(ranks, case):
    for rank in ranks:
        found = rank[case]
        assert found["steps"] == [12, 12]
        assert found["error"] < 1e-6 < found["moved"]
        assert found["raw"]
        assert found["complete"]
        assert found["latest error"] < 1e-7
        assert found["power error"] < 1e-6
        assert found["power complete"]


@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_sees_the_average_and_leaves_masters_and_weights_bit_for_bit(ranks, case):
    for rank in ranks:
        found = rank[case]
        assert found["shown"] < 1e-6
        assert found["exchanged"]
        assert found["restored"]


@pytest.mark.parametrize("case", CASES)
def test_directories_hold_both_sets_whenever_they_are_written(ranks, case):
    for rank in ranks:
        found = rank[case]
        assert found["extracted"]
        assert found["after"]
        assert found["after raw"] == 0
        # in an evaluation, while the average is in the masters
        assert found["evaluating"]
        assert found["evaluating raw"] == 0


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(ranks, case):
    for rank in ranks:
        assert rank[case]["resumed"]
        assert rank[case]["resumed raw"]
        assert rank[case]["resumed latest"]
        assert rank[case]["resumed power"]
        assert rank[case].get("evaluated", case.startswith("3"))
        assert rank[case]["evaluated again"]


@pytest.mark.parametrize("case", CASES)
def test_what_a_kill_leaves_is_refused(ranks, case):
    for number, rank in enumerate(ranks):
        mixed, short = rank[case]["cut off"]
        assert "are of several steps (6, 12)" in mixed
        assert "lacks the parts of some ranks" in short
        mixed, short = rank[case]["not resumed"]
        assert "must be of step 6, as the weights there, got step 12" in mixed
        assert ("ema.00001-of-00002.pt is missing" if number else "Another rank could not read") in short
        assert mixed.startswith("MisconfigurationException")


@pytest.mark.parametrize("stage", zero_runs.STAGES)
def test_steps_that_overflow_are_not_counted(beside, stage):
    for rank in beside:
        found = rank[str(stage)]
        steps, skipped, changed, counted = found["steps"]
        assert steps == 12
        assert 0 < skipped < 9
        assert changed == counted == steps - skipped
        assert found["error"] < 1e-6


@pytest.mark.parametrize("stage", zero_runs.STAGES)
def test_an_update_has_no_collective(beside, stage):
    for rank in beside:
        assert rank[str(stage)]["collectives"]["update"] == 0
        assert rank[str(stage)]["collectives"]["exchange"]


@pytest.mark.parametrize("stage", zero_runs.STAGES)
def test_several_averages_lie_in_one_directory(beside, stage):
    for rank in beside:
        found = rank[str(stage)]
        assert found["written"]
        assert found["slow"]
        assert found["differs"]
        assert found["frozen"] == ["frozen.bias", "frozen.weight"]
        assert "got 'none'; it has 'ema', 'slow/2 %'" in found["unknown"]
        assert "holds objects of DeepSpeed, which its own conversion opens" in found["untrusted"]
