"""What one sample is in batches of every kind, and what remains in doubt is refused."""

import collections
import dataclasses
import enum
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from lightning_plugins import Tokens
from lightning_plugins.core.batches import SampleCounter, batch_length, look_up, split_batch
from lightning_plugins.core.counting import counter
from lightning_plugins.microbatching.merging import merge
from tests.support.foreign_batches import Encoding, Frame, Graph, Graphs, Neighbors, Output, Syntax


def images(count, *, channels=3, same=False):
    return [torch.rand(channels, 4 if same else 4 + index, 5) for index in range(count)]


def zeros(*shape):
    return torch.zeros(*shape)


SEQUENCES = [torch.rand(length, 3) for length in (4, 3, 3, 1)]
UNSORTED = [SEQUENCES[index] for index in (2, 0, 3, 1)]
GRAPHS = [Graph(torch.rand(nodes, 2), float(nodes)) for nodes in (3, 1, 4, 2)]
JAGGED = torch.nested.nested_tensor(UNSORTED, layout=torch.jagged)
with warnings.catch_warnings():  # torch calls them a prototype
    warnings.simplefilter("ignore")
    STRIDED = torch.nested.nested_tensor(UNSORTED)

FOUR = {
    "packed, sorted": pack_sequence(SEQUENCES),
    "packed": pack_sequence(UNSORTED, enforce_sorted=False),
    "strided nested tensor": STRIDED,
    "jagged nested tensor": JAGGED,
    "TensorDict": Frame({"x": zeros(4, 2), "y": zeros(4)}, [4]),
    "TensorDict of two dimensions": Frame({"x": zeros(4, 2)}, [4, 2]),
    "BatchEncoding": Encoding(input_ids=zeros(4, 7), attention_mask=zeros(4, 7)),
    "ModelOutput": Output(loss=torch.tensor(1.0), logits=zeros(4, 3)),
    "graphs": Graphs(GRAPHS),
    "list of graphs": GRAPHS,
    "graphs and a mask": (Graphs(GRAPHS), zeros(4)),
    "list of objects": [object() for _ in range(4)],
    "list of texts": ["a", "b", "c", "d"],
    "list of numbers": [1, 2, 3, 4],
    "list of tensors without dimensions": [torch.tensor(1.0) for _ in range(4)],
    "range": range(4),
    "deque of fields": collections.deque([zeros(4, 2), torch.arange(4)]),
    "images of several sizes and classes": tuple(zip(*[(image, 3) for image in images(4)], strict=True)),
    "images and classes in tensors": tuple(zip(*[(image, torch.tensor(3)) for image in images(4)], strict=True)),
    "images and boxes": tuple(
        zip(*[(image, {"boxes": zeros(index, 4)}) for index, image in enumerate(images(4))], strict=True)
    ),
    "images, some without boxes": (
        images(4),
        [{"boxes": zeros(2, 4)}, {"boxes": None}, {"boxes": zeros(1, 4)}, {"boxes": None}],
    ),
    "images with objects": [{"image": image, "masks": object()} for image in images(4)],
    "images in a mapping": {"image": images(4), "label": zeros(4)},
    "columns of texts": {"x": zeros(4), "names": [("a",) * 4, ("b",) * 4]},
    "settings": {"x": zeros(4), "classes": ["cat", "dog"], "kind": enum.Enum("Kind", "A").A},
    "settings beside two inputs": {"x": [zeros(4, 2), zeros(4, 3)], "classes": ["cat", "dog", "cow"]},
    "texts as often as fields": {"x": zeros(4), "names": [["a", "b", "c", "d"], ["e", "f", "g", "h"]]},
    "two inputs": ((zeros(4, 2), zeros(4, 3)), (zeros(4, 2), zeros(4, 1))),
    "regression": [zeros(4, 3), zeros(4, 1)],
    "three fields in a mapping": {"a": zeros(4), "b": zeros(4), "c": zeros(4)},
    "settings, of which one is a class": {"x": zeros(4), "kind": Neighbors},
    "arrays": {"x": np.zeros((4, 2)), "y": np.zeros(4)},
    "nothing in a field": (zeros(4), None),
    "nothing in a list": [zeros(4), [None, None]],
}


