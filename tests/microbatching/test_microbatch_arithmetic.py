"""Shares, merged outputs and logs, and what is put back before a batch runs again."""

import functools
import math
import random

import numpy as np
import pytest
import torch
from torchmetrics import MeanMetric

from lightning_plugins.microbatching.merging import combine_logged, merge, shares, weighted_sum
from lightning_plugins.microbatching.out_of_memory import StateBeforeBatch, add_hint, halved

NAN = float("nan")


@pytest.mark.parametrize("on_device", [False, True])
def test_shares_are_those_of_the_counts(on_device):
    counts = [3, 0, 1]
    found = shares("abc", [2, 2, 1], lambda piece: _count(counts["abc".index(piece)], on_device))
    assert [float(share) for share in found] == [0.75, 0.0, 0.25]
    assert shares("abc", [2, 2, 1], None) == [0.4, 0.4, 0.2]


@pytest.mark.parametrize("on_device", [False, True])
def test_a_batch_without_a_single_item_is_shared_by_samples(on_device):
    found = shares("abc", [2, 2, 1], lambda _: _count(0, on_device))
    assert [float(share) for share in found] == pytest.approx([0.4, 0.4, 0.2])


def _count(number, on_device):
    return torch.tensor(number) if on_device else number


@pytest.mark.parametrize("share", [0.0, torch.tensor(0.0, dtype=torch.float64)], ids=["host", "device"])
def test_a_piece_without_items_does_not_spoil_the_mean(share):
    """The mean of no items is no number; in the whole batch those items simply are not there."""
    total = weighted_sum([torch.tensor(4.0), torch.tensor(NAN)], [1.0, share])
    assert total.item() == 4.0
    assert total.dtype is torch.float32


ROWS = torch.arange(6.0).reshape(3, 2)


@pytest.mark.parametrize(
    ("values", "whole"),
    [
        ([ROWS[:2], ROWS[2:]], ROWS),
        ([torch.tensor(3.0), torch.tensor(6.0)], torch.tensor(4.0)),
        ([torch.tensor(3), torch.tensor(6)], torch.tensor(9)),
        ([torch.ones(4), torch.full((4,), 4.0)], torch.full((4,), 2.0)),
        ([3.0, 6.0], 4.0),
        ([3, 6], 9),
        ([["a", "b"], ["c"]], ["a", "b", "c"]),
        ([(3.0, 1, "x"), (6.0, 2, "x")], (4.0, 3, "x")),
        ([{"a": {"b": 3.0}}, {"a": {"b": 6.0}}], {"a": {"b": 4.0}}),
        ([None, None], None),
        ([True, True], True),
    ],
    ids=str,
)
def test_outputs_are_those_of_the_whole_batch(values, whole):
    """Two pieces of 2 and 1 samples: shares 2/3 and 1/3."""
    merged = merge(values, [2 / 3, 1 / 3], [2, 1])
    if isinstance(whole, torch.Tensor):
        assert torch.equal(merged, whole)
    else:
        assert merged == (pytest.approx(whole) if isinstance(whole, float) else whole)


def test_sequences_of_several_lengths_are_put_one_after_another():
    parts = [torch.arange(float(length)) for length in (2, 5, 3)]
    for pack in (
        functools.partial(torch.nn.utils.rnn.pack_sequence, enforce_sorted=False),
        functools.partial(torch.nested.nested_tensor, layout=torch.jagged),
    ):
        whole, merged = pack(parts), merge([pack(parts[:2]), pack(parts[2:])], [2 / 3, 1 / 3], [2, 1])
        alone = merge([pack(parts[:2])], [1.0], [2])
        if isinstance(whole, torch.Tensor):
            found, first = merged.unbind(), alone.unbind()
        else:
            found, first = map(torch.nn.utils.rnn.unpack_sequence, (merged, alone))
        assert type(merged) is type(whole)
        assert [part.tolist() for part in found] == [part.tolist() for part in parts]
        assert [part.tolist() for part in first] == [part.tolist() for part in parts[:2]]


def test_a_piece_whose_samples_have_one_length_may_be_put_beside_nested_ones():
    parts = [torch.arange(3.0), torch.arange(5.0), torch.arange(4.0)]
    for pieces, order in (((parts[:2], parts[2:]), [0, 1, 2]), ((parts[2:], parts[:2]), [2, 0, 1])):
        given = [
            torch.nested.nested_tensor(piece, layout=torch.jagged) if len(piece) == 2 else torch.stack(piece)
            for piece in pieces
        ]
        found = merge(given, [2 / 3, 1 / 3], [len(piece) for piece in pieces])
        assert [part.tolist() for part in found.unbind()] == [parts[number].tolist() for number in order]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_sequence_has_an_entry_per_sample_or_a_field_that_has_a_row_per_sample(kind):
    """Three samples in pieces of 2 and 1, so that every length could be either."""

    def merged(*pieces):
        found = merge([kind(piece) for piece in pieces], [2 / 3, 1 / 3], [2, 1])
        assert type(found) is kind
        return [item.tolist() if isinstance(item, torch.Tensor) else item for item in found]

    boxes = [torch.ones(4, 2), torch.zeros(0, 2), torch.full((3, 2), 5.0)]
    if kind is list:
        # found objects, of which every sample has another number
        assert merged(boxes[:2], boxes[2:]) == [box.tolist() for box in boxes]
    assert merged(["a", "bc"], ["d"]) == ["a", "bc", "d"]
    assert merged([[1, 2], [3, 4]], [[5]]) == [[1, 2], [3, 4], [5]]
    # what an LSTM returns: two states, each with a row per sample
    states = torch.arange(6.0).view(3, 2), torch.arange(6.0, 12.0).view(3, 2)
    fields = merged([state[:2] for state in states], [state[2:] for state in states])
    assert fields == [state.tolist() for state in states]


