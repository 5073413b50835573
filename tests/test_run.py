"""The length of a run: the arithmetic against a batch-by-batch simulation of Lightning's rule."""

import pytest
from hypothesis import given, strategies as st

from lightning_plugins._run import AccumulationPlan, count_steps


def simulate(plan, batches_per_epoch, epochs):
    """Step when the number of batches since the epoch began divides by the accumulation, and at the epoch's end."""
    step = 0
    for epoch in range(epochs):
        for batch in range(batches_per_epoch):
            done = batch + 1 + (epoch * batches_per_epoch if plan.carry else 0)
            last = done == (batches_per_epoch * epochs if plan.carry else batches_per_epoch)
            step += done % plan.batches(epoch, step) == 0 or last
    return step


plans = st.builds(
    lambda first, later, unit: AccumulationPlan(((0, first), *sorted(later.items())), unit=unit),
    st.integers(1, 6),
    st.dictionaries(st.integers(1, 20), st.integers(1, 6), max_size=3),
    st.sampled_from(["epoch", "step"]),
)


@given(plan=plans, batches=st.integers(0, 25), epochs=st.integers(0, 5))
def test_counts_what_a_run_takes(plan, batches, epochs):
    assert count_steps(plan, batches_per_epoch=batches, epochs=epochs) == simulate(plan, batches, epochs)


@given(number=st.integers(1, 6), batches=st.integers(0, 25), epochs=st.integers(0, 5))
def test_carried_windows_make_one_long_epoch(number, batches, epochs):
    plan = AccumulationPlan(((0, number),), carry=True)
    assert count_steps(plan, batches_per_epoch=batches, epochs=epochs) == simulate(plan, batches, epochs)


@pytest.mark.parametrize(("epoch", "batch", "step"), [(0, 4, 100), (1, 0, 7), (1, 6, 12), (2, 10, 3)])
def test_goes_on_from_where_a_run_stands(epoch, batch, step):
    plan = AccumulationPlan(((0, 2),))
    left = 5 * (3 - epoch) - batch // 2
    assert count_steps(plan, batches_per_epoch=10, epochs=3, epoch=epoch, batch=batch, step=step) == step + left


def test_a_long_run_is_counted_at_once():
    plan = AccumulationPlan(((0, 1), (10**6, 4)), unit="step")
    assert count_steps(plan, batches_per_epoch=10**9, epochs=10) == 10**6 + (10**10 - 10**6) // 4
