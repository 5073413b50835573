"""Kills a run, looks at what it left, lets it go on, kills it again, until it ends; then compares.

Every attempt is a process of its own, forked from this one, which has imported everything: it takes some tenths of a
second.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import lightning_plugins
from lightning_plugins.core import temporary_files
from lightning_plugins.core.validation import LightningPluginsWarning
from tests.support.survival_evidence import (
    Evidence,
    Losses,
    Truth,
    check_dead,
    compare,
    hidden_files,
    look,
    quietly,
    torn_files,
)
from tests.support.survival_faults import (
    KINDS,
    MOMENTS,
    Fault,
    InjectedError,
    Moments,
    action,
    draw,
    mount_small_disk,
    unlimit_files,
)
from tests.support.survival_run import EPOCHS, Plan, train

SOFT = {signal.SIGINT, signal.SIGTERM}
SECONDS = 120  # an attempt that takes longer hangs


@dataclass(frozen=True)
class Place:
    """Where a run lives.

    Args:
        disk: The file system that may fill up: the run's folder, and the temporary files of whoever writes into it.
        aside: A directory elsewhere, for what the test itself writes.
        is_small: Whether ``disk`` is a small file system of its own.
    """

    disk: Path
    aside: Path
    is_small: bool

    @property
    def run(self) -> Path:
        return self.disk / "run"

    @property
    def final(self) -> Path:
        """The checkpoint that is written after the run."""
        return self.aside / "final.ckpt"

    def result(self) -> dict[str, Any]:
        """Return what the last finished attempt had in memory, and its last checkpoint."""
        return {**torch.load(self.aside / "result.pt"), "checkpoint": torch.load(self.final, weights_only=True)}

    def clear(self) -> None:
        for path in (self.run, self.disk / "tmp"):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)


def in_child(
    work: Callable[[], Any],
    report: Path,
    kill: tuple[float, signal.Signals] | None = None,
    *,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Run ``work`` in a child; return how it ended: signal or exit code, exception, warnings, and what it returned.

    Args:
        work: What to do.
        report: A file for the child's answer.
        kill: Seconds after which the child gets a signal from outside.
        seconds: How long it may take.
    """
    report.unlink(missing_ok=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, SOFT)  # until the child is ready to die
    child = os.fork()
    if not child:
        _be_child(work, report)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SOFT)
    deadline = time.monotonic() + seconds
    strike = (time.monotonic() + kill[0], kill[1]) if kill else (deadline, signal.SIGKILL)
    status = None
    while status is None:
        done, found = os.waitpid(child, os.WNOHANG)
        status = found if done else None
        if status is None and time.monotonic() >= strike[0]:
            os.kill(child, strike[1])
            strike = (deadline, signal.SIGKILL)
        time.sleep(0.002)
    assert time.monotonic() < deadline, "the run did not end"
    told = json.loads(report.read_text()) if report.exists() else {}
    return {"code": os.waitstatus_to_exitcode(status), "error": None, "text": "", "warnings": [], **told}


def _be_child(work: Callable[[], Any], report: Path) -> None:
    code = 1
    try:
        told = _try(work)
        code = told.pop("code")
        unlimit_files()
        report.write_text(json.dumps(told))
    finally:
        os._exit(code)  # whatever happens: the rest of the test run is the parent's


def _try(work: Callable[[], Any]) -> dict[str, Any]:
    warned: list[str] = []
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SOFT)
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", LightningPluginsWarning)
        warnings.showwarning = lambda message, *_: warned.append(str(message))
        told = {"code": 0, "result": work(), "error": None}
        signal.pthread_sigmask(signal.SIG_BLOCK, SOFT)
    except BaseException as error:  # noqa: BLE001  # whatever it is, the parent judges
        signal.pthread_sigmask(signal.SIG_BLOCK, SOFT)
        told = {"code": 1, "error": type(_first(error)).__name__, "text": traceback.format_exc()}
    return {**told, "warnings": warned}


def _first(error: BaseException) -> BaseException:
    """Return the interrupt after which Lightning failed to clean up, as it does before its first batch; else the error.

    An error that comes through our code is never Lightning's own.
    """
    through = {frame.f_globals["__name__"].partition(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)}
    if isinstance(error.__context__, KeyboardInterrupt) and lightning_plugins.__name__ not in through:
        return error.__context__
    return error


