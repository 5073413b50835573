"""The CSV file by itself: columns that come late, places found again, full disks and other people's editors."""

import csv
import errno
import math
import os
import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lightning_plugins.core import append_only_file as files
from lightning_plugins.core.files import replace_file
from lightning_plugins.core.validation import LightningPluginsWarning
from lightning_plugins.statistics.csv_file import CSVFile, shortest_float32
from tests.support.statistics_runs import read


def cells(number, **more):
    return {"epoch": "1", "batch": str(number), "phase": "train", "loss": repr(1 / number), **more}


def written(path, count, start=1):
    file = CSVFile(path)
    file.add([cells(number) for number in range(start, start + count)])
    return file


def test_nothing_is_touched_before_the_first_row(tmp_path):
    CSVFile(tmp_path / "deep" / "log.csv")
    assert not list(tmp_path.iterdir())


def test_a_late_column_is_one_rewrite_and_later_rows_cost_none(tmp_path, monkeypatch):
    rewrites = []
    monkeypatch.setattr(
        "lightning_plugins.statistics.csv_file.replace_file",
        lambda path, *parts: (rewrites.append(path), replace_file(path, *parts)),
    )
    file = written(tmp_path / "log.csv", 100)
    for number in range(101, 201):
        file.add([cells(number, late="0.5", later="0.25")])
    file.close()
    assert len(rewrites) == 1
    rows = read(tmp_path / "log.csv")
    assert list(rows[0]) == ["epoch", "batch", "phase", "loss", "late", "later"]
    assert [row["batch"] for row in rows] == [str(number) for number in range(1, 201)]
    assert {row["late"] for row in rows[:100]} == {""}
    assert {row["later"] for row in rows[100:]} == {"0.25"}


