"""Batches of every kind are measured, looked into and cut, or refused by the field that stands in the way."""

import collections
import dataclasses
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.utils.rnn import pack_sequence

from lightning_plugins.core.batches import batch_length, even_sizes, look_up, split_batch

Pair = collections.namedtuple("Pair", "image label")


@dataclasses.dataclass(frozen=True)
class Graph:
    nodes: torch.Tensor
    name: str = "g"


@dataclasses.dataclass
class Derived:
    rows: torch.Tensor
    doubled: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        self.doubled = self.rows * 2


ROWS = torch.arange(10.0).reshape(5, 2)
BATCHES = {
    "tensor": ROWS,
    "array": np.arange(5),
    "list of fields": [ROWS, torch.arange(5)],
    "mapping": {"x": ROWS, "names": list("abcde"), "scale": 2.0, "none": None, "zero": torch.tensor(3.0)},
    "ordered mapping": collections.OrderedDict(x=ROWS, y=ROWS),
    "user's mapping": collections.UserDict(x=ROWS),
    "read-only mapping": types.MappingProxyType({"x": ROWS}),
    "named tuple": Pair(ROWS, torch.arange(5)),
    "dataclass": Graph(ROWS),
    "dataclass with a computed field": Derived(ROWS),
    "forecasting": ({"encoder": ROWS, "lengths": torch.arange(5)}, (torch.arange(5), None)),
    "two inputs and two targets": ((ROWS, ROWS), (torch.arange(5), torch.arange(5))),
    "detection": (
        [torch.zeros(3, size, size) for size in range(1, 6)],
        [{"boxes": torch.zeros(k, 4)} for k in range(5)],
    ),
    "texts": (["a", "b", "c", "d", "e"], torch.arange(5)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_length_and_pieces(name):
    batch = BATCHES[name]
    assert batch_length(batch) == 5
    pieces = split_batch(batch, [2, 2, 1])
    assert [batch_length(piece) for piece in pieces] == [2, 2, 1]
    assert all(type(piece) is type(batch) for piece in pieces)


def test_samples_keep_their_order_and_single_values_are_shared():
    pieces = split_batch(BATCHES["mapping"], [3, 2])
    assert torch.equal(torch.cat([piece["x"] for piece in pieces]), ROWS)
    assert [piece["names"] for piece in pieces] == [list("abc"), list("de")]
    assert pieces[1]["scale"] == 2.0
    assert pieces[1]["none"] is None
    assert pieces[0]["zero"] is pieces[1]["zero"]


def test_pieces_are_views_and_the_batch_is_untouched():
    batch = {"x": ROWS.clone(), "y": [ROWS]}
    pieces = split_batch(batch, [2, 3])
    assert pieces[1]["x"].data_ptr() == batch["x"][2:].data_ptr()
    assert torch.equal(batch["x"], ROWS)
    assert list(batch) == ["x", "y"]


def test_lists_of_samples_and_lists_of_fields_are_told_apart():
    images, targets = split_batch(BATCHES["detection"], [2, 3])[1]
    assert [image.shape[1] for image in images] == [3, 4, 5]
    assert [len(target["boxes"]) for target in targets] == [2, 3, 4]
    inputs, _ = split_batch(BATCHES["two inputs and two targets"], [2, 3])[1]
    assert [len(field) for field in inputs] == [3, 3]


UNCUTTABLE = {
    "other rows": ({"x": ROWS, "weights": torch.ones(3)}, r"`batch\['weights'\]`, a Tensor, has 3 rows\."),
    "packed": ({"x": ROWS, "p": pack_sequence([torch.ones(2)])}, r"`batch\['p'\]`, a PackedSequence, has 1 rows"),
    "sparse": ({"x": ROWS, "s": torch.eye(5).to_sparse()}, r"`batch\['s'\]`, a Tensor, has 5 rows"),
    "other list": ((ROWS, ["a", "b"]), r"`batch\[1\]`, a list, has 2 rows\."),
    "object": ({"x": ROWS, "o": object()}, r"`batch\['o'\]`, a object, has no rows that could be cut\."),
}


@pytest.mark.parametrize("name", UNCUTTABLE)
def test_what_cannot_be_cut_is_named(name):
    batch, message = UNCUTTABLE[name]
    with pytest.raises(TypeError, match=f"must have 5 rows in every field to run in pieces, but {message}"):
        split_batch(batch, [3, 2])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (object(), "the batch, a object, holds no tensor, array or list with a row per sample"),
        ({"a": 1}, "the batch, a dict, holds no tensor"),
        (
            {"x": ROWS, "w": torch.ones(3)},
            r"disagree on the number of samples: `batch\['x'\]` has 5, `batch\['w'\]` has 3",
        ),
    ],
)
def test_a_length_that_cannot_be_told(batch, message):
    with pytest.raises(ValueError, match=message):
        batch_length(batch)


