"""Which fits have led to a file, and which of several runs is the newest."""

from __future__ import annotations

import random
import time

import pytest

from lightning_plugins.checkpoints.run_identity import (
    Lineage,
    checked_lineage,
    lineage_of,
    new_fit_name,
    newest_run,
)


def test_a_fit_that_begins_at_step_zero_is_a_run_of_its_own():
    run = Lineage((("a", 5),))
    assert run.new_fit("b", 0) == Lineage((("b", 0),))
    assert run.new_fit("b", 3) == Lineage((("a", 3), ("b", 3)))
    assert Lineage((("a", 5), ("b", 9))).new_fit("c", 4).fits == (("a", 4), ("b", 4), ("c", 4))


def test_what_was_written_after_the_step_resumed_from_is_no_part_of_the_run():
    resumed = Lineage((("a", 50),)).new_fit("b", 50).at(70)
    held = {step: Lineage((("a", step),)) in resumed for step in (40, 50, 51)}
    assert held == {40: True, 50: True, 51: False}
    assert Lineage() not in resumed
    assert Lineage().at(3) == Lineage()


def test_names_of_fits_differ_and_sort_by_time():
    names = [new_fit_name() for _ in range(50)]
    assert len(set(names)) == 50
    moments = [name.partition("-")[0] for name in names]
    assert moments == sorted(moments)


def test_a_name_says_when_its_fit_began():
    """Runs of other versions are compared with it: it counts microseconds, whichever wrote it."""
    before = time.time()
    found = new_fit_name().partition("-")[0]
    assert before - 1e-3 <= int(found) / 1e6 <= time.time() + 1e-3
    assert len(found) == 20


def test_a_lineage_goes_through_plain_values():
    lineage = Lineage((("a", 5), ("b", 9)))
    assert checked_lineage(lineage.plain()) == lineage
    assert lineage_of({"lightning_plugins_run": lineage.plain()}) == lineage
    for checkpoint in ({}, {"lightning_plugins_run": 1}, {"lightning_plugins_run": {"fits": [["a", -1]]}}):
        assert lineage_of(checkpoint) == Lineage()


def test_the_run_that_began_last_is_the_newest_whatever_its_steps():
    told = {
        "old": (Lineage((("0001-a", 900),)), 900, 9),
        "new": (Lineage((("0002-b", 20),)), 20, 0),
        "newer": (Lineage((("0002-b", 40),)), 40, 1),
    }
    assert newest_run(list(told), told) == ["new", "newer"]
    assert newest_run([], {}) == []


def test_of_runs_with_and_without_a_name_the_one_with_the_highest_step_counts():
    named = (Lineage((("0001-a", 30),)), 30, 2)
    assert newest_run("ab", {"a": named, "b": (Lineage(), 90, 3)}) == ["b"]
    assert newest_run("ab", {"a": named, "b": (Lineage(), 30, 1)}) == ["a"]


@pytest.mark.parametrize("seed", range(20))
def test_two_runs_of_unlike_epochs_come_apart_in_any_order(seed):
    """Against the runs that were interleaved: files at the ends of epochs, of two lengths."""
    draw = random.Random(seed)
    short = draw.randint(3, 40)
    long = short + draw.randint(max(2, short // 3), 60)
    runs = {
        name: [(length * (e + 1), e) for e in range(draw.randint(3, 9))] for name, length in (("s", short), ("l", long))
    }
    files = {f"{name}{epoch}": (Lineage(), step, epoch) for name, found in runs.items() for step, epoch in found}
    shuffled = list(files)
    draw.shuffle(shuffled)
    highest = max(runs, key=lambda name: (runs[name][-1][0], name == "l"))
    if runs["s"][-1][0] == runs["l"][-1][0]:
        pytest.skip("both end at one step")
    found = newest_run(shuffled, files)
    falls = any(a[0] < b[0] and a[1] > b[1] for a in runs["s"] for b in runs["l"])
    assert {name[0] for name in found} == {highest} if falls else highest in {name[0] for name in found}


def test_the_latest_fit_decides_where_a_file_belongs():
    run, branch = Lineage((("a", 50),)), Lineage((("a", 5), ("b", 9)))
    assert branch not in run
    assert branch in Lineage((("a", 5), ("b", 20)))
    assert (run.began, branch.began, Lineage().began) == ("a", "b", "")
    assert branch.at(12) == Lineage((("a", 5), ("b", 12)))
    assert (Lineage() in run) is False


@pytest.mark.parametrize("fits", [[["a", 0]], [("x" * 80, 3)], (("a", 1),), [["a", 1]] * 10_000], ids=len)
def test_a_lineage_of_a_file_is_taken(fits):
    assert lineage_of({"lightning_plugins_run": {"version": 1, "fits": fits}}).fits == tuple(map(tuple, fits))


@pytest.mark.parametrize(
    "fits",
    [
        *(None, 5, "ab", {"a": 1}, {("a", 1)}, ["a1"], [{"a": 1, "b": 2}], [["a"]], [["a", 1, 2]], [[5, 1]], [["", 1]]),
        *([["x" * 81, 1]], [["two\nlines", 1]], [["a", -1]], [["a", True]], [["a", 1.5]], [["a", "1"]]),
        [["a", 1]] * 10_001,
    ],
    ids=lambda fits: str(fits)[:20],
)
def test_what_is_no_lineage_is_none(fits):
    state = {"version": 1, "fits": fits}
    with pytest.raises((TypeError, ValueError), match=r"`(lightning_plugins_run|fits)` must"):
        checked_lineage(state)
    assert lineage_of({"lightning_plugins_run": state}) == Lineage()


def newest_of(files):
    """Return the newest run of files without names, each a step and an epoch."""
    return newest_run(range(len(files)), {index: (Lineage(), *numbers) for index, numbers in enumerate(files)})


@pytest.mark.parametrize(
    ("files", "newest"),
    [
        ([], []),
        ([(10, 0)], [0]),
        # one run that saves within epochs, twice at a step, and once without its epoch
        ([(5, 0), (10, 0), (15, 1), (15, 1), (20, None), (20, 1), (30, 2)], [0, 1, 2, 3, 4, 5, 6]),
        ([(10, 0), (20, 1), (30, 0)], [2]),
        # at one step there is one epoch
        ([(10, 0), (20, 1), (30, 2), (30, 1)], [3]),
        # a file without its epoch goes where its steps are nearest, as one of the first epoch
        ([(10, None), (20, 1), (30, 0)], [2]),
        ([(0, 0), (1, 0)], [0, 1]),
    ],
)
def test_files_without_names_are_told_apart_by_their_epochs(files, newest):
    assert sorted(newest_of(files)) == newest


@pytest.mark.parametrize("short", [4, 10])
@pytest.mark.parametrize("times", [3, 5])
@pytest.mark.parametrize("epochs", [(4, 1), (7, 2), (10, 2), (20, 3), (21, 5)])
def test_two_runs_with_epochs_of_unlike_lengths_come_apart(short, times, epochs):
    runs = [
        [(length * (epoch + 1), epoch) for epoch in range(count)]
        for length, count in zip((short, short * times), epochs, strict=True)
    ]
    expected = max(runs, key=lambda run: run[-1][0])
    files = runs[0] + runs[1]
    random.Random(0).shuffle(files)
    assert sorted(files[index] for index in newest_of(files)) == expected