def test_a_kill_during_the_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    file = written(tmp_path / "log.csv", 10)
    before = (tmp_path / "log.csv").read_bytes()

    def killed(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        file.add([cells(11, late="1")])
    assert (tmp_path / "log.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]
    monkeypatch.undo()
    file.close()


def test_fixed_columns_stay(tmp_path):
    file = CSVFile(tmp_path / "log.csv", columns=["epoch", "batch", "loss"])
    file.add([cells(1, late="1"), cells(2)])
    file.close()
    assert (tmp_path / "log.csv").read_text() == "epoch,batch,loss\n1,1,1.0\n1,2,0.5\n"


def test_names_with_commas_and_quotes_are_read_back(tmp_path):
    file = CSVFile(tmp_path / "log.csv")
    file.add([cells(1, **{'loss, "weighted"': "2.0"})])
    file.close()
    assert read(tmp_path / "log.csv")[0]['loss, "weighted"'] == "2.0"


@pytest.mark.parametrize("after", [0, 1, 5])
def test_resume_moves_later_rows_beside_the_file(tmp_path, after):
    file = written(tmp_path / "log.csv", 10)
    mark = file.mark()
    assert mark == {"rows": 10, "last": ["1", "10", "train"]}
    file.add([cells(10 + n) for n in range(1, after + 1)])
    file.close()
    resumed = CSVFile(tmp_path / "log.csv")
    said = resumed.resume(mark)
    assert len(read(tmp_path / "log.csv")) == 10
    resumed.add([cells(11)])
    resumed.close()
    assert [row["batch"] for row in read(tmp_path / "log.csv")] == [str(n) for n in range(1, 12)]
    if after:
        assert said == [f"{after} rows after the checkpoint were moved from log.csv to log.replaced.1.csv."]
        assert [row["batch"] for row in read(tmp_path / "log.replaced.1.csv")] == [
            str(10 + n) for n in range(1, after + 1)
        ]
    else:
        assert said == []


def test_resume_finds_its_place_in_a_file_that_became_wider_later(tmp_path):
    file = written(tmp_path / "log.csv", 5)
    mark = file.mark()
    file.add([cells(6, late="1")])
    file.close()
    resumed = CSVFile(tmp_path / "log.csv")
    resumed.resume(mark)
    resumed.add([cells(6), cells(7, late="2")])
    resumed.close()
    rows = read(tmp_path / "log.csv")
    assert [row["batch"] for row in rows] == [str(n) for n in range(1, 8)]
    assert [row["late"] for row in rows] == [""] * 6 + ["2"]


def damaged(name, text):
    lines = text.splitlines(keepends=True)
    return {
        "other line ends": text.replace("\n", "\r\n"),
        "no last line end": text.rstrip("\n"),
        "a mark of the encoding": "\ufeff" + text.replace("\n", "\r\n"),
        "all cells in quotes": re.sub(r"([^,\n]+)", r'"\1"', text),
        "empty lines": lines[0] + "\n" + "".join(lines[1:]) + "\n\n",
        "a torn last row": text + "1,11,tr",
        "rows deleted in the middle": "".join(lines[:3] + lines[6:]),
        "a column deleted": "".join(",".join(line.split(",")[:3]).rstrip("\n") + "\n" for line in lines),
        "numbers rounded": "".join([lines[0]] + [",".join(line.split(",")[:3]) + ",0.1\n" for line in lines[1:]]),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "other line ends",
        "no last line end",
        "a mark of the encoding",
        "all cells in quotes",
        "empty lines",
        "a torn last row",
        "rows deleted in the middle",
        "a column deleted",
        "numbers rounded",
    ],
)
def test_a_file_edited_by_hand_is_gone_on_with(tmp_path, name):
    path = tmp_path / "log.csv"
    file = written(path, 10)
    mark = file.mark()
    file.close()
    path.write_bytes(damaged(name, path.read_text()).encode())
    before = [row["batch"] for row in read(path)][: 7 if "deleted in" in name else 10]
    resumed = CSVFile(path)
    said = resumed.resume(mark)
    resumed.add([cells(11)])
    resumed.close()
    rows = read(path)
    assert [row["batch"] for row in rows] == [*before, "11"]
    assert rows[-1]["loss"] == repr(1 / 11)
    assert b"\r" not in path.read_bytes()
    if name == "rows deleted in the middle":
        assert said == [f"{path} has 7 rows up to the checkpoint, where 10 were written."]
    if name == "a torn last row":
        assert "1,11,tr" in (tmp_path / "log.replaced.1.csv").read_text()


def test_a_file_that_lost_its_tail_is_gone_on_with(tmp_path):
    path = tmp_path / "log.csv"
    file = written(path, 10)
    mark = file.mark()
    file.close()
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))
    resumed = CSVFile(path)
    assert resumed.resume(mark) == [f"{path} has lost 3 rows; the run goes on after what is there."]
    resumed.add([cells(11)])
    resumed.close()
    assert [row["batch"] for row in read(path)] == [*"1234567", "11"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "its first line does not name the columns"),
        (b"\x00\xff\xfe garbage", "its first line does not name the columns"),
        (b"step,loss\n1,2\n", "its first line does not name the columns"),
        (b"epoch,batch,phase\n" + b"7,7,train\n" * 20, "row 10 is not that of the checkpoint"),
    ],
)
def test_a_file_that_is_not_ours_is_moved_aside_whole(tmp_path, content, why):
    path = tmp_path / "log.csv"
    file = written(path, 10)
    mark = file.mark()
    file.close()
    path.write_bytes(content)
    resumed = CSVFile(path)
    assert resumed.resume(mark) == [f"{path} was damaged: {why}. It was moved to log.1.csv, and a new file begins."]
    assert (tmp_path / "log.1.csv").read_bytes() == content
    resumed.add([cells(11)])
    resumed.close()
    assert [row["batch"] for row in read(path)] == ["11"]