@pytest.mark.parametrize("name", FOUR)
def test_four_samples(name):
    assert batch_length(FOUR[name]) == 4


@pytest.mark.parametrize("name", [name for name in FOUR if not name.startswith("settings")])
def test_pieces_are_of_the_batchs_kind_and_have_its_samples(name):
    pieces = split_batch(FOUR[name], [3, 1])
    assert [type(piece) for piece in pieces] == [list if name == "range" else type(FOUR[name])] * 2
    assert batch_length(pieces[0]) == 3


def test_nothing_has_no_samples():
    assert batch_length(None) == 0


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("name", ["packed", "packed, sorted"])
def test_packed_sequences_keep_their_samples(name):
    pieces = split_batch(FOUR[name], [1, 3])
    assert same([part for piece in pieces for part in unpack_sequence(piece)], unpack_sequence(FOUR[name]))


@pytest.mark.parametrize("name", ["strided nested tensor", "jagged nested tensor"])
def test_nested_tensors_keep_their_samples_and_their_layout(name):
    pieces = split_batch(FOUR[name], [1, 3])
    assert same([part for piece in pieces for part in piece.unbind()], UNSORTED)
    assert {piece.layout for piece in pieces} == {FOUR[name].layout}
    assert all(int(piece.offsets()[0]) == 0 for piece in pieces if piece.layout is torch.jagged)


def test_jagged_tensors_that_shared_their_lengths_still_do():
    other = torch.nested.nested_tensor_from_jagged(torch.rand(len(JAGGED.values())), JAGGED.offsets())
    for piece in split_batch({"x": JAGGED, "weights": other}, [1, 3]):
        assert (piece["x"] * piece["weights"].unsqueeze(-1)).size(0) in (1, 3)


def test_graphs_are_joined_by_their_own_functions():
    pieces = split_batch(Graphs(GRAPHS), [1, 3])
    assert [piece.num_graphs for piece in pieces] == [1, 3]
    assert [len(piece.x) for piece in pieces] == [3, 7]
    assert int(Tokens("y", ignore_index=3)(Graphs(GRAPHS))) == 3


def test_three_images_of_three_channels_are_cut_between_images():
    pieces = split_batch({"image": images(3), "label": zeros(3)}, [2, 1])
    assert [[image.shape[0] for image in piece["image"]] for piece in pieces] == [[3, 3], [3]]


def test_two_inputs_of_a_batch_of_two_are_both_cut():
    pieces = split_batch({"views": [zeros(2, 3), zeros(2, 3)], "label": zeros(2)}, [1, 1])
    assert [[len(view) for view in piece["views"]] for piece in pieces] == [[1, 1], [1, 1]]


def test_two_fields_of_a_batch_of_two_are_both_cut():
    pieces = split_batch([zeros(2, 4), zeros(2, 1)], [1, 1])
    assert [[tuple(field.shape) for field in piece] for piece in pieces] == [[(1, 4), (1, 1)]] * 2


@pytest.mark.parametrize("count", [3, 2, 1])
def test_two_fields_are_fields_whatever_the_loaders_batch_size(count):
    """The last batch of a loader of two samples has one, and is no pair of samples."""
    counter_of_two = SampleCounter(full=2)
    assert counter_of_two([zeros(count, 4), zeros(count, 1)]) == count
    assert counter_of_two.reading is None


def test_as_many_fields_as_samples_have_one_number():
    counter_of_three = SampleCounter(full=3)
    assert counter_of_three([zeros(3, 4), zeros(3, 2), zeros(3, 1)]) == 3
    assert counter_of_three.reading is None


@pytest.mark.parametrize("number", [True, torch.tensor(2), -1, None, "4"])
def test_what_is_no_number_of_samples_is_not_taken_for_one(number):
    length = batch_length(Neighbors(zeros(4, 2), number))
    assert length == (0 if number == -1 else 4)


