"""Runs a script of the tests in two processes that talk over 127.0.0.1; never hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(module: str, *arguments: str, ranks: int = 2, timeout: float = 180.0) -> list[str]:
    """Run ``python -m module arguments`` once per rank; return what each wrote, or raise if one failed or hung."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "NODE_RANK": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
        processes = [
            subprocess.Popen(  # our own interpreter and module
                [sys.executable, "-X", "faulthandler", "-m", module, *arguments],
                cwd=ROOT,
                env={**os.environ, **shared, "LOCAL_RANK": str(rank), "RANK": str(rank)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for rank, log in enumerate(logs)
        ]
        _wait(processes, timeout)
        outputs = []
        for log in logs:
            log.seek(0)
            outputs.append(log.read())
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        if process.returncode:
            raise RuntimeError(f"rank {rank} of {module} ended with {process.returncode}:\n{output[-6000:]}")
    return outputs


def _wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> None:
    """Wait until all have ended, or one has failed, or the time is over; what then still runs prints where it is."""
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        failed = any(process.returncode for process in processes)
        if failed or time.monotonic() > deadline:
            time.sleep(2 if failed else 0)
            for end in (signal.SIGABRT, signal.SIGKILL):
                for process in processes:
                    if process.poll() is None:
                        os.killpg(process.pid, end)
                time.sleep(1)
        time.sleep(0.05)
