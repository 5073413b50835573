"""A listing of further sets of tensors is checked before anything that it says is used."""

import pytest

from lightning_plugins.core import second_sets
from lightning_plugins.core.checkpoint_file import CheckpointError
from lightning_plugins.core.checkpoint_keys import SECOND_SETS, SECOND_SETS_FOLDER
from lightning_plugins.core.second_sets import belonging, listed, new_listing, rest_digest, write_listing

GOOD = {"version": 1, "save": "a", "step": 7, "sets": [["raw"], ["average", "ema"]]}


def test_what_a_save_lists_is_read_again():
    sets = new_listing("a", 7, [("raw",), ("average", "ema")])
    assert listed({SECOND_SETS: sets.plain()}) == sets
    assert sets.plain() == GOOD
    assert [sets.root("raw"), sets.root("average", "ema"), sets.root("average")] == ["0", "1", None]
    assert listed({}) is None


NAMES = "must have a list of names as `sets`"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sets": 5}, NAMES),
        ({"sets": {}}, NAMES),
        ({"sets": ["raw"]}, NAMES),
        ({"sets": [["raw"], []]}, NAMES),
        ({"sets": [["raw", 1]]}, NAMES),
        ({"version": True}, "must be of version 1, got True"),
        ({"version": 2}, "must be of version 1, got 2"),
        ({"step": -1}, "`step` must be at least 0"),
        ({"save": 3}, "`save` must be a text"),
    ],
    ids=str,
)
def test_a_listing_that_lies_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        listed({SECOND_SETS: {**GOOD, **change}})


@pytest.mark.parametrize("content", [5, [], *({k: GOOD[k] for k in GOOD if k != key} for key in GOOD)], ids=str)
def test_what_is_no_listing_is_refused(content):
    with pytest.raises(CheckpointError, match=r"must list sets of weights, got"):
        listed({SECOND_SETS: content})


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A directory whose folder was written while an older ``meta.pt`` lay there, and the listing in the folder.

    It holds nothing else, and no marks.
    """
    monkeypatch.setattr(second_sets, "check_marks", lambda path, said: None)
    (tmp_path / SECOND_SETS_FOLDER).mkdir()
    (tmp_path / "meta.pt").write_bytes(b"old")
    sets = new_listing("a", 7, [("raw",)])
    write_listing(tmp_path, sets, rest_digest(tmp_path))
    return tmp_path, sets


def test_a_folder_belongs_to_the_rest_that_says_so(saved):
    path, sets = saved
    assert belonging(path, {SECOND_SETS: sets.plain()}) == sets


def test_a_save_that_was_cut_off_is_told_from_a_folder_that_is_left_over(saved):
    path, sets = saved
    with pytest.raises(CheckpointError, match=r"its folder \w+ is of step 7 and its meta\.pt of no step"):
        belonging(path, {})
    # a run without further sets replaces the checkpoint
    (path / "meta.pt").write_bytes(b"new")
    assert belonging(path, {}) is None
    write_listing(path, sets, None)
    assert belonging(path, {}) is None


def test_parts_of_different_saves_are_refused(saved):
    path, _ = saved
    other = {SECOND_SETS: new_listing("b", 9, [("raw",)]).plain()}
    with pytest.raises(CheckpointError, match=r"its folder \w+ is of step 7 and its meta\.pt of step 9"):
        belonging(path, other)
    (path / SECOND_SETS_FOLDER / "sets.json").unlink()
    with pytest.raises(CheckpointError, match=r"its folder \w+ is of no step and its meta\.pt of step 9"):
        belonging(path, other)
    assert belonging(path, {}) is None


@pytest.mark.parametrize(
    "content", ["[]", "5", "[" * 100_000, "{", ""], ids=["list", "number", "deep", "brace", "nothing"]
)
def test_a_folder_whose_listing_is_damaged_is_refused(saved, content):
    path, _ = saved
    (path / SECOND_SETS_FOLDER / "sets.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"sets\.json (must list sets|cannot be read)"):
        belonging(path, {})