def test_a_file_of_the_other_layout_is_moved_aside_whole(tmp_path):
    path = tmp_path / "log.csv"
    file = written(path, 3)
    mark = file.mark()
    file.close()
    before = path.read_text()
    resumed = CSVFile(path, separator=", ")
    assert "it is of another layout" in resumed.resume(mark)[0]
    resumed.add([{"epoch": "1/2", "batch": "4/4", "a, b": "1.0"}])
    resumed.close()
    assert path.read_text() == 'epoch, batch, "a, b"\n1/2, 4/4, 1.0\n'
    assert (tmp_path / "log.1.csv").read_text() == before


def test_other_fixed_columns_than_the_files_start_a_new_file(tmp_path):
    file = written(tmp_path / "log.csv", 3)
    mark = file.mark()
    file.close()
    resumed = CSVFile(tmp_path / "log.csv", columns=["epoch", "batch", "loss"])
    (said,) = resumed.resume(mark)
    assert "its columns are not epoch, batch, loss. It was moved to log.1.csv" in said


def test_resume_without_the_file_says_so(tmp_path):
    file = CSVFile(tmp_path / "log.csv")
    (said,) = file.resume({"rows": 3, "last": ["1", "3", "train"]})
    assert "is not there any more: the 3 rows before the checkpoint are missing" in said
    file.add([cells(4)])
    file.close()
    assert [row["batch"] for row in read(tmp_path / "log.csv")] == ["4"]


def test_resume_from_before_the_first_row_moves_the_file_aside(tmp_path):
    written(tmp_path / "log.csv", 3).close()
    file = CSVFile(tmp_path / "log.csv")
    assert file.resume({"rows": 0, "last": []}) == ["log.csv was moved to log.1.csv."]


def test_begin_takes_the_first_free_name(tmp_path):
    for expected in (None, "log.1.csv", "log.2.csv"):
        file = CSVFile(tmp_path / "log.csv")
        aside = file.begin()
        assert (aside and aside.name) == expected
        file.add([cells(1)])
        file.close()


def full_disk(monkeypatch, room):
    """Let ``room`` more bytes be written, part of a write included, then fail as a full disk does."""
    left = {"bytes": room}
    original = files.AppendOnlyFile.__init__

    class Handle:
        def __init__(self, handle):
            self._handle = handle

        def __getattr__(self, name):
            return getattr(self._handle, name)

        def write(self, data):
            taken = min(len(data), left["bytes"])
            if not taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            left["bytes"] -= taken
            return self._handle.write(data[:taken])

    def init(self, path, **options):
        original(self, path, **options)
        self._handle = Handle(self._handle)

    monkeypatch.setattr(files.AppendOnlyFile, "__init__", init)
    return left


def test_a_full_disk_costs_one_warning_and_no_row(tmp_path, monkeypatch):
    left = full_disk(monkeypatch, room=100)
    file = CSVFile(tmp_path / "log.csv")
    file.add([cells(1), cells(2)])
    whole = (tmp_path / "log.csv").read_text()
    with pytest.warns(LightningPluginsWarning, match=r"log.csv could not be written \(.*No space left.*the rows wait"):
        file.add([cells(3), cells(4), cells(5)])
    # the part of a row that fitted is not left behind; whole rows are
    kept = (tmp_path / "log.csv").read_text()
    rows = [",".join(cells(number).values()) + "\n" for number in (3, 4, 5)]
    fitting = [whole + "".join(rows[:count]) for count in range(4)]
    assert kept == max((text for text in fitting if len(text) <= 100), key=len)
    file.add([cells(6)])  # still full: no second warning (they are errors here)
    left["bytes"] = 10**6
    file.add([cells(7)])
    file.close()
    assert [row["batch"] for row in read(tmp_path / "log.csv")] == list("1234567")


