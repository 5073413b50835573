"""Several processes of one run on this machine: forked, with a time limit, over gloo on the loopback."""

import os
import signal
import time
import traceback
import warnings

from tests.support.meeting_place import MeetingPlace


def run_ranks(function, ranks=2, seconds=90):
    """Call ``function(rank)`` in ``ranks`` processes; fail if one fails or all are not done in time."""
    place = MeetingPlace()
    children = [_start(function, rank, ranks, place) for rank in range(ranks)]
    with place:
        codes = _wait(children, seconds)
    assert list(codes.values()) == [0] * ranks, f"exit codes of the ranks: {codes}"


def _wait(children, seconds):
    deadline = time.monotonic() + seconds
    codes = {}
    while len(codes) < len(children) and time.monotonic() < deadline:
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):
            break
        time.sleep(0.02)
    for child in children:
        if child not in codes:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return codes


def _start(function, rank, ranks, place):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(place.environment, LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(ranks))
        warnings.simplefilter("ignore")  # what Lightning says about samplers and workers is another test's business
        function(rank)
        code = 0
    except BaseException:  # noqa: BLE001  # nothing may leave a forked child but its exit code
        traceback.print_exc()
    finally:
        os._exit(code)