@given(length=st.integers(1, 500), at_most=st.integers(1, 500))
@settings(max_examples=200)
def test_even_sizes_are_the_fewest_and_differ_by_one(length, at_most):
    sizes = even_sizes(length, at_most)
    assert sum(sizes) == length
    assert max(sizes) <= at_most
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-length // at_most)


class Holder:
    def __init__(self):
        self.labels = ROWS
        self._hidden = 1

    def __repr__(self):  # test names must be the same in every worker
        return "Holder"


class Stored:  # as torch_geometric's graphs are: their fields lie in a store of their own
    def keys(self):
        return ["labels", 5]

    def __getattr__(self, name):
        if name == "labels":
            return ROWS
        raise AttributeError(name)

    __repr__ = Holder.__repr__


@dataclasses.dataclass(slots=True, repr=False)
class Slotted:  # as darts' batches are: it has no `__dict__`
    image: int
    label: torch.Tensor | int

    __repr__ = Holder.__repr__


@pytest.mark.parametrize(
    ("batch", "key"),
    [
        ({"labels": ROWS}, "labels"),
        ((0, ROWS), 1),
        ((0, ROWS), -1),
        (Pair(0, ROWS), "label"),
        (Holder(), "labels"),
        (Slotted(0, ROWS), "label"),
        (Stored(), "labels"),
    ],
    ids=["mapping", "index", "index from the end", "named tuple", "attributes", "slots", "keys"],
)
def test_a_field_is_found(batch, key):
    assert look_up(batch, key) is ROWS


@pytest.mark.parametrize(
    ("batch", "key", "message"),
    [
        ({}, "z", r"got 'z'\. This dict has: none that has a name\."),
        ({"x": 1, "y": 2}, "z", r"got 'z'\. This dict has: 'x', 'y'\."),
        ((1, 2), 2, r"got 2\. This tuple has: 0, 1\."),
        ((1, 2), "x", r"got 'x'\. This tuple has: only places, 0 to 1: give the number\."),
        (Holder(), 0, r"got 0\. This Holder has: 'labels'\."),
        (Holder(), "label", r"got 'label'\. This Holder has: 'labels'\."),
        (Pair(1, 2), "text", r"got 'text'\. This Pair has: 'image', 'label'\."),
        (Slotted(1, 2), "text", r"got 'text'\. This Slotted has: 'image', 'label'\."),
    ],
    ids=str,
)
def test_a_missing_field_lists_those_present(batch, key, message):
    with pytest.raises(ValueError, match=f"`key` must be a field of the batch, {message}"):
        look_up(batch, key)


@pytest.mark.parametrize(("fields", "more"), [(8, ""), (9, " and 1 more"), (11, " and 3 more")])
def test_of_many_fields_that_disagree_eight_are_shown(fields, more):
    batch = {f"f{number:02}": torch.zeros(number + 2, 3) for number in range(fields)}
    shown = ", ".join(f"`batch['f{number:02}']` has {number + 2}" for number in range(8))
    with pytest.raises(ValueError, match="disagree") as caught:
        batch_length(batch)
    assert f"number of samples: {shown}{more}." in str(caught.value)
