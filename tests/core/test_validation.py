"""Messages show any value in one short line, and texts of states are one printable line."""

import collections
import dataclasses

import pytest
import torch

from lightning_plugins.core.validation import did_you_mean, first_line, plain_text, plain_value, shown
from tests.support.damage import bounded


def shared(made, depth=60):
    for _ in range(depth):
        made = type(made)([made, made]) if not isinstance(made, dict) else type(made)({"a": made, "b": made})
    return made


@dataclasses.dataclass
class Pair:
    one: object
    other: object


def pairs(depth=60):
    made = None
    for _ in range(depth):
        made = Pair(made, made)
    return made


@pytest.mark.parametrize(
    "value",
    [
        shared([1]),
        shared((1,)),
        shared({"a": 1}),
        shared(collections.OrderedDict(a=1)),
        shared(collections.deque([1])),
        [shared((1,)), shared([1])],
        pairs(),
        {"a": [pairs()]},
        ["x" * 10_000_000] * 100,
        "x" * 100_000_000,
        b"x" * 100_000_000,
        list(range(1_000_000)),
        10**100_000,
        [10**100_000],
        torch.zeros(1).expand(10**12),
        "\x1b]0;x\x07\n" * 1000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_message_shows_any_value_in_one_short_line(value):
    with bounded(10, 1):
        text = shown(value)
    assert len(text) < 700
    assert text.isprintable()
    with pytest.raises((TypeError, ValueError)) as caught, bounded(10, 1):
        plain_text("stamp", value)
    assert len(str(caught.value)) < 900
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("values", [9_999, 10_000])
def test_the_values_of_a_long_list_are_not_asked_how_they_look(values):
    class Asked:
        def __repr__(self):
            raise AssertionError

    assert shown([Asked()] * values) == "a list that is too large to show"


def test_nor_is_a_long_text_in_a_list():
    class Asked(str):
        __slots__ = ()

        def __repr__(self):
            raise AssertionError

    assert shown([Asked("x" * 10_000_000)]) == "a list that is too large to show"


def test_lists_that_hold_themselves_are_shown():
    cyclic = [1]
    cyclic.append(cyclic)
    assert shown(cyclic).isprintable()


def test_ordinary_values_are_shown_as_they_are():
    for value in (
        "5%",
        0.1,
        ["x" * 100],
        ["a", {"b": (1, None)}],
        {"x": {1}},
        Pair(1, "a"),
        collections.OrderedDict(a=1),
    ):
        assert shown(value) == repr(value)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (2**63 - 1, 2**63 - 1),
        # other programs hold whole numbers in 64 bits
        (2**63, "9223372036854775808"),
        (-(2**63) - 1, "-9223372036854775809"),
        (True, "True"),
        (0.5, "0.5"),
        ("2.6.6", "2.6.6"),
        ([1], "[1]"),
        (None, None),
    ],
)
def test_a_value_of_a_file_is_shown_as_any_program_can(value, plain):
    found = plain_value(value)
    assert (type(found), found) == (type(plain), plain)


@pytest.mark.parametrize(
    ("error", "line"), [(OSError("two\nlines"), "two"), (ValueError(), "ValueError"), (ValueError(" \n"), "ValueError")]
)
def test_an_error_is_told_in_a_line(error, line):
    assert first_line(error) == line


@pytest.mark.parametrize(
    ("given", "end"),
    [("warm_up", "; did you mean 'WarmUp'?"), ("Wramup", "; did you mean 'WarmUp'?"), ("zzz", "."), (5, ".")],
)
def test_a_misspelt_word_is_told_what_was_probably_meant(given, end):
    assert did_you_mean(given, ["WarmUp", "OneCycle"]) == end