@pytest.mark.parametrize("room", [0, 5, 40, 75, 120, 400, 10**6])
def test_a_first_flush_that_is_larger_than_the_room_keeps_every_whole_row_that_fits(tmp_path, monkeypatch, room):
    lines = [",".join(cells(1)) + "\n", *(",".join(cells(number).values()) + "\n" for number in range(1, 21))]
    full_disk(monkeypatch, room)
    file = CSVFile(tmp_path / "log.csv")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file.add([cells(number) for number in range(1, 21)])
        file.close()
    texts = ["".join(lines[:count]) for count in range(22)]
    expected = max((text for text in texts if len(text) <= room), key=len)
    assert (tmp_path / "log.csv").read_text() == expected
    lost = 20 - max(texts.index(expected) - 1, 0)
    said = [str(warning.message).split(": training")[0] for warning in caught]
    assert said[1:] == ([f"{lost} rows of {tmp_path / 'log.csv'} could not be written."] if lost else [])


@pytest.mark.parametrize(("number", "when"), [("ENOSPC", "when there is room"), ("EDQUOT", "when there is room")])
@pytest.mark.parametrize("other", ["EACCES", "EIO", "EFBIG", "EROFS"])
def test_room_is_promised_of_full_disks_alone(tmp_path, monkeypatch, number, when, other):
    for code, expected in ((number, when), (other, "as soon as that works")):

        def append(self, records, code=code):
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

        monkeypatch.setattr(files.AppendOnlyFile, "append", append)
        file = CSVFile(tmp_path / "log.csv")
        with pytest.warns(LightningPluginsWarning, match=expected):
            file.add([cells(1)])
        file._file.close()


def test_rows_that_never_found_room_are_counted(tmp_path, monkeypatch):
    full_disk(monkeypatch, room=0)
    file = CSVFile(tmp_path / "log.csv")
    with pytest.warns(LightningPluginsWarning, match="could not be written"):
        file.add([cells(1), cells(2)])
    with pytest.warns(LightningPluginsWarning, match=r"2 rows of .*log.csv could not be written\."):
        file.close()


def test_the_header_comes_with_the_first_rows_when_room_is_found_later(tmp_path, monkeypatch):
    left = full_disk(monkeypatch, room=5)
    file = CSVFile(tmp_path / "log.csv")
    with pytest.warns(LightningPluginsWarning, match="could not be written"):
        file.add([cells(1)])
    left["bytes"] = 10**6
    file.add([cells(2)])
    file.close()
    assert [row["batch"] for row in read(tmp_path / "log.csv")] == ["1", "2"]


def test_another_run_that_takes_the_path_loses_nobodys_rows(tmp_path):
    first = written(tmp_path / "log.csv", 3)
    second = CSVFile(tmp_path / "log.csv")
    assert second.begin().name == "log.1.csv"
    second.add([cells(1)])
    with pytest.warns(LightningPluginsWarning, match="log.csv was moved or replaced during the run"):
        first.add([cells(4)])
    first.add([cells(5, late="1")])  # a new column must not overwrite the other run's file
    first.close()
    second.close()
    assert [row["batch"] for row in read(tmp_path / "log.csv")] == ["1"]
    assert [row["batch"] for row in read(tmp_path / "log.1.csv")] == list("1234")
    assert [row["batch"] for row in read(tmp_path / "log.2.csv")] == list("12345")


@settings(max_examples=300, deadline=None)
@given(st.floats(width=32))
def test_shortest_float32_gives_the_number_back_and_nothing_shorter_does(value):
    text = shortest_float32(value)
    assert np.float32(text) == np.float32(value) or (math.isnan(value) and text == "nan")
    if math.isfinite(value):
        digits = len(text.lstrip("-").partition("e")[0].replace(".", "").strip("0"))
        assert digits <= 1 or np.float32(f"{value:.{digits - 2}e}") != np.float32(value)


def test_a_million_rows_need_not_be_parsed_to_find_the_place(tmp_path, monkeypatch):
    parsed = []
    original = csv.reader
    file = written(tmp_path / "log.csv", 2000)
    mark = file.mark()
    file.close()
    monkeypatch.setattr(csv, "reader", lambda lines, **how: (parsed.append(1), original(lines, **how))[1])
    CSVFile(tmp_path / "log.csv").resume(mark)
    assert len(parsed) == 2  # the header and the one row
