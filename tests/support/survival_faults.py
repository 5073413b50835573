"""How a run dies: real signals, real exceptions and a disk that is really full, at moments that a number names.

A moment is counted, not timed, so that a seed says it: the n-th line that Python runs, the n-th time that a file is
opened, renamed or removed, the n-th record that is appended to a file, the n-th batch. Only ``"time"`` is a clock's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning_plugins.core.append_only_file import AppendOnlyFile
from tests.support.survival_run import Net

# kind of death -> the moments at which it can come
KINDS = {
    "SIGKILL": ("call", "file", "append"),
    "SIGTERM": ("call", "file", "append"),
    "SIGINT": ("call", "file", "append"),
    "cut in a write": ("file", "append"),
    "exception in validation": ("validation",),
    "exception in a batch": ("training",),
    "exception in the writer": ("file", "append"),
    "full disk": ("file", "append"),
}
TIMED = ("SIGKILL", "SIGTERM", "SIGINT")  # those that can also come from outside, by the clock
MOMENTS = ("call", "file", "append", "training", "validation")
PAGE = 4096
_TOUCHES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


class InjectedError(Exception):
    """What a test throws: no handler in the package can mean this one."""


@dataclass(frozen=True)
class Fault:
    """One death.

    Args:
        kind: One of :data:`KINDS`.
        moment: What is counted until then, one of :data:`MOMENTS` or ``"time"``.
        share: When, as a share of what an uninterrupted run counts.
        amount: Room that is left on a full disk or in a file, in bytes; lines to go in the call that was reached.
    """

    kind: str
    moment: str
    share: float
    amount: int = 0


def draw(rng: random.Random, kind: str, *, left: float, timed: bool) -> Fault:
    """Draw a moment for a death of ``kind``.

    Args:
        rng: Where chance comes from.
        kind: One of :data:`KINDS`.
        left: The share of the run that is still to come; a moment after its end kills nobody.
        timed: Whether the clock may decide.
    """
    moment = rng.choice(KINDS[kind] + (("time",) if timed and kind in TIMED else ()))
    amount = rng.choice((0, rng.randrange(64), rng.randrange(2000), rng.randrange(30000)))
    return Fault(kind, moment, rng.random() * left, amount)


class Moments:
    """Counts the moments of a run in this process, and does something at one of them.

    Args:
        disk: Only files below it count.
    """

    def __init__(self, disk: Path) -> None:
        self.seen: Counter[str] = Counter()
        self._disk = str(disk)
        self._at: tuple[str, int] = ("", 0)
        self._act: Callable[[], None] = bool
        self._on = True
        self._lines = -1

    def arm(self, fault: Fault, number: int, act: Callable[[], None]) -> None:
        """Call ``act`` at the ``number``-th moment of the fault's sort."""
        self._at, self._act, self._lines_to_go = (fault.moment, number), act, fault.amount % 20

    def listen(self, *moments: str) -> None:
        """Begin to count; a process cannot take its ears off again, only shut them."""
        if {"file", "append"} & set(moments):
            sys.addaudithook(self._hear)
        self._wrap(AppendOnlyFile, "append", "append")
        self._wrap(Net, "training_step", "training")
        self._wrap(Net, "validation_step", "validation")
        if "call" in moments:
            sys.settrace(self._trace)

    def stop(self) -> None:
        """Count no more."""
        self._on = False
        sys.settrace(None)

    def _tick(self, moment: str) -> None:
        if not self._on:
            return
        self.seen[moment] += 1
        if self._at == (moment, self.seen[moment]):
            self._act()

    def _hear(self, event: str, arguments: tuple) -> None:
        touches = event in _TOUCHES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if self._on and touches and str(arguments[0]).startswith(self._disk):
            self._tick("file")

    def _wrap(self, owner: type, name: str, moment: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments, **options):
            self._tick(moment)
            return original(*arguments, **options)

        setattr(owner, name, wrapped)

    def _trace(self, frame, event, argument):
        """Count calls; in the one that is meant, some lines more."""
        if not self._on:
            return None
        if self._lines < 0:
            self.seen["call"] += 1
            if self._at != ("call", self.seen["call"]):
                return None
            self._lines = self._lines_to_go
        self._lines -= 1
        if self._lines < 0:
            self.stop()
            self._act()
        return self._trace


def action(fault: Fault, disk: Path, *, is_small: bool) -> Callable[[], None]:
    """Return what kills the run.

    Args:
        fault: The death.
        disk: The directory that fills up.
        is_small: Whether it is a file system of its own; otherwise the limit of file sizes stands in for a full one.
    """
    if fault.kind in TIMED:
        number = signal.Signals[fault.kind]
        return lambda: os.kill(os.getpid(), number)
    if fault.kind == "cut in a write":  # the kernel writes what fits and kills the process at the next byte
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # before the run: Lightning puts handlers back after a fit
        return lambda: limit_files(fault.amount)
    if fault.kind == "full disk":
        if is_small:
            return lambda: fill(disk / "ballast", fault.amount)
        return lambda: limit_files(fault.amount)
    if fault.kind == "exception in the writer" and fault.moment == "file":
        return lambda: throw(OSError(errno.EIO, "injected"))
    return lambda: throw(InjectedError("injected"))


def throw(error: Exception) -> None:
    raise error


def limit_files(size: int) -> None:
    """Let no file grow beyond ``size``; Python's own way with the signal of it is to ignore it, and to raise."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def unlimit_files() -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def fill(ballast: Path, left: int) -> None:
    """Fill the file system up to some pages."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(PAGE)):
                pass
        except OSError:  # there is no room left
            pass
        file.truncate(max(file.tell() - left // PAGE * PAGE, 0))


def mount_small_disk(where: Path, size: str = "2m") -> bool:
    """Mount a small file system for this process and its children alone, and return whether the machine allows it."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group, new_mounts, new_user = os.getuid(), os.getgid(), 0x00020000, 0x10000000
    try:
        if libc.unshare(new_mounts | new_user):
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        return libc.mount(b"tmpfs", str(where).encode(), b"tmpfs", 0, f"size={size}".encode()) == 0
    except (OSError, AttributeError):
        return False
