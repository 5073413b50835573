"""Where the ranks of a run find each other: at a port that the system gives, and that is held until they are done."""

from __future__ import annotations

import os
import socket

from torch.distributed import TCPStore


class MeetingPlace:
    """A store of torch.distributed's in this process, as torchrun has one; no other run can be given its port.

    A port that is looked up, and let go until a rank takes it, may be taken by another test run in between.

    Attributes:
        environment: What a rank, or a program that starts ranks, must have in its environment to come here.
    """

    def __init__(self) -> None:
        # ranks that come before the store is there wait in its queue
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._socket.getsockname()[1]
        self.environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            # every rank is a client, the first one too
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def __enter__(self) -> MeetingPlace:
        """Answer from now on. Fork before: it takes a thread."""
        listening = os.dup(self._socket.fileno())
        # with libuv, torch 2.6 cannot take a socket that is there
        self._store = TCPStore(
            "127.0.0.1",
            self.port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listening,
            use_libuv=False,
        )
        return self

    def __exit__(self, *_: object) -> None:
        del self._store
        self._socket.close()