def test_a_reading_that_was_certain_stays():
    """A last batch of one image has no evidence of its own, nor has one of two samples with two views."""
    counter_of_images, counter_of_views = SampleCounter(), SampleCounter()
    sample = lambda index: (images(4)[index], {"boxes": zeros(index, 4)})  # noqa: E731
    assert counter_of_images(tuple(zip(*map(sample, range(4)), strict=True))) == 4
    assert counter_of_images(tuple(zip(sample(3), strict=True))) == 1
    undecided = SampleCounter()
    assert undecided(tuple(zip(sample(1), strict=True))) == 1
    assert undecided.reading is None
    views = lambda count: {"views": [zeros(count, 3)] * 3, "label": zeros(count)}  # noqa: E731
    assert [counter_of_views(views(count)) for count in (8, 3)] == [8, 3]
    pieces = split_batch(views(3), [2, 1], counter_of_views.reading)
    assert [[len(view) for view in piece["views"]] for piece in pieces] == [[2, 2, 2], [1, 1, 1]]


def test_a_number_that_a_dataclass_says_is_that_of_the_piece():
    assert batch_length(Neighbors(zeros(9, 2), 4)) == 4
    for batch in (Neighbors(zeros(4, 2), 4), Encoding(x=zeros(4, 2), batch_size=4)):
        assert [piece.batch_size for piece in split_batch(batch, [3, 1])] == [3, 1]
        assert [batch_length(piece) for piece in split_batch(batch, [3, 1])] == [3, 1]


