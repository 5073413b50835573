"""A run with distributed checkpoints is killed anywhere, also while it writes one; what it ends as is what it would be.

The counts at the end of the test run say how often; ``make torture`` does it many times, from a seed of its own.
"""

import csv
import random
import shutil
import signal
from collections import Counter

import pytest
import torch

from lightning_plugins import extract_weights
from tests.support import counts
from tests.support.conditions import fsdp2_on_cpu
from tests.support.distributed_survival import train
from tests.support.ranks import ended_ranks, run_ranks
from tests.support.survival_evidence import equal

pytestmark = [pytest.mark.slow, fsdp2_on_cpu]
KILLS = counts.wanted(3, 40)


def rows(directory):
    with (directory / "run" / "log.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "time"} for row in csv.DictReader(file)]


def outcome(directory):
    """What both ranks had in memory at the end, and the log."""
    ranks = [torch.load(directory / f"train-{rank}.pt", weights_only=True) for rank in range(2)]
    return ranks, rows(directory)


def fault(path):
    """Return why a checkpoint is refused, ``""`` for one that holds both sets."""
    try:
        assert all(extract_weights(path, which) for which in ("average", "raw"))
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def newest_whole(directory):
    """Return the checkpoint to go on from, and how many were refused: each in one line that names it."""
    faults = {path: fault(path) for path in (directory / "run" / "checkpoints").glob("*.ckpt")}
    for path, text in faults.items():
        assert not text or (str(path) in text and "\n" not in text)
    whole = [path for path, text in faults.items() if not text]
    steps = {path: torch.load(path / "meta.pt", weights_only=True)["global_step"] for path in whole}
    return max(whole, key=lambda path: (steps[path], path.name), default=None), len(faults) - len(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    (directory / "run").mkdir()
    return run_ranks(train, str(directory), timeout=300), outcome(directory)


def test_a_rank_that_is_killed_anywhere_changes_nothing_in_the_end(whole, tmp_path, record_property):
    moments, truth = whole
    found, refused = Counter(), 0
    for index in range(KILLS):
        directory, rng = tmp_path / str(index), random.Random(f"{counts.seed()} {index}")
        (directory / "run").mkdir(parents=True)
        dying, moment = rng.randrange(2), ("file", "training", "file")[index % 3]
        number = rng.randint(1, moments[dying][moment])
        story = f"SEED={counts.seed()}, kill {index}: rank {dying} at {moment} {number} of {moments[dying][moment]}"
        ended = ended_ranks(train, str(directory), moment, number, dying, timeout=300)
        path, bad = newest_whole(directory)
        refused += bad
        if ended[dying].code == -signal.SIGKILL:
            found[f"SIGKILL of a rank, {moment}"] += 1
            run_ranks(train, str(directory), "", 0, 0, path and str(path), timeout=300)
        else:
            # which rank makes a directory is chance, so the last moments may not come
            assert all(rank.code == 0 for rank in ended), (story, ended[dying].output[-2000:])
        (ranks, log), (true_ranks, true_log) = outcome(directory), truth
        for one, true in zip(ranks, true_ranks, strict=True):
            rates = true["rates"][len(true["rates"]) - len(one["rates"]) :]
            assert equal(one, {**true, "rates": rates}), story
        assert log == true_log, story
        shutil.rmtree(directory)
    assert sum(found.values()) > KILLS // 2
    counts.record(record_property, "distributed kills", found, f"SEED={counts.seed()}, {refused} directories refused")
