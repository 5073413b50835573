"""Where the predictions of a step are found when the step returns none."""

import collections
import types

import pytest
import torch

from lightning_plugins.core.step_outputs import StepSources, entry_of


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