UNCLEAR = {
    "images": (images(8), "can be read in two ways: as 8 samples, .* or as fields of 3 samples each"),
    "images of one size": (images(8, same=True), "can be read in two ways: as 8 samples"),
    "dictionaries of images": ([{"image": image} for image in images(8)], "as 8 samples, .* or as fields of 3 samples"),
    "two dictionaries of images": ([{"image": image} for image in images(2)], "as 2 samples, .* or as fields of 3"),
    "pairs of image and class": ([(image, 3) for image in images(8)], "as 8 samples, .* or as fields of 3 samples"),
    "waveforms": ([zeros(1, 10 + index) for index in range(8)], "as 8 samples, .* or as fields of 1 samples"),
    "sequences": (UNSORTED, "disagree .* unless they are 4 samples"),
    "images and masks": (
        (images(8), images(8, channels=1)),
        "unless they are 2 samples",
    ),
    "images and all their boxes": (
        {"image": images(8), "boxes": zeros(5, 4)},
        r"disagree on the number of samples: `batch\['boxes'\]` has 5, `batch\['image'\]\[0\]` has 3",
    ),
    "several loaders": (
        {"a": [zeros(4, 2), zeros(4)], "b": [zeros(6, 2), zeros(6)]},
        r"`batch\['a'\]\[0\]` has 4, .*`batch\['b'\]\[0\]` has 6",
    ),
    "several loaders of like tensors": (
        {"a": [zeros(4, 2), zeros(4, 1)], "b": [zeros(6, 2), zeros(6, 1)]},
        r"`batch\['a'\]\[0\]` has 4, .*`batch\['b'\]\[0\]` has 6, .*`batch\['a'\]` is a list of 2",
    ),
    "loaders as dictionaries": (
        [{"x": zeros(4)}, {"x": zeros(6)}],
        r"`batch\[0\]\['x'\]` has 4, `batch\[1\]\['x'\]` has 6",
    ),
    "two tensors that disagree": ([zeros(9, 4), zeros(3, 4)], r"`batch\[0\]` has 9, `batch\[1\]` has 3"),
    "texts that disagree": ({"a": ["x", "y"], "b": ["z"]}, r"`batch\['a'\]` has 2, `batch\['b'\]` has 1"),
    "a graph": (GRAPHS[0], "the batch, a Graph, holds no tensor, array or list with a row per sample"),
    "nothing": ({}, "the batch, a dict, holds no tensor"),
    "an object whose fields are no named tuple's": (Syntax(), "the batch, a Syntax, holds no tensor"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_can_be_read_in_two_ways_is_refused_by_the_arguments_name(name):
    batch, message = UNCLEAR[name]
    with pytest.raises(ValueError, match=rf'`count` must not be "samples" here: .*{message}.* Count with a function'):
        batch_length(batch)


def test_the_loaders_batch_size_decides_and_the_reading_stays():
    listed, collated = SampleCounter(full=8), SampleCounter(full=16)
    assert listed(images(8)) == 8
    assert [listed(images(count)) for count in (3, 2, 1)] == [3, 2, 1]
    fields = lambda count: [zeros(count, 4), zeros(count, 2), zeros(count, 1)]  # noqa: E731
    assert collated(fields(16)) == 16
    assert [collated(fields(count)) for count in (3, 1)] == [3, 1]
    assert [len(piece) for piece in split_batch(images(3), [2, 1], listed.reading)] == [2, 1]
    assert [len(piece) for piece in split_batch(fields(3), [2, 1], collated.reading)] == [3, 3]
    with pytest.raises(ValueError, match=r"must be cut in one way, .* Give `split`"):
        split_batch(fields(3), [2, 1])


def test_a_module_may_count_its_samples_itself():
    class Module:
        def get_batch_size(self, batch):
            return len(batch["image"])

    class Configured:
        def get_batch_size(self):
            return 32

    batch = {"image": images(8), "boxes": zeros(5, 4)}
    assert counter("samples", module=Module())(batch) == 8
    assert counter("samples", module=Configured())(zeros(5, 4)) == 5


def test_labels_of_a_nested_tensor_are_counted():
    labels = [torch.tensor([1, -100]), torch.tensor([2, 3, -100])]
    for layout in (torch.strided, torch.jagged):
        assert int(Tokens("labels")({"labels": torch.nested.nested_tensor(labels, layout=layout)})) == 3


def test_a_field_of_a_foreign_object_is_found():
    graphs = Graphs(GRAPHS)
    assert look_up(graphs, "y") is graphs.y
    with pytest.raises(ValueError, match=r"got 'z'\. This Graphs has: 'x', 'y'\."):
        look_up(graphs, "z")


# Nests of everything that can be put together again: a batch of three samples or more, since of two a list of tensors
# may be two inputs.

Record = collections.namedtuple("Record", "first second")


@dataclasses.dataclass
class Fields:
    first: object
    second: object


def leaves(length):
    def tensor(width):
        return torch.arange(length * width, dtype=torch.float64).reshape(length, width)

    texts = [str(index) for index in range(length)]
    return st.one_of(
        st.integers(1, 3).map(tensor),
        st.just(torch.arange(length)),
        st.just(texts),
        st.just(None),
        st.just("setting"),
        st.just(np.arange(length)),
        st.just(pack_sequence([torch.ones(1 + index % 2) for index in range(length)], enforce_sorted=False)),
    )


def nests(length):
    pairs = lambda inner: st.tuples(inner, inner)  # noqa: E731
    return st.recursive(
        leaves(length),
        lambda inner: st.one_of(
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
            pairs(inner).map(lambda pair: Record(*pair)),
            pairs(inner).map(lambda pair: Fields(*pair)),
            pairs(inner).map(lambda pair: Encoding(x=pair[0], y=pair[1])),
        ),
        max_leaves=6,
    )


def equal(left, right):
    if isinstance(left, torch.nn.utils.rnn.PackedSequence):
        return same(unpack_sequence(left), unpack_sequence(right))
    if isinstance(left, (torch.Tensor, np.ndarray)):
        return type(left) is type(right) and left.shape == right.shape and bool((left == right).all())
    if isinstance(left, (dict, Encoding)):
        return type(left) is type(right) and left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, Fields):
        return equal(vars(left), vars(right))
    if isinstance(left, Record):
        return type(left) is type(right) and all(map(equal, left, right))
    return left == right


@settings(max_examples=150, deadline=None)
@given(st.data(), st.lists(st.integers(1, 4), min_size=2, max_size=4).filter(lambda sizes: sum(sizes) > 2))
def test_split_and_merged_is_the_batch_and_its_count_that_of_the_pieces(data, sizes):
    length = sum(sizes)
    batch = {"x": torch.zeros(length), "nest": data.draw(nests(length))}
    pieces = split_batch(batch, sizes)
    assert batch_length(batch) == length
    assert [batch_length(piece) for piece in pieces] == sizes
    assert equal(merge(pieces, [size / length for size in sizes], sizes), batch)
