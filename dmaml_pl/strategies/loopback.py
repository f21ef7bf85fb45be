"""Workers of one machine meet at its loopback interface, which no other machine reaches.

PyTorch's key-value store has no password, and listens on every interface unless it is given a socket.
"""

import os
import socket
import sys
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # PyTorch does not say that it exports it

from dmaml_pl.errors import ConfigError

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


def listening(port: int) -> socket.socket:
    """A socket that listens at a port of this machine alone.

    Raises:
        ConfigError: the port cannot be had.
    """
    try:
        return socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise ConfigError(
            f"MASTER_PORT is {port}, which cannot be used here ({os.strerror(error.errno or 0)}): set it to "
            "another, or unset it, and a free one is found."
        ) from error


def own_store(address: str, port: int, rank: int, timeout: timedelta) -> TCPStore:
    """The key-value store of a training whose launcher has none; worker 0 keeps it.

    Args:
        address: of the machine where worker 0 is.
        port: where it listens.
        rank: of this worker.
        timeout: that a worker waits for it.

    Raises:
        ConfigError: the port cannot be had.
    """
    here = listening(port).detach() if address == LOOPBACK and rank == 0 else None  # the store closes it
    return TCPStore(address, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False, master_listen_fd=here)
