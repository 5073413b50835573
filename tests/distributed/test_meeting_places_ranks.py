"""Two runs of ranks at the same time do not meet, whatever the order in which their ranks come."""

import os
import socket
from pathlib import Path

import pytest

from tests.support import fork_server
from tests.support.meeting_place import MeetingPlace


def test_a_port_is_held_from_the_moment_it_is_chosen():
    first = MeetingPlace()
    with pytest.raises(OSError, match="Address already in use"):
        socket.create_server(("127.0.0.1", first.port))
    with first, MeetingPlace() as second:
        assert first.port != second.port
        with pytest.raises(OSError, match="Address already in use"):
            socket.create_server(("127.0.0.1", first.port))
    # and let go in the end
    socket.create_server(("127.0.0.1", first.port)).close()


def names_of_all(output):
    """Write what the ranks of this one's group are called."""
    import torch

    torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]))
    names = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, os.environ["NAME"])
    torch.distributed.destroy_process_group()
    Path(output).write_text(" ".join(names))


def test_two_runs_at_the_same_time_do_not_meet(tmp_path):
    with MeetingPlace() as first, MeetingPlace() as second:
        ranks = [(run, rank, place) for rank in (1, 0) for run, place in (("a", first), ("b", second))]
        processes = [
            [
                [str(tmp_path / f"{run}{rank}")],
                {**os.environ, **place.environment, "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "NAME": f"{run}{rank}"},
                str(tmp_path / f"{run}{rank}.output"),
                str(tmp_path / f"{run}{rank}.output"),
            ]
            for run, rank, place in ranks
        ]
        assert fork_server.run(names_of_all, processes, 60) == [0] * 4
    for run, rank, _ in ranks:
        assert (tmp_path / f"{run}{rank}").read_text() == f"{run}0 {run}1"
