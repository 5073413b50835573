"""Real processes: one function on every rank of a gloo group on this machine."""

import json
import os
import socket
import subprocess
import sys

from tests.support.snippets import ROOT

_MARK = "RESULT "


def run_ranks(function, *arguments, world_size=2, timeout=180):
    """Run ``function(*arguments)`` on every rank and return their results; arguments and results are JSON.

    The function must be importable by name. Lightning sees ranks that somebody else has started.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = (
        "import json, sys, warnings; warnings.simplefilter('ignore'); import torch; torch.set_num_threads(1); "
        f"from {function.__module__} import {function.__name__} as function; "
        f"print({_MARK!r} + json.dumps(function(*json.loads(sys.argv[1]))), flush=True)"
    )
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size), "NODE_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(arguments)],
            cwd=ROOT,
            env={**os.environ, **common, "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
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
