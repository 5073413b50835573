"""Where the predictions of a step are found when the step returns none."""

import collections
import types

import numpy as np
import pytest
import torch

from lightning_plugins.core.step_outputs import StepSources, entry_of, loss_of, targets_of


class Returning(torch.nn.Module):
    """Returns from ``forward`` what it is given."""

    def forward(self, value):
        return value


SCORES = torch.tensor([[0.1, 0.9], [0.8, 0.2]], requires_grad=True)


@pytest.mark.parametrize(
    ("returned", "heard"),
    [
        (SCORES, True),
        ({"logits": SCORES}, True),
        ({"preds": SCORES}, True),
        (types.SimpleNamespace(logits=SCORES), True),
        (SCORES.sum(), False),
        (None, False),
        ((SCORES, SCORES), False),
        ({"logits": [SCORES]}, False),
    ],
    ids=["tensor", "logits", "preds", "output of transformers", "loss", "nothing", "tuple", "list of logits"],
)
def test_what_forward_returns_is_remembered_if_it_has_rows(returned, heard):
    sources, module = StepSources(None, None, "a test"), Returning()
    sources.listen(module)
    module(returned)
    assert sources.heard is heard
    if heard:
        predictions, targets = sources.find(None, (torch.zeros(2), torch.tensor([1, 0])))
        assert torch.equal(predictions, SCORES)
        assert targets.tolist() == [1, 0]
        assert not predictions.requires_grad
        assert not sources.heard
    sources.close()
    assert not module._forward_hooks


def test_pieces_of_a_batch_are_joined_and_an_earlier_call_is_not():
    sources, module = StepSources(None, None, "a test"), Returning()
    sources.listen(module)
    for rows in (3, 2, 1):
        module(torch.full((rows, 2), float(rows)))
    found, _ = sources.find(None, (torch.zeros(3), torch.zeros(3)))
    assert found[:, 0].tolist() == [2, 2, 1]
    for rows in (2, 2):
        module(torch.full((rows, 2), float(rows)))
    # no number of the last outputs has three rows
    found, _ = sources.find(None, (torch.zeros(3), torch.zeros(3)))
    assert len(found) == 2
    for _ in range(2):
        module(torch.ones(1, 2))
    # one sample, whose target has no dimensions
    found, _ = sources.find(None, (torch.zeros(3), torch.tensor(3)))
    assert len(found) == 1


class Keyed:
    """Has its parts in brackets, and an own error for what it lacks."""

    def __init__(self, error, **parts):
        self._error, self._parts = error, parts

    def __getitem__(self, key):
        if key not in self._parts:
            raise self._error(key)
        return self._parts[key]


@pytest.mark.parametrize(
    "holder",
    [
        {"labels": 3},
        collections.UserDict(labels=3),
        collections.namedtuple("Batch", ("inputs", "labels"))(1, 3),
        types.SimpleNamespace(labels=3),
        *(Keyed(error, labels=3) for error in (KeyError, IndexError, TypeError, ValueError, AttributeError)),
    ],
    ids=lambda holder: type(holder).__name__,
)
def test_a_part_of_a_batch_is_found_by_its_name(holder):
    assert entry_of(holder, "labels") == 3
    assert entry_of(holder, "label") is None


@pytest.mark.parametrize("holder", [None, "labels", b"labels", torch.zeros(3), [1, 2], (1, 2), 5], ids=str)
def test_what_has_no_names_has_no_part(holder):
    assert entry_of(holder, "labels") is None


@pytest.mark.parametrize("holder", ["labels", [1, 2], (1, 2)], ids=str)
def test_what_every_sequence_can_do_is_no_part_of_one(holder):
    assert entry_of(holder, "count") is None


@pytest.mark.parametrize(
    ("returned", "loss"),
    [
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5]), 0.5),
        ({"loss": torch.tensor(0.5)}, 0.5),
        (collections.UserDict(loss=torch.tensor(0.5)), 0.5),
        (0.5, 0.5),
        (2, 2.0),
        (np.float32(0.5), 0.5),
        ({"loss": 0.5}, 0.5),
        (True, None),
        ("0.5", None),
        (torch.tensor([0.5, 0.5]), None),
        ({"logits": torch.tensor(0.5)}, None),
        (None, None),
        ([0.5], None),
    ],
    ids=str,
)
def test_the_loss_of_a_step_is_one_number(returned, loss):
    found = loss_of(returned)
    assert (None if found is None else found.item()) == loss


def test_a_loss_is_given_without_its_graph():
    assert not loss_of(torch.tensor(0.5, requires_grad=True)).requires_grad


def first_column(outputs, batch):
    return batch[0][:, 0]


BATCH = (torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 0]))


@pytest.mark.parametrize(
    ("predictions", "outputs", "batch", "expected"),
    [
        ("scores", {"scores": BATCH[0]}, BATCH, BATCH[0]),
        ("scores", types.SimpleNamespace(scores=BATCH[0]), BATCH, BATCH[0]),
        ("scores", None, {"scores": BATCH[0], "labels": BATCH[1]}, BATCH[0]),
        # what the step returns comes first
        ("scores", {"scores": BATCH[0]}, {"scores": BATCH[0] + 1, "labels": BATCH[1]}, BATCH[0]),
        (first_column, None, BATCH, BATCH[0][:, 0]),
        (f"{__name__}.first_column", None, BATCH, BATCH[0][:, 0]),
    ],
    ids=["key", "attribute", "key of the batch", "key of both", "function", "import path"],
)
def test_predictions_are_where_they_are_said_to_be(predictions, outputs, batch, expected):
    found, targets = StepSources(predictions, None, "a test").find(outputs, batch)
    assert torch.equal(found, expected)
    assert torch.equal(targets, BATCH[1])


