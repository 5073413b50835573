"""The arithmetic of windows, counts and plans, without a Trainer."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from lightning_plugins import GradientAccumulation, Tokens
from lightning_plugins.accumulation.weighting import Window, scale_gradients, weigh_backward
from lightning_plugins.accumulation.windows import batches_for, plan_changes
from lightning_plugins.core.counting import CountCheck, as_count, counter, wide


@given(
    counts=st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=4),
    missing=st.integers(0, 2),
    on_device=st.booleans(),
)
@example(counts=[[0, 0, 0]], missing=0, on_device=True)
@example(counts=[[0, 0, 0]], missing=0, on_device=False)
@settings(max_examples=150)
def test_both_ends_make_the_mean_over_all_items(counts, missing, on_device):
    """For every rank a list of three counts, of which the last ones may be missing (a short window)."""
    counts = np.array(counts)[:, : 3 - missing]
    gradients = np.arange(1.0, counts.size + 1).reshape(counts.shape)
    ranks, batches = len(counts), 3
    windows = [Window() for _ in range(ranks)]
    mean = 0.0
    for window, row, of_rank in zip(windows, counts, gradients, strict=True):
        window.reference = float(counts[0, 0]) or 1.0
        for count, gradient in zip(row, of_rank, strict=True):
            weight = window.add(torch.tensor(count) if on_device else int(count), batches)
            mean += float(weight) * gradient / (ranks * batches)
    total = sum(window.total for window in windows)
    factor = float(windows[0].factor(total, divisor=ranks))
    if counts.sum():
        assert mean * factor == pytest.approx((counts * gradients).sum() / counts.sum(), rel=1e-13)
    else:
        assert factor == 1


def test_equal_full_windows_need_no_scaling():
    window = Window()
    window.reference = 7.0
    assert [window.add(7, 3) for _ in range(3)] == [1, 1, 1]
    assert window.factor(2 * window.total, divisor=2) == 1


def test_a_reference_comes_first():
    with pytest.raises(RuntimeError, match=r"Window.reference must be set before the first batch is counted\."):
        Window().add(3, 1)


def test_only_what_has_a_gradient_is_scaled_in_any_type():
    parameters = [torch.nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (torch.float32, torch.float64) * 2]
    for parameter in parameters[:3]:
        parameter.grad = torch.ones_like(parameter)
    scale_gradients(parameters, 0.25)
    scale_gradients(parameters, torch.tensor(2.0, dtype=torch.float64))
    scale_gradients(parameters, 1)
    assert [parameter.grad.tolist() for parameter in parameters[:3]] == [[0.5] * 3] * 3
    assert parameters[3].grad is None


def test_weighing_changes_the_gradient_and_not_the_loss():
    weight = torch.nn.Parameter(torch.tensor(3.0))
    for factor in (2, torch.tensor(2.0, dtype=torch.float64)):
        weight.grad, loss = None, weight * 5
        weigh_backward(loss, factor)
        loss.backward()
        assert (loss.item(), weight.grad.item()) == (15.0, 10.0)
    weigh_backward(torch.tensor(1.0), 2)  # no gradient to weigh: the backward itself will say so


def test_wide_keeps_large_counts():
    assert int(wide(torch.tensor(2**40 + 1), "cpu")) == int(wide(2**40 + 1, "cpu")) == 2**40 + 1
    assert wide(1, "meta").dtype is torch.float64


@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), np.int64(3), torch.tensor([3]), torch.tensor(3.0)], ids=repr)
def test_any_one_number_is_a_count(value):
    assert as_count(value) == 3


def test_a_count_on_an_accelerator_stays_there():
    assert as_count(torch.zeros((1,), device="meta")).shape == ()


@pytest.mark.parametrize("value", [True, None, "3", [3]], ids=repr)
def test_anything_else_is_not(value):
    with pytest.raises(TypeError, match="`count` must return one number, got"):
        as_count(value)


def test_tokens_that_the_loss_ignores_do_not_count():
    labels = torch.tensor([[1, -100, 3], [0, 0, -100]])
    assert int(Tokens("y")({"y": labels})) == 4
    assert int(Tokens(1, ignore_index=0)((None, labels))) == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"key": 1.5}, TypeError, r"`key` must be a field's name or index, got 1\.5\."),
        ({"key": True}, TypeError, r"`key` must be a field's name or index, got True\."),
        ({"key": "y", "ignore_index": None}, TypeError, r"`ignore_index` must be a whole number, got None\."),
    ],
)
def test_tokens_refuse(arguments, error, message):
    with pytest.raises(error, match=message):
        Tokens(**arguments)


def test_tokens_need_a_tensor():
    with pytest.raises(TypeError, match=r"`key` must name a tensor of labels, but 'y' is a list\."):
        Tokens("y")({"y": [1, 2]})


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        ("tokens", ValueError, r"`count` must be 'samples', Tokens\(key\) or a function of the batch, got 'tokens'\."),
        (3, TypeError, r'`count` must be "samples", Tokens\(key\) or a function of \(batch\), got 3\.'),
    ],
)
def test_counters_that_there_are_not(count, error, message):
    with pytest.raises(error, match=message):
        counter(count)
    with pytest.raises(error, match=message):
        GradientAccumulation(2, count=count)


def test_what_counts_can_be_pickled_in_a_fit():
    """neuralforecast keeps its callbacks in every checkpoint that it writes."""
    assert pickle.loads(pickle.dumps(counter(len)))([1, 2, 3]) == 3


class TestCountCheck:
    @pytest.mark.parametrize("total", [1, 0.25])
    def test_one_item_has_been_counted(self, total):
        check = CountCheck()
        check.add_window(0)
        assert not check.counted
        check.add_window(total)
        assert check.counted

    def test_stops_a_run_that_learns_nothing_before_its_epoch_ends(self):
        check = CountCheck()
        for _ in range(99):
            check.add_window(torch.tensor(0))
        with pytest.raises(ValueError, match="`count` must not be 0 for every batch, got only zeros in 100 optimizer"):
            check.add_window(torch.tensor(0))

    @pytest.mark.parametrize("one", [1, torch.tensor(1)], ids=["host", "device"])
    def test_one_item_is_enough(self, one):
        check = CountCheck()
        check.add_window(0 * one)
        check.add_window(one)
        check.verify()
        for _ in range(300):
            check.add_window(0 * one)
        check.verify()

    def test_finds_the_lowest(self):
        check = CountCheck()
        for count in (3, -2, 1):
            check.add_batch(torch.tensor(count))
        with pytest.raises(ValueError, match=r"`count` must return a finite number of at least 0, got -2\."):
            check.verify()


PLANS = [
    ({}, TypeError, "exactly one of `batches`, `effective_batch_size` and `schedule` must be given, got none"),
    (
        {"batches": 2, "effective_batch_size": 8},
        TypeError,
        r"exactly one of .* must be given, got batches=2 and effective_batch_size=8\.",
    ),
    ({"batches": 0}, ValueError, r"`batches` must be at least 1 batch, got 0\."),
    ({"batches": -4}, ValueError, r"`batches` must be at least 1 batch, got -4\."),
    ({"batches": 2.5}, TypeError, r"`batches` must be a whole number of batches, got 2\.5\."),
    ({"effective_batch_size": 0}, ValueError, r"`effective_batch_size` must be at least 1 sample, got 0\."),
    ({"schedule": {}}, ValueError, r"`schedule` must map steps to batches and begin at step 0, got \{\}\."),
    ({"schedule": {5: 2}}, ValueError, r"`schedule` must map steps to batches and begin at step 0, got \{5: 2\}\."),
    ({"schedule": [1, 2]}, ValueError, r"`schedule` must map steps to batches and begin at step 0, got \[1, 2\]\."),
    ({"schedule": {0: 1, -1: 2}}, ValueError, r"`schedule` must be at least 0 steps, got -1\."),
    ({"schedule": {0: 1, 9: 0}}, ValueError, r"`schedule\[9\]` must be at least 1 batch, got 0\."),
    ({"schedule": {0: 1, 1.5: 2}}, TypeError, r"`schedule` must be a whole number of steps, got 1\.5\."),
]


@pytest.mark.parametrize(("arguments", "error", "message"), PLANS, ids=lambda value: str(value)[:40])
def test_arguments_that_make_no_plan(arguments, error, message):
    with pytest.raises(error, match=message):
        GradientAccumulation(**arguments)


def test_a_plan_is_in_the_order_of_steps():
    assert plan_changes(None, None, {100: 4, 0: 1, 10: 2}) == ((0, 1), (10, 2), (100, 4))
    assert plan_changes(None, 8, None) is None


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (250, "of 24, for batches of 12 samples on each of 2 processes, got 250. Take 240 or 264, or another batch"),
        (23, "of 24, for batches of 12 samples on each of 2 processes, got 23. Take 24, or another batch size"),
    ],
)
def test_sizes_that_no_window_has_name_the_nearest(wanted, message):
    with pytest.raises(ValueError, match=f"`effective_batch_size` must be a multiple {message}"):
        batches_for(wanted, batch_size=12, ranks=2)