class Chronicle(pl.Callback):
    """Writes a full checkpoint after every batch of an uninterrupted run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        trainer.save_checkpoint(self.folder / f"{done}.ckpt")


def uninterrupted(place: Place, plan: Plan) -> Truth:
    """Run without a kill; then once more, counting the moments and keeping what was there after each batch."""
    answer = place.aside / "answer.json"

    def whole():
        tempfile.tempdir = str(place.disk / "tmp")
        begin = time.monotonic()
        torch.save(train(place.run, plan, place.final), place.aside / "result.pt")
        return time.monotonic() - begin

    def counted():
        tempfile.tempdir = str(place.disk / "tmp")
        moments = Moments(place.disk)
        moments.listen(*MOMENTS)
        train(place.run, plan, place.final)
        moments.stop()
        return dict(moments.seen)

    def chronicled():
        folder = place.aside / "batches"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        torch.save(train(place.run, plan, place.final, extra=[Chronicle(folder)]), place.aside / "result.pt")

    def run(work):
        place.clear()
        ended = in_child(work, answer)
        assert ended["code"] == 0, ended["text"]
        return ended["result"]

    totals = run(counted)
    run(chronicled)
    again = quietly(look, place.run), place.result()
    batches = {int(path.stem): torch.load(path, weights_only=True) for path in (place.aside / "batches").iterdir()}
    totals["time"] = run(whole)
    truth = Truth(place.result(), quietly(look, place.run), batches, totals)
    assert compare(*again, truth) == []  # keeping them changed nothing
    check_dead(truth.evidence, truth)
    return truth


def attempt(
    place: Place, plan: Plan, truth: Truth, fault: Fault | None, *, ckpt_path: Path | None, extra: Any = ()
) -> dict[str, Any]:
    """Run from a checkpoint until the fault or the end."""

    def work():
        tempfile.tempdir = str(place.disk / "tmp")
        temporary_files._OURS = 0.0  # the run that was killed ended some milliseconds ago
        moments = Moments(place.disk)
        if fault is not None and fault.moment != "time":
            number = 1 + int(fault.share * truth.totals[fault.moment])
            moments.arm(fault, number, action(fault, place.disk, is_small=place.is_small))
            moments.listen(fault.moment)
        result = train(place.run, plan, place.final, ckpt_path=ckpt_path, extra=extra)
        moments.stop()
        torch.save(result, place.aside / "result.pt")

    kill = None
    if fault is not None and fault.moment == "time":
        kill = (fault.share * truth.totals["time"], signal.Signals[fault.kind])
    ended = in_child(work, place.aside / "answer.json", kill)
    (place.disk / "ballast").unlink(missing_ok=True)
    return ended


# How an attempt may end other than well: by a signal, or by these exceptions.
DEATHS = {
    "SIGKILL": (-signal.SIGKILL, ()),
    "SIGTERM": (-signal.SIGTERM, ("SIGTERMException",)),
    "SIGINT": (-signal.SIGINT, ("KeyboardInterrupt", "SystemExit")),
    "cut in a write": (-signal.SIGXFSZ, ()),
    "exception in validation": (None, (InjectedError.__name__,)),
    "exception in a batch": (None, (InjectedError.__name__,)),
    "exception in the writer": (None, (InjectedError.__name__, "OSError")),
    "full disk": (None, ("OSError", "RuntimeError")),  # torch's own writer knows no errno
}


# Deaths that leave time to clean up. A signal can strike in between, and so can an error as a file is being removed.
CLEAN = {"exception in validation", "exception in a batch", "full disk"}


def died_of(fault: Fault, ended: dict[str, Any]) -> bool:
    """Return whether the fault killed the attempt; anything else that did is an AssertionError."""
    number, errors = DEATHS[fault.kind]
    if ended["code"] == 0:
        return False
    by_fault = ended["code"] == number or (ended["code"] == 1 and ended["error"] in errors)
    by_fault |= fault.kind == "SIGINT" and ended["error"] is None  # as the child was about to say how it ended
    assert by_fault, f"{fault} ended with {ended['code']}: {ended['text']}"
    return True


class Chain:
    """One run with its deaths.

    Args:
        place: Where it lives; emptied first.
        plan: How it runs.
        truth: The same run, uninterrupted.
    """

    def __init__(self, place: Place, plan: Plan, truth: Truth) -> None:
        self.place, self.plan, self.truth = place, plan, truth
        self.counts: Counter[str] = Counter()
        self.found = Evidence()
        self.lost = Losses()
        self.history: list[str] = []
        place.clear()

    def run(self, rng: random.Random, kinds: list[str], *, timed: bool) -> list[str]:
        """Die of each kind in turn, or until an attempt gets to the end; return where the finished run is wrong."""
        for kind in kinds:
            fault = draw(rng, kind, left=self._share_left(), timed=timed)
            if not self.step(fault):
                break
        else:
            self.step(None)
        return self.differences()

    def differences(self) -> list[str]:
        """Return where the finished run is not the uninterrupted one, but for what it has warned of."""
        return compare(self.found, self.place.result(), self.truth, self.lost)

    def step(self, fault: Fault | None, *, extra: Any = ()) -> bool:
        """Let the run go on until the fault; look at what it left. Return whether the run has to go on."""
        newest = self.found.newest(self.plan)
        path = None if newest is None else self.place.run / newest
        before = hidden_files(self.place.run), torn_files(self.place.run)
        ended = attempt(self.place, self.plan, self.truth, fault, ckpt_path=path, extra=extra)
        self.history.append(f"from {newest}: {fault}, {ended['code']} {ended['error']}")
        if fault is None:
            assert ended["code"] == 0, ended["text"]
            died = False
        else:
            died = died_of(fault, ended)
        self.lost.add(ended["warnings"])
        self._look(fault, *before)
        if died:
            self.counts[fault.kind] += 1
        return died

    def _look(self, fault: Fault | None, hidden: set[str], torn: set[str]) -> None:
        self.found = quietly(look, self.place.run)
        check_dead(self.found, self.truth, self.lost)
        if not torn and (fault is None or fault.kind != "cut in a write"):
            assert not (found := torn_files(self.place.run)), f"torn: {found}"
        if fault is None:
            assert not (old := {name for name in hidden_files(self.place.run) if name.endswith(".tmp")}), (
                f"stayed: {old}"
            )
        if fault is None or fault.kind in CLEAN:
            assert not (new := hidden_files(self.place.run) - hidden), f"left behind: {new}"

    def _share_left(self) -> float:
        newest = self.found.newest(self.plan)
        if newest is None:
            return 1.0
        done = self.found.checkpoints[newest]["epoch"] / EPOCHS
        return 1.1 - done  # a resume has work of its own


def chains(plans: list[Plan], folder: Path, *, kills: int, seed: int, timed: bool) -> tuple[Counter[str], str]:
    """Kill until there are enough deaths, each plan and each kind in turn; return their counts, and what was full.

    Raises:
        AssertionError: If anything was wrong: with the seed, the plan and the history of the run.
    """
    disk, aside = folder / "disk", folder / "aside"
    disk.mkdir(parents=True)
    aside.mkdir()
    answer = folder / "chains.json"

    def work():
        place = Place(disk, aside, mount_small_disk(disk))
        counts: Counter[str] = Counter()
        truths = {plan.name: uninterrupted(place, plan) for plan in plans}
        number = 0
        while sum(counts.values()) < kills or set(counts) < set(KINDS):
            plan = plans[number % len(plans)]
            rng = random.Random(f"{seed} {number}")
            order = sorted(rng.sample(sorted(KINDS), len(KINDS)), key=counts.__getitem__)  # the rarest so far first
            chain = Chain(place, plan, truths[plan.name])
            try:
                wrong = chain.run(rng, order, timed=timed)
                assert not wrong, "the finished run is not the uninterrupted one:\n" + "\n".join(wrong)
            except Exception as error:
                shutil.copytree(place.run, folder / "evidence")  # what is on the small disk goes with this process
                story = "\n".join(chain.history)
                raise AssertionError(f"chain {number} of seed {seed}, {plan.name!r}:\n{story}\n{error}") from error
            counts += chain.counts
            number += 1
        return {"counts": counts, "disk": "a file system of 2 MB" if place.is_small else "a limit of file sizes"}

    ended = in_child(work, answer, seconds=len(KINDS) * kills * SECONDS)  # each attempt has its own limit
    assert ended["code"] == 0, ended["text"]
    return Counter(ended["result"]["counts"]), ended["result"]["disk"]
