"""Random combinations of Trainer options, callbacks, batches and resume points train as a loop in plain torch does.

``make torture`` tries ten thousand, from a seed of its own (``SEED=...`` repeats one).
"""

import logging
import random
import warnings
from collections import Counter

import pytest
import torch

from tests.support import counts
from tests.support.combinations import Combination, kind_of, plain_loop, with_callbacks

PARTS = 2  # that two processes share


def difference(found, expected):
    """Return what differs between a run and the loop in plain torch, or nothing."""
    for name in ("raw", "average", "latest"):
        if (found[name] is None) != (expected[name] is None):
            return f"{name}: one of them has none"
        for key in found[name] or ():
            if not torch.allclose(found[name][key], expected[name][key], rtol=1e-9, atol=1e-11):
                return f"{name} {key}: {found[name][key]} is not {expected[name][key]}"
    rates = [rate if isinstance(rate, tuple) else (rate,) for rate in found["rates"]]
    wanted = expected["rates"][len(expected["rates"]) - len(rates) :]
    return None if rates == [pytest.approx(rate, rel=1e-12) for rate in wanted] else f"rates: {rates} are not {wanted}"


@pytest.mark.parametrize("part", range(PARTS))
def test_any_combination_trains_as_a_loop_in_plain_torch(tmp_path, part, record_property):
    number, seed, tried, wrong = counts.wanted(200, 10_000), counts.seed(), Counter(), []
    logging.disable(logging.INFO)
    try:
        for index in range(part, number, PARTS):
            run = Combination.draw(random.Random(f"{seed} {index}"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                text = difference(with_callbacks(run, tmp_path), plain_loop(run))
            tried[kind_of(run)] += 1
            wrong += [] if text is None else [f"combination {index}: {text}\n{run}"]
    finally:
        logging.disable(logging.NOTSET)
    counts.record(record_property, "combinations", tried, f"SEED={seed}")
    assert not wrong, f"SEED={seed}: {len(wrong)} of {sum(tried.values())}\n" + "\n".join(wrong[:5])
