"""The length of a run: the arithmetic against a batch-by-batch simulation of Lightning's rule."""

import pytest
from hypothesis import given, strategies as st

from lightning_plugins.core.run_length import AccumulationPlan, count_steps


def simulate(plan, batches_per_epoch, epochs):
    """Step when the number of batches since the epoch began divides by the accumulation, and at the epoch's end.

    A carried window steps when it has its batches, and at the run's end.
    """
    return walk(plan, batches_per_epoch, epochs)[-1]


def walk(plan, batches_per_epoch, epochs):
    """Return the steps that have been taken after every batch, the first number before any."""
    steps, in_window, size = [0], 0, 0
    for epoch in range(epochs):
        for batch in range(batches_per_epoch):
            size = size if in_window else plan.batches(epoch, steps[-1])
            in_window += 1
            full = in_window == size if plan.carry else (batch + 1) % size == 0
            last = batch + 1 == batches_per_epoch and (not plan.carry or epoch + 1 == epochs)
            steps.append(steps[-1] + (full or last))
            in_window = 0 if full or last else in_window
    return steps


plans = st.builds(
    lambda first, later, unit, carry: AccumulationPlan(((0, first), *sorted(later.items())), unit, carry),
    st.integers(1, 6),
    st.dictionaries(st.integers(1, 20), st.integers(1, 6), max_size=3),
    st.sampled_from(["epoch", "step"]),
    st.booleans(),
)


@given(plan=plans, batches=st.integers(0, 25), epochs=st.integers(0, 5))
def test_counts_what_a_run_takes(plan, batches, epochs):
    assert count_steps(plan, batches_per_epoch=batches, epochs=epochs) == simulate(plan, batches, epochs)


@given(plan=plans, batches=st.integers(1, 12), epochs=st.integers(1, 4), data=st.data())
def test_knows_the_end_from_anywhere_in_the_run(plan, batches, epochs, data):
    steps = walk(plan, batches, epochs)
    epoch = data.draw(st.integers(0, epochs - 1))
    batch = data.draw(st.integers(0, batches))
    stands = {"epoch": epoch, "batch": batch, "step": steps[epoch * batches + batch]}
    assert count_steps(plan, batches_per_epoch=batches, epochs=epochs, **stands) == steps[-1]


def test_a_carried_schedule_has_no_short_window_at_the_joint():
    """One window of 4, then windows of 3: 10 batches are 4 + 3 + 3."""
    plan = AccumulationPlan(((0, 4), (1, 3)), unit="step", carry=True)
    assert count_steps(plan, batches_per_epoch=5, epochs=2) == 3


def test_a_run_that_carried_nothing_before_begins_a_window_where_it_stands():
    plan = AccumulationPlan(((0, 4),), carry=True)
    assert count_steps(plan, batches_per_epoch=5, epochs=3, epoch=1, batch=0, step=5) == 5 + 3


@pytest.mark.parametrize(("epoch", "batch", "step"), [(0, 4, 100), (1, 0, 7), (1, 6, 12), (2, 10, 3)])
def test_goes_on_from_where_a_run_stands(epoch, batch, step):
    plan = AccumulationPlan(((0, 2),))
    left = 5 * (3 - epoch) - batch // 2
    assert count_steps(plan, batches_per_epoch=10, epochs=3, epoch=epoch, batch=batch, step=step) == step + left


def test_a_long_run_is_counted_at_once():
    plan = AccumulationPlan(((0, 1), (10**6, 4)), unit="step")
    assert count_steps(plan, batches_per_epoch=10**9, epochs=10) == 10**6 + (10**10 - 10**6) // 4