def test_merged_tensors_hold_no_graph():
    weight = torch.nn.Parameter(torch.ones(2))
    assert not merge([weight * 1, weight * 2], [0.5, 0.5], [2, 2]).requires_grad


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([torch.ones(4), torch.ones(3)], r"`outputs\['x'\]` must have a row per sample or one shape, got the shapes"),
        (
            [torch.nested.nested_tensor([ROWS[0]], layout=torch.jagged), torch.ones(3, 5)],
            r"`outputs\['x'\]` must have a row per sample or one shape, got the shapes nested, \(3, 5\)\.",
        ),
        (
            [torch.tensor(True), torch.tensor(False)],
            r"`outputs\['x'\]` must be numbers or have a row per sample, got on",
        ),
        (
            [torch.tensor(2), torch.tensor(True)],
            r"`outputs\['x'\]` must be numbers or have a row per sample, got on",
        ),
        # a count in one piece and a mean in the other are neither to be added nor to be averaged
        ([torch.tensor(0), torch.tensor(0.75)], r"`outputs\['x'\]` must have one type, got int64, float32\."),
        ([torch.tensor(0.75), torch.tensor(0)], r"`outputs\['x'\]` must have one type, got float32, int64\."),
        (
            ["a", "b"],
            r"`outputs\['x'\]` must be the same for every piece of a batch or something to average, got \['a'",
        ),
    ],
)
def test_outputs_that_cannot_be_merged_are_named(values, message):
    with pytest.raises(TypeError, match=message):
        merge([{"x": value} for value in values], [2 / 3, 1 / 3], [2, 1])


@pytest.mark.parametrize(("reduction", "value"), [("mean", 4.0), ("sum", 9.0), ("max", 6.0), ("min", 3.0)])
@pytest.mark.parametrize("on_device", [False, True])
def test_logged_values_are_combined_as_they_are_reduced(reduction, value, on_device):
    weights = [2 / 3, 1 / 3] if not on_device else list(torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))
    combined = combine_logged(reduction, [torch.tensor(3.0), torch.tensor(6.0)], weights)
    assert combined.item() == pytest.approx(value)


def test_pieces_that_did_not_log_are_left_out_of_the_mean():
    assert combine_logged("mean", [torch.tensor(3.0)], [0.25]).item() == 3.0
    assert combine_logged("mean", [torch.tensor(3.0), torch.tensor(5.0)], [0.0, 0.0]).item() == 4.0


def test_halving_ends():
    sizes = [33]
    while sizes[-1]:
        sizes.append(halved(sizes[-1]))
    assert sizes == [33, 17, 9, 5, 3, 2, 1, 0]


def test_a_hint_is_given_once():
    error = RuntimeError("CUDA out of memory.", "more")
    add_hint(error, "Shorten.")
    add_hint(error, "Shorten.")
    assert error.args[0].count("Shorten.") == 1


def test_a_snapshot_puts_everything_back_as_often_as_one_likes():
    module = torch.nn.BatchNorm1d(2)
    module.register_buffer("absent", None)
    module.metric = metric = MeanMetric()
    metric.update(3.0)
    module.weight.grad = torch.ones(2)
    before = StateBeforeBatch(module, torch.device("cpu"))
    before.keep_gradients()
    drawn = []
    for _ in range(2):
        drawn.append((torch.rand(2).tolist(), random.random(), np.random.rand()))  # noqa: NPY002  # the global one
        module(torch.randn(4, 2)).sum().backward()
        metric.update(7.0)
        before.keep_gradients()  # later calls do not replace what was kept
        before.restore()
        assert metric.compute().item() == 3.0
        assert metric.update_count == 1
        assert module.num_batches_tracked.item() == 0
        assert module.running_mean.tolist() == [0.0, 0.0]
        assert module.weight.grad.tolist() == [1.0, 1.0]
        assert module.bias.grad is None
    assert drawn[0] == drawn[1]


def test_an_unlogged_number_is_not_hidden():
    assert math.isnan(combine_logged("mean", [torch.tensor(NAN)], [1.0]).item())
