"""The length of a run: the arithmetic against a batch-by-batch simulation of Lightning's rule."""

import math
import types

import pytest
from hypothesis import given, strategies as st

from lightning_plugins.core.run_length import (
    AccumulationPlan,
    RunAhead,
    RunEnd,
    count_steps,
    run_ahead,
    source_of_length,
)


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


@pytest.mark.parametrize(("epochs", "steps"), [(0, 0), (0.5, 2), (1, 4), (2.5, 10)])
def test_the_steps_of_epochs_at_the_start_of_a_run(epochs, steps):
    """Ten batches in windows of three: four steps an epoch."""
    ahead = RunAhead(10, AccumulationPlan(((0, 3),)))
    assert ahead.steps_of_epochs(epochs) == steps
    assert ahead.as_state()["stands"] == [0, 0, 0]


def test_the_steps_of_epochs_that_are_alike_are_exact():
    """A sum of 10 and 0.15 times 10 is below 11.5 in floating point, which would be rounded down."""
    assert RunAhead(10, AccumulationPlan(((0, 1),))).steps_of_epochs(1.15) == 1.15 * 10 == 11.5


@pytest.mark.parametrize(
    ("plan", "steps"), [(AccumulationPlan(((0, 1), (1, 5))), 12), (AccumulationPlan(((0, 3),), carry=True), 7)]
)
def test_the_steps_of_epochs_that_are_not_alike(plan, steps):
    """Ten steps and two; twenty batches in windows of three that go on in the next epoch."""
    assert RunAhead(10, plan).steps_of_epochs(2) == steps


@pytest.mark.parametrize(
    ("batches", "epochs", "limit", "total"),
    [(10, 3, None, 30), (10, 3, 7, 7), (10, 3, 70, 30), (None, 3, 7, 7), (None, 3, None, None), (10, None, 7, 7)],
)
def test_a_run_ends_with_its_epochs_or_its_steps(batches, epochs, limit, total):
    assert RunAhead(batches, AccumulationPlan(((0, 1),))).total_steps(RunEnd(epochs, limit)) == total


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 3.5), (1, 7), (1.5, 9.5), (3, 17)])
def test_the_steps_of_epochs_of_a_run_that_was_another_before(epochs, steps):
    """Seven steps in the first epoch, five in each one ahead."""
    assert RunAhead(10, AccumulationPlan(((0, 2),)), epoch=1, batch=0, step=7).steps_of_epochs(epochs) == steps


def trainer_at(batches, max_epochs=1, max_steps=-1, restarting=False, **loop):
    """Return what a Trainer shows of a run of so many batches an epoch."""
    return types.SimpleNamespace(
        fit_loop=types.SimpleNamespace(epoch_loop=types.SimpleNamespace(restarting=restarting, **loop)),
        num_training_batches=batches,
        train_dataloader=None,
        callbacks=[],
        accumulate_grad_batches=1,
        current_epoch=0,
        global_step=3 if restarting else 0,
        max_epochs=max_epochs,
        max_steps=max_steps,
    )


@pytest.mark.parametrize(
    ("batches", "is_last", "after_batch", "over"),
    [
        (10, False, False, 3),
        (10, True, False, 10),
        (math.inf, True, False, 3),
        (10, False, True, 4),
        (5, False, True, 4),
        (4, False, True, 0),
    ],
)
def test_a_resumed_run_stands_where_lightnings_loop_begins(batches, is_last, after_batch, over):
    """Three batches are complete; a checkpoint that a batch's end wrote lies one before its own."""
    progress = types.SimpleNamespace(current=types.SimpleNamespace(completed=3), is_last_batch=is_last)
    trainer = trainer_at(batches, restarting=True, restarted_on_train_batch_end=after_batch, batch_progress=progress)
    assert run_ahead(trainer).batch == over
    assert run_ahead(trainer, 6).batch == 6
    trainer.fit_loop.epoch_loop.restarting = False
    assert run_ahead(trainer).batch == 0


@pytest.mark.parametrize(("epochs", "steps"), [(0, 0), (0.25, 2.5), (0.5, 5), (1, 10), (2, 20)])
def test_the_steps_of_epochs_seen_from_within_the_first(epochs, steps):
    """Ten steps an epoch, of which four are taken."""
    assert RunAhead(10, AccumulationPlan(((0, 1),)), epoch=0, batch=4, step=4).steps_of_epochs(epochs) == steps


@pytest.mark.parametrize(
    ("batches", "epochs", "limit", "source"),
    [
        (10, 3, -1, "max_epochs=3 of 10 batches, one a step"),
        (10, 3, 29, "max_steps=29"),
        (10, 3, 30, "max_epochs=3 of 10 batches, one a step"),
        (10, 1000, -1, "max_epochs=1000 (what an unset max_epochs means) of 10 batches, one a step"),
        (10, 3, 0, "max_steps=0"),
        (10, 0, 0, "max_epochs=0 of 10 batches, one a step"),
        (10, -1, 7, "max_steps=7"),
        (10, -1, -1, "max_epochs=-1: the run has no end"),
        (math.inf, 3, 7, "max_steps=7"),
        (math.inf, 3, -1, "the length of the training data is unknown"),
    ],
)
def test_what_ends_a_run_is_named(batches, epochs, limit, source):
    trainer = trainer_at(batches, max_epochs=epochs, max_steps=limit)
    assert source_of_length(trainer) == source
