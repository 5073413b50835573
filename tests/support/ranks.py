"""Real processes: one function on every rank of a gloo group on this machine."""

import itertools
import json
import os
import socket
import tempfile
import warnings
from importlib import import_module
from pathlib import Path

from tests.support import fork_server

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
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(world_size),
        "NODE_RANK": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, f"{rank}.txt") for rank in range(world_size)]
        results = [Path(folder, f"{rank}.json") for rank in range(world_size)]
        processes = [
            [
                [function.__module__, function.__qualname__, arguments, str(result)],
                {**common, "LOCAL_RANK": str(rank)},
                str(output),
                str(output),
            ]
            for rank, (output, result) in enumerate(zip(outputs, results, strict=True))
        ]
        codes = fork_server.run(_on_a_rank, processes, timeout)
        # what the first to fail says is why the others failed
        for code, output in sorted(zip(codes, outputs, strict=True), key=lambda pair: pair[0] != 1):
            assert code == 0, f"exit code {code}:\n{output.read_text(errors='replace')[-6000:]}"
        return [json.loads(result.read_text()) for result in results]


def _on_a_rank(module, name, arguments, result):
    warnings.simplefilter("ignore")
    function = getattr(import_module(module), name)
    Path(result).write_text(json.dumps(function(*arguments)))
