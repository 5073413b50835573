"""Real processes: one function on every rank of a gloo group on this machine."""

import itertools
import json
import os
import socket
import subprocess
import sys

from tests.support.snippets import ROOT, python_path

_MARK = "RESULT "
_PORTS = (number % 1000 for number in itertools.count(os.getpid()))


def _free_port():
    """Return a port that nobody uses, below those that the system gives to whoever connects.

    The worker processes of one test run look in different places, so that none finds what another is about to take.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in itertools.islice(_PORTS, 1000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", place := 20000 + 1000 * (worker % 8) + port)):
                return place
    raise RuntimeError("a thousand ports are taken")


def run_ranks(function, *arguments, world_size=2, timeout=180):
    """Run ``function(*arguments)`` on every rank and return their results; arguments and results are JSON.

    The function must be importable by name. Lightning sees ranks that somebody else has started.
    """
    port = _free_port()
    code = (
        "import json, os, sys, warnings; warnings.simplefilter('ignore'); import torch; torch.set_num_threads(1); "
        f"from {function.__module__} import {function.__name__} as function; "
        f"print({_MARK!r} + json.dumps(function(*json.loads(sys.argv[1]))), flush=True); "
        # a thread of gloo that still holds a tensor when the interpreter ends would abort the process
        "os._exit(0)"
    )
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size), "NODE_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(arguments)],
            cwd=ROOT,
            env={**os.environ, **common, "LOCAL_RANK": str(rank), "PYTHONPATH": python_path()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, errors[-3000:]
    lines = [[line for line in out.splitlines() if line.startswith(_MARK)] for out, _ in outputs]
    return [json.loads(found[-1].removeprefix(_MARK)) for found in lines]