@pytest.mark.parametrize("targets", ["scores", "other", f"{__name__}.nothing", "no_module.name"])
def test_targets_that_are_not_there_are_not_taken_from_elsewhere(targets):
    """A submodule's output that was named as the predictions stands in for nothing else."""
    sources, module = StepSources("net", targets, "a test"), torch.nn.ModuleDict({"net": Returning()})
    sources.listen(module)
    module["net"](BATCH[0])
    with pytest.raises(ValueError, match=r"found no targets: .* and it is no function's import path"):
        sources.find(None, BATCH)


def classes(outputs, batch):
    return outputs["classes"]


@pytest.mark.parametrize("named", ["classes", classes, f"{__name__}.classes"], ids=["key", "function", "import path"])
def test_a_submodules_output_may_be_the_predictions_where_the_targets_are_elsewhere(named):
    sources, module = StepSources("net", named, "a test"), torch.nn.ModuleDict({"net": Returning()})
    sources.listen(module)
    module["net"](BATCH[0])
    found, targets = sources.find({"classes": BATCH[1]}, None)
    assert (found.tolist(), targets.tolist()) == (BATCH[0].tolist(), [1, 0])


INPUTS, TARGETS = BATCH
Named = collections.namedtuple("Named", ("labels", "inputs"))
Unnamed = collections.namedtuple("Unnamed", ("first", "second"))
Alone = collections.namedtuple("Alone", ("first",))


@pytest.mark.parametrize(
    ("outputs", "batch", "expected"),
    [
        ({"target": TARGETS}, (INPUTS, 1 - TARGETS), TARGETS),
        (None, (INPUTS, TARGETS), TARGETS),
        (None, [INPUTS, TARGETS], TARGETS),
        (INPUTS.sum(), [INPUTS, TARGETS, INPUTS], TARGETS),
        (None, {"x": INPUTS, "labels": TARGETS}, TARGETS),
        (None, Named(TARGETS, INPUTS), TARGETS),
        (None, Unnamed(INPUTS, TARGETS), TARGETS),
        (None, (INPUTS,), "otherwise"),
        (None, Alone(INPUTS), "otherwise"),
        (None, {"x": INPUTS, "y": TARGETS}, "otherwise"),
        (None, INPUTS, "otherwise"),
        (None, types.SimpleNamespace(x=INPUTS), "otherwise"),
    ],
)
def test_targets_are_found_by_their_name_or_as_the_second_item(outputs, batch, expected):
    assert targets_of(outputs, batch, "otherwise") is expected


def test_two_names_for_targets_are_refused_by_both():
    with pytest.raises(ValueError, match=r"The batch has 'target' and 'labels', .* targets='target'\."):
        targets_of(None, {"target": TARGETS, "labels": TARGETS})


def test_what_the_step_returns_comes_before_what_forward_returned():
    sources, module = StepSources(None, None, "a test"), Returning()
    sources.listen(module)
    module(INPUTS)
    graph = (2 * INPUTS).requires_grad_()
    found, targets = sources.find({"logits": graph, "target": graph[:, 0]}, None)
    assert torch.equal(found, 2 * INPUTS)
    assert not found.requires_grad
    assert not targets.requires_grad
    assert not sources.heard


def test_one_module_is_listened_to_once_and_no_longer_than_asked_for():
    sources, module = StepSources(None, None, "a test"), Returning()
    assert not sources.listens
    for _ in range(2):
        sources.listen(module)
    assert (sources.listens, len(module._forward_hooks)) == (True, 1)
    for end in (sources.forget, sources.close):
        module(INPUTS)
        assert sources.heard
        end()
        assert not sources.heard
    assert (sources.listens, len(module._forward_hooks)) == (False, 0)


@pytest.mark.parametrize("name", ["predictions", "targets"])
def test_a_source_is_a_name_or_a_function_of_two(name):
    for wrong in (5, lambda outputs: outputs):
        with pytest.raises(TypeError, match=f"`{name}` must be"):
            StepSources(**{"predictions": None, "targets": None, "owner": "a test", name: wrong})


@pytest.mark.parametrize(
    ("named", "outputs", "batch", "message"),
    [
        (
            (None, None),
            None,
            BATCH,
            r"no predictions: .* NoneType \(looked for 'logits' or 'preds'\) and the module's `forward` was not called",
        ),
        (
            ("scores", None),
            {"loss": 1.0},
            BATCH,
            r"no predictions: .* a dict with the keys 'loss' \(looked for 'scores'\) and no submodule of that name",
        ),
        (
            (None, None),
            {"logits": INPUTS},
            {"x": INPUTS},
            r"no targets: .* keys 'logits' \(looked for 'target' or .*\) and the batch, a dict, has no second item",
        ),
        (
            (None, "classes"),
            {"logits": INPUTS},
            BATCH,
            r"no targets: .* \(looked for 'classes'\) and it is no function's import path",
        ),
        (
            (None, None),
            {"logits": INPUTS},
            (INPUTS, "a"),
            r"The targets must be a tensor, got str: give a test\(targets=",
        ),
        (
            (None, None),
            {"logits": [1]},
            BATCH,
            r"The predictions must be a tensor, got list: give a test\(",
        ),
    ],
)
def test_what_is_not_found_is_said_with_where_it_was_looked_for(named, outputs, batch, message):
    with pytest.raises((TypeError, ValueError), match=message):
        StepSources(*named, "a test").find(outputs, batch)
