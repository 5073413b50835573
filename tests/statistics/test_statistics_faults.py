"""Faults of the machine, made by the machine: a file that may not grow, two runs at once, rows that cost the same."""

import errno
import os
import resource
import shutil
import signal
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_plugins import CSVStatisticsLogger, StatisticsRecorder, TensorBoardStatisticsLogger
from lightning_plugins.core.validation import LightningPluginsWarning
from lightning_plugins.statistics.csv_file import CSVFile
from lightning_plugins.statistics.spool import can_append
from tests.support.statistics_runs import Classifier, dataset, fit, read, resumable, without_time


def in_child(function, seconds=60):
    """Call ``function`` in a process of its own; return its exit code."""
    child = os.fork()
    if not child:
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            function()
            code = 0
        finally:
            os._exit(code)
    return child, time.monotonic() + seconds


def joined(child, deadline):
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child did not end in time")


class NoRoom(pl.Callback):
    """Lets no file grow beyond 1500 bytes between two steps; the kernel then writes what fits and refuses the rest."""

    def __init__(self, begin, end):
        self.begin, self.end = begin, end

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if batch_idx == self.begin:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
        if batch_idx == self.end:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize("end", [60, 10**6], ids=["room again", "no room to the end"])
def test_training_goes_on_when_files_may_not_grow(end):
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(
                [
                    StatisticsRecorder(["accuracy"]),
                    CSVStatisticsLogger("log.csv", flush_seconds=0),
                    TensorBoardStatisticsLogger("tb"),
                    NoRoom(5, end),
                ],
                data=(DataLoader(dataset(800), batch_size=8), None),
                max_epochs=1,
            )
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        ours = [str(w.message) for w in caught if issubclass(w.category, LightningPluginsWarning)]
        Path("warnings").write_text("\n".join(ours))

    assert joined(*in_child(work)) == 0
    said = Path("warnings").read_text().splitlines()
    rows = read("log.csv")
    (train,) = Path("tb").glob("*/train")
    losses = EventAccumulator(str(train)).Reload().Scalars("batch_loss")
    assert [row["batch"] for row in rows] == [str(n) for n in range(1, len(rows) + 1)]  # what is there is whole
    assert [event.step for event in losses] == list(range(1, len(losses) + 1))
    outages = [line for line in said if "training goes on" in line]
    assert len(outages) == 2  # one for each file
    if end == 60:
        assert len(rows) == len(losses) == 100
        assert len(said) == 2
    else:
        assert len(rows) < 100
        assert f"{100 - len(rows)} rows of log.csv could not be written." in said


def test_two_runs_on_one_path_at_once_lose_no_row():
    def work():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(
                [CSVStatisticsLogger("log.csv", flush_seconds=0), StatisticsRecorder(["accuracy"])],
                data=(DataLoader(dataset(2400), batch_size=4), None),
                max_epochs=1,
            )

    children = [in_child(work) for _ in range(2)]
    assert [joined(*child) for child in children] == [0, 0]
    files = sorted(Path().glob("log*.csv"))
    assert len(files) == 2
    assert [len(read(path)) for path in files] == [600, 600]


def test_a_kill_in_the_middle_leaves_whole_rows():
    def work():
        file = CSVFile(Path("log.csv"))
        for number in range(10**6):
            file.add([{"epoch": "1", "batch": str(number + 1), "loss": "0.5"}])

    child, _ = in_child(work)
    while not Path("log.csv").exists() or Path("log.csv").stat().st_size < 50_000:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    rows = read("log.csv")
    assert Path("log.csv").read_bytes().endswith(b"\n")
    assert [row["batch"] for row in rows] == [str(n) for n in range(1, len(rows) + 1)]


def test_a_row_writes_its_own_bytes_and_no_more(monkeypatch):
    # the cost of a row does not depend on how many there are: nothing but the new rows is written
    from lightning_plugins.core import append_only_file as files

    written = []
    original = files.AppendOnlyFile.append
    monkeypatch.setattr(
        files.AppendOnlyFile, "append", lambda self, data: (written.append(sum(map(len, data))), original(self, data))
    )
    monkeypatch.setattr(files.AppendOnlyFile, "read", lambda self: pytest.fail("read the whole file"))
    file = CSVFile(Path("log.csv"))
    for number in range(1, 2001):
        file.add([{"epoch": "1", "batch": str(number), "loss": "0.5"}])
    file.close()
    assert max(written[1:]) <= len("1,2000,0.5\n")


