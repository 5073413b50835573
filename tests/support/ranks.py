"""Real processes: one function on every rank of a gloo group on this machine."""

import json
import os
import signal
import tempfile
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import fork_server
from tests.support.meeting_place import MeetingPlace


def run_ranks(function, *arguments, world_size=2, timeout=180):
    """Run ``function(*arguments)`` on every rank and return their results; arguments and results are JSON.

    The function must be importable by name. Lightning sees ranks that another program has started.
    """
    ranks = ended_ranks(function, *arguments, world_size=world_size, timeout=timeout)
    # what the first to fail says is why the others failed, or waited for it and were killed
    for rank in sorted(ranks, key=lambda rank: (rank.code == -signal.SIGKILL, rank.code != 1)):
        assert rank.code == 0, f"exit code {rank.code}:\n{rank.output[-6000:]}"
    return [rank.result for rank in ranks]


class Ended(NamedTuple):
    """How a rank ended."""

    code: int
    output: str
    result: Any


def ended_ranks(function, *arguments, world_size=2, timeout=180):
    """Run ``function(*arguments)`` on every rank, as :func:`run_ranks`; return how each ended."""
    with tempfile.TemporaryDirectory() as folder, MeetingPlace() as place:
        outputs = [Path(folder, f"{rank}.txt") for rank in range(world_size)]
        results = [Path(folder, f"{rank}.json") for rank in range(world_size)]
        common = {
            **os.environ,
            **place.environment,
            "WORLD_SIZE": str(world_size),
            "NODE_RANK": "0",
            # Lightning takes WORLD_SIZE away after a run
            "RANKS_OF_TEST": str(world_size),
        }
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
        return [
            Ended(code, output.read_text(errors="replace"), json.loads(result.read_text()) if result.exists() else None)
            for code, output, result in zip(codes, outputs, results, strict=True)
        ]


def _on_a_rank(module, name, arguments, result):
    warnings.simplefilter("ignore")
    returned = getattr(import_module(module), name)(*arguments)
    Path(result).write_text(json.dumps(returned))
