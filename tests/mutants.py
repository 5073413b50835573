"""Change the package one place at a time and see whether a test notices: ``make mutants``.

A mutant is the package with one small fault: a comparison turned around, an operand dropped, two arguments swapped, a
number off by one, a statement removed. Each runs against the tests that execute its line, which a measured run of
the suite tells; those of its own folder come first, and the quick ones before the slow ones. The share that some test
kills says what the suite sees. Every survivor is a test that is missing, or a change that changes nothing:
``equivalent_mutants.py`` names those.

    python -m tests.mutants --number 400 --seed 1

Each mutant has a process of its own, forked from this one, which has imported torch and Lightning and nothing of the
package.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.equivalent_mutants import EQUIVALENT
from tests.support.faults import Mutant, differs, mutants_of

ROOT = Path(__file__).parents[1]
# what the tests import, and what costs seconds
HEAVY = (
    "lightning.pytorch",
    "pytorch_lightning",
    "torchmetrics",
    "sklearn.metrics",
    "torch.utils.tensorboard",
    "hypothesis",
)
PACKAGE = "lightning_plugins"


class Suite:
    """The tests that execute a line, from the data of a run with ``--cov-context=test``, and how long each takes."""

    def __init__(self, contexts: Path, durations: Path):
        from coverage import CoverageData

        self._data = CoverageData(str(contexts))
        self._data.read()
        self._files = {PACKAGE + "/" + file.rpartition(f"/{PACKAGE}/")[2]: file for file in self._data.measured_files()}
        self._seconds: dict[str, float] = {}
        for case in ElementTree.parse(durations).iter("testcase"):
            self._seconds[f"{case.get('classname')}.{case.get('name')}"] = float(case.get("time", 0))

    def seconds(self, test: str) -> float:
        """Return how long a test took; a name in the file of durations is the address of the test with dots."""
        address, bracket, parameters = test.partition("[")
        file, *names = address.split("::")
        module = file.removesuffix(".py").replace("/", ".")
        return self._seconds.get(".".join([module, *names]) + bracket + parameters, 1.0)

    def of(self, mutant: Mutant) -> list[str]:
        """Return the tests of a mutant in the order in which they are to be tried."""
        lines = self._data.contexts_by_lineno(self._files[mutant.path]) if mutant.path in self._files else {}
        for first, last in [*mutant.spans, (0, 10**6)]:
            contexts = {name for line in lines if first <= line <= last for name in lines[line]}
            names = {name.rpartition("|")[0] for name in contexts if "::" in name}
            if names:
                return self._ordered(names, mutant.path)
        return []

    def _ordered(self, names: Iterable[str], path: str) -> list[str]:
        own = (f"tests/{path.split('/')[1].removesuffix('.py')}/", path)
        # of a test with many parameters the first ones come before those of the next test
        count: Counter[str] = Counter()
        order = {}
        for name in sorted(names, key=self.seconds):
            function = name.partition("[")[0]
            count[function] += 1
            seconds = self.seconds(name)
            order[name] = (seconds > 3, not name.startswith(own), count[function], seconds)
        return sorted(order, key=order.__getitem__)

    def within(self, names: list[str], budget: float) -> list[str]:
        """Return the first tests that take ``budget`` seconds together, at least one."""
        chosen = []
        for name in names:
            budget -= self.seconds(name)
            if budget < 0 and chosen:
                break
            chosen.append(name)
        return chosen


class _First:
    """The first test that fails."""

    def __init__(self, file: Path):
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self._file.exists():
            self._file.write_text(report.nodeid)


class Trial:
    """A copy of the tree in which one file after the other is changed."""

    def __init__(self, folder: Path, seconds: int):
        self.folder = folder
        self._tree = folder / "tree"
        self._seconds = seconds
        self._number = 0
        # tests that have killed a mutant: do they pass without one?
        self._sound: set[str] = set()
        self._failing: set[str] = set()
        subprocess.run(["git", "clone", "-q", "-s", ROOT, self._tree], check=True)
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
        for name in listed.decode().split("\0")[:-1]:
            (self._tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self._tree / name)

    def end(self, tests: list[str], mutant: Mutant | None = None) -> tuple[str, str]:
        """Return how the tests end, ``killed``, ``survived`` or ``time``, and the test that failed."""
        if mutant is None:
            return self._run(tests)
        file = self._tree / mutant.path
        source = file.read_bytes()
        try:
            self._write(file, mutant.of(source))
            return self._run(tests)
        finally:
            self._write(file, source)

    def kills(self, mutant: Mutant, tests: list[str]) -> tuple[str, str]:
        """Return what :meth:`end` does, without the tests that fail as they are."""
        while True:
            end, why = self.end([test for test in tests if test not in self._failing], mutant)
            if end != "killed" or why not in tests or why in self._sound:
                return end, why
            (self._sound if self.end([why])[0] == "survived" else self._failing).add(why)

    def _write(self, file: Path, source: bytes) -> None:
        """Write a file with a time of its own: the compiled file beside it holds for one time and one size."""
        self._number += 1
        file.write_bytes(source)
        os.utime(file, (self._number, self._number))

    def _run(self, tests: list[str]) -> tuple[str, str]:
        failed = self.folder / "failed"
        failed.unlink(missing_ok=True)
        (self.folder / "tests").write_text("\n".join(tests))
        child = os.fork()
        if not child:
            code = 1
            try:
                code = self._in_child(failed)
            finally:
                os._exit(code)
        # a mutant may also wait for ever; a busy machine is no fault of its
        deadline = time.monotonic() + 10 * self._seconds
        status = (0, 0)
        while not status[0]:
            time.sleep(0.02)
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
            status = os.waitpid(child, os.WNOHANG)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(status[1])
        if code in {-signal.SIGXCPU, -signal.SIGKILL}:
            return "time", ""
        return ("survived" if code == 0 else "killed"), failed.read_text() if failed.exists() else f"exit code {code}"

    def _in_child(self, failed: Path) -> int:
        os.setpgid(0, 0)
        output = os.open(self.folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (self._seconds, self._seconds + 5))
        os.chdir(self._tree)
        own = [str(self._tree), str(self._tree / "examples")]
        sys.path[:] = [*own, *(path for path in sys.path if path not in {"", str(ROOT)})]
        os.environ |= {"PYTHONPATH": os.pathsep.join(own), "CI": "1"}
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        options = [
            "-x",
            "-q",
            "--no-header",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            f"--basetemp={self.folder / 'temp'}",
        ]
        # pytest would have rewritten the assertions of what is imported already
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning", f"@{self.folder / 'tests'}"]
        return int(pytest.main(options, plugins=[_First(failed)]))


def draw(number: int, seed: int, only: str) -> list[tuple[Mutant, tuple[str, str, str]]]:
    """Return mutants of the package, each another program than the package is, with their keys."""
    sources = {str(path.relative_to(ROOT)): path.read_bytes() for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
    places = [mutant for path in sources if only in path for mutant in mutants_of(path, sources[path])]
    random.Random(seed).shuffle(places)
    drawn = islice((mutant for mutant in places if differs(mutant, sources[mutant.path])), number)
    return [(mutant, mutant.key(sources[mutant.path])) for mutant in drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description="Change the package one place at a time and see whether a test fails.")
    parser.add_argument("--number", type=int, default=400, help="how many mutants")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6)
    parser.add_argument("--contexts", type=Path, default=ROOT / ".coverage", help="data of --cov-context=test")
    parser.add_argument("--durations", type=Path, default=ROOT / ".durations.xml", help="what --junitxml wrote")
    parser.add_argument("--only", default="", help="modules whose path has this text")
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests to try on each")
    parser.add_argument("--numbers", type=int, nargs="+", help="only these of the draw")
    parser.add_argument("--tests", nargs="+", default=[], help="tests to try on each instead of those of its line")
    arguments = parser.parse_args()

    suite = Suite(arguments.contexts, arguments.durations)
    for name in HEAVY:
        import_module(name)
    gc.freeze()
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder), int(2 * arguments.budget + 60))
        for number, (mutant, key) in enumerate(draw(arguments.number, arguments.seed, arguments.only), 1):
            if arguments.numbers and number not in arguments.numbers:
                continue
            begin = time.monotonic()
            tests = arguments.tests or suite.of(mutant)
            tried = arguments.tests or suite.within(tests, arguments.budget)
            end, why = trial.kills(mutant, tried) if tests else ("survived", "no test executes it")
            if end == "survived" and key in EQUIVALENT:
                end, why = "equivalent", EQUIVALENT[key]
            ends[end] += 1
            spent = f"{time.monotonic() - begin:.1f} s, {len(tried)} of {len(tests)} tests"
            print(
                f"{number} {end}  {mutant.path}:{mutant.spans[0][0]}  {mutant.kind}: {key[2]}  ({spent}) {why}",
                flush=True,
            )
    print(f"seed {arguments.seed}: {dict(ends)}")


if __name__ == "__main__":
    main()
