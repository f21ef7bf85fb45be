"""Workers of one machine meet at its loopback interface, which no other machine reaches.

PyTorch's key-value store has no password, and listens on every interface unless it is given a socket.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # PyTorch does not say that it exports it

LOOPBACK = "127.0.0.1"


def local_store(port: int, rank: int, workers: int, seconds: float) -> TCPStore:
    """The key-value store of the workers of this machine; worker 0 keeps it.

    Args:
        port: where it listens.
        rank: of this worker.
        workers: how many there are.
        seconds: that a worker waits for the others.
    """
    timeout = timedelta(seconds=seconds)
    if rank:
        return TCPStore(LOOPBACK, port, workers, is_master=False, timeout=timeout)
    listening = socket.create_server((LOOPBACK, port))
    # The store closes the socket.
    return TCPStore(LOOPBACK, port, workers, is_master=True, timeout=timeout, master_listen_fd=listening.detach())


def loopback_interface() -> str:
    """The name of the loopback interface: `lo` on Linux, `lo0` on macOS."""
    addresses = psutil.net_if_addrs()
    return next(name for name, own in addresses.items() if any(one.address == LOOPBACK for one in own))
