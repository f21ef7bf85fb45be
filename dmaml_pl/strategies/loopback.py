"""Workers of one machine meet at its loopback interface, which no other machine reaches.

PyTorch's key-value store has no password, and listens on every interface unless it is given a socket.
"""

import socket
import sys
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # PyTorch does not say that it exports it

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


def own_store(address: str, port: int, rank: int, timeout: timedelta) -> TCPStore:
    """The key-value store of a training whose launcher has none; worker 0 keeps it.

    Args:
        address: of the machine where worker 0 is.
        port: where it listens.
        rank: of this worker.
        timeout: that a worker waits for it.
    """
    # The store closes the socket.
    here = socket.create_server((LOOPBACK, port)).detach() if address == LOOPBACK and rank == 0 else None
    return TCPStore(address, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False, master_listen_fd=here)