def test_a_directory_that_vanishes_during_training_costs_a_warning_and_its_rows():
    class Vandal(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                shutil.rmtree("logs")

    with pytest.warns(LightningPluginsWarning, match="log.csv was deleted during the run: a new file has the rows"):
        fit([CSVStatisticsLogger("logs/log.csv"), Vandal()])
    assert {row["epoch"] for row in read(Path("logs/log.csv"))} == {"2"}


@pytest.mark.parametrize("first", ["csv", "tensorboard"])
@pytest.mark.parametrize("when", ["before the write", "after the write"])
def test_a_writer_that_fails_costs_no_row_and_no_other_writer_a_row(first, when, monkeypatch):
    """An error that nobody expects, or Ctrl-C, ends the run; what the run has done is on disk all the same, once."""
    from lightning_plugins.core import append_only_file as files

    original, calls = files.AppendOnlyFile.append, []

    def failing(self, data):
        calls.append(self.path)
        if len(calls) != 15 or when == "after the write":
            original(self, data)
        if len(calls) == 15:
            raise ZeroDivisionError("broken")

    monkeypatch.setattr(files.AppendOnlyFile, "append", failing)
    writers = [CSVStatisticsLogger("log.csv", flush_seconds=0), TensorBoardStatisticsLogger("tb")]
    module = Classifier()
    with pytest.raises(ZeroDivisionError):
        fit([StatisticsRecorder(["accuracy"]), *(writers if first == "csv" else writers[::-1])], module, max_epochs=9)
    done = [phase for phase, *_ in module.seen]
    assert [row["phase"] for row in read("log.csv")] == done
    (train,) = Path("tb").glob("*/train")
    assert len(EventAccumulator(str(train)).Reload().Scalars("batch_loss")) == done.count("train")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("renames", [True, False], ids=["renames", "cannot rename"])
def test_a_mount_that_cannot_append_has_whole_files_all_the_same(renames, monkeypatch, tmp_path):
    """As mounts of object stores: a file is written once, from its beginning."""
    original_open, original_replace, mount, renamed = os.open, os.replace, tmp_path / "mount", set()
    mount.mkdir()

    def opening(path, flags, *args, **options):
        if flags & os.O_APPEND and str(path).startswith((str(mount), "mount")):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), str(path))
        return original_open(path, flags, *args, **options)

    def replacing(source, target, **options):
        nonlocal renamed
        if not renames and str(target).startswith((str(mount), "mount")):
            raise OSError(errno.EPERM, "no renames here")
        renamed |= {Path(target).name} if str(target).startswith((str(mount), "mount")) else set()
        return original_replace(source, target, **options)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "replace", replacing)
    # Python 3.10 has bound it at import
    monkeypatch.setattr(Path, "replace", replacing)
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path / "c", filename="{step}", every_n_train_steps=2, save_top_k=-1)

    def callbacks(folder):
        return [CSVStatisticsLogger(f"{folder}/log.csv"), TensorBoardStatisticsLogger(f"{folder}/tb", name="run")]

    fit([*callbacks("mount"), checkpoint], enable_checkpointing=True, data=resumable())
    fit(callbacks("plain"), data=resumable())
    assert without_time("mount/log.csv") == without_time("plain/log.csv")
    losses = [
        EventAccumulator(f"{folder}/tb/run/train").Reload().Scalars("batch_loss") for folder in ("mount", "plain")
    ]
    assert [(e.step, e.value) for e in losses[0]] == [(e.step, e.value) for e in losses[1]]
    fit(callbacks("mount"), ckpt_path=tmp_path / "c" / "step=2.ckpt", data=resumable())  # a resume finds its place
    assert without_time("mount/log.csv") == without_time("plain/log.csv")
    again = EventAccumulator("mount/tb/run/train").Reload().Scalars("batch_loss")
    assert [event.step for event in again] == list(range(1, 7))
    # a reader never finds half a file, where that can be
    assert ("log.csv" in renamed) == renames
    # a place is tried where it is, also where its folders have to be made, and nothing is left of that
    assert [can_append(path) for path in (mount, mount / "new" / "deep", tmp_path / "new" / "deep")] == [
        False,
        False,
        True,
    ]
    assert not [path for folder in ("mount", "new") for path in (tmp_path / folder).rglob("*probe*")]
    assert not [path for path in mount.rglob("*") if path.name.endswith((".probe", ".tmp"))]
