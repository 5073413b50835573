"""Processes that begin with torch and Lightning imported: forked from one that has done nothing else.

A fresh interpreter takes seconds to import them, and the ranks of a test are many. Each worker process of the test run
has one server; what it forks has no test's state, no thread and no coverage.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from importlib import import_module
from pathlib import Path

from tests.support.snippets import ROOT, python_path

_FAILED = 1
# How long the other ranks may go on once one has failed: they wait for it in vain.
_GRACE = 5.0
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_APPEND


class _Server:
    """The process that forks, begun when a test first asks for it."""

    def __init__(self):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
        environment |= {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        atexit.register(self._end)

    def ask(self, request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def _end(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


_servers: dict[int, _Server] = {}


def run(function, processes, timeout):
    """Run an importable function in several processes at once.

    Args:
        function: A function of a module.
        processes: For each process its arguments, its environment, and the files that take what it prints and what it
            says of errors.
        timeout: Seconds until those that are still running are killed.

    Returns:
        The exit code of each; that of a killed one is negative.
    """
    # a forked process needs a server of its own
    if os.getpid() not in _servers:
        _servers[os.getpid()] = _Server()
    request = {"module": function.__module__, "name": function.__name__, "processes": processes, "timeout": timeout}
    return _servers[os.getpid()].ask(request)


def program(path, *arguments, folder, timeout, warn=True, environment=()):
    """Run a program as ``python path arguments`` does in ``folder``; return what ``subprocess.run`` returns.

    ``environment`` is added to that of this process.
    """
    with tempfile.TemporaryDirectory() as place:
        output, errors = Path(place, "output"), Path(place, "errors")
        given = [str(path), [str(argument) for argument in arguments], str(folder), warn]
        (code,) = run(_as_program, [[given, {**os.environ, **dict(environment)}, str(output), str(errors)]], timeout)
        return subprocess.CompletedProcess([path, *arguments], code, output.read_text(), errors.read_text())


def pytest_in(folder, *arguments, path, timeout):
    """Run ``python -m pytest arguments`` in ``folder``, with ``path`` as PYTHONPATH; return as :func:`program` does."""
    with tempfile.TemporaryDirectory() as place:
        output, errors = Path(place, "output"), Path(place, "errors")
        given = [str(folder), [str(argument) for argument in arguments]]
        environment = {**os.environ, "PYTHONPATH": path}
        (code,) = run(_as_pytest, [[given, environment, str(output), str(errors)]], timeout)
        return subprocess.CompletedProcess(["pytest", *arguments], code, output.read_text(), errors.read_text())


def _as_pytest(folder, arguments):
    os.chdir(folder)
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    # the folder may hold another copy of them
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.exit(int(import_module("pytest").main(arguments)))


def _as_program(path, arguments, folder, warn):
    if not warn:
        warnings.simplefilter("ignore")
    os.chdir(folder)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _fork(function, arguments, environment, output, errors):
    child = os.fork()
    if child:
        return child
    code = _FAILED
    try:
        for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, _WRITE), (2, errors, _WRITE)):
            os.dup2(os.open(path, flags, 0o600), number)
        os.environ.clear()
        os.environ.update(environment)
        getattr(import_module(function[0]), function[1])(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:  # noqa: BLE001  # nothing may leave a forked process but its exit code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # a thread of gloo that still holds a tensor when the interpreter ends would abort the process
        os._exit(code)
    return None


def _wait(children, timeout):
    codes, deadline = {}, time.monotonic() + timeout
    while len(codes) < len(children) and time.monotonic() < deadline:
        for child in children:
            if child not in codes and (status := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(status[1])
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.005)
    for child in children:
        if child not in codes:
            os.kill(child, signal.SIGKILL)
            codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [codes[child] for child in children]


def _serve():
    for name in ("lightning.pytorch", "pytorch_lightning", "torchmetrics"):
        import_module(name)
    import_module("torch").set_num_threads(1)
    answers = os.dup(1)
    os.set_inheritable(answers, False)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        children = [_fork((request["module"], request["name"]), *each) for each in request["processes"]]
        codes = _wait(children, request["timeout"])
        os.write(answers, (json.dumps(codes) + "\n").encode())


if __name__ == "__main__":
    _serve()
