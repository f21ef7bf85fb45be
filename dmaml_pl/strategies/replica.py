"""What torchft is given: a process group on gloo, no transport of its own, and this machine's address.

torchft is an extra, and is imported where workers come and go only.
"""

import os
import socket
import sys
from datetime import timedelta
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

import torch
from torch.distributed import ProcessGroup, ProcessGroupGloo

from dmaml_pl.errors import ConfigError

FORM_SECONDS = 5.0
"""A group is formed within so many seconds, or anew without those who did not come."""


def check_installed() -> None:
    """Check that torchft is there.

    Raises:
        ConfigError: it is not.
    """
    os.environ.setdefault("RUST_LOG", "error")  # torchft reads it when it is imported
    if find_spec("torchft") is None:
        raise ConfigError(
            "trainer.strategy.elastic is true, for which torchft is missing here: pip install 'dmaml_pl[elastic]'"
        )


def import_manager() -> Any:
    """Torchft's Manager, without triton, for which torchft has a use with GPUs only, and which it would load."""
    check_installed()
    missing = "triton" not in sys.modules
    if missing:
        sys.modules["triton"] = None  # type: ignore[assignment]  # Python's own way to say so
    try:
        from torchft import Manager  # noqa: PLC0415 - an extra
    finally:
        if missing:
            del sys.modules["triton"]
    return Manager


def member_name(local_rank: int) -> str:
    """By which those who came together are ordered: by machine, where NODE_RANK tells it, and by worker there."""
    return f"{int(os.environ.get('NODE_RANK', '0')):04d}{local_rank:04d}"


def address_towards(lighthouse: str) -> str:
    """The address by which others reach this machine, where they reach the lighthouse."""
    try:
        url = urlsplit(lighthouse)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((url.hostname or "", url.port or 0))  # sends nothing
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise ConfigError("TORCHFT_LIGHTHOUSE must be the address of a lighthouse: http://host:port.") from error


def answers(lighthouse: str) -> bool:
    """Whether anybody listens at the lighthouse's address."""
    url = urlsplit(lighthouse)
    try:
        socket.create_connection((url.hostname or "", url.port or 0), timeout=1).close()
    except OSError:
        return False
    return True


def new_group(here: str, timeout: timedelta) -> Any:
    """A group on gloo, at an address of this machine; torchft's own has any, and PyTorch warns of how it is formed."""
    from torchft import process_group  # noqa: PLC0415 - an extra

    class Gloo(process_group.ProcessGroupGloo):  # type: ignore[misc]  # it may not be installed
        def rank(self) -> int:
            return int(self.parent.rank())

        def configure(self, store_addr: str, *args: Any, **kwargs: Any) -> None:
            # PyTorch's client goes on trying for its whole timeout where the one who keeps the store has just died.
            host, _, port = store_addr.partition("/")[0].rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), FORM_SECONDS).close()
            super().configure(store_addr, *args, **kwargs)

        def _create_pg(self, store: Any, rank: int, world_size: int) -> Any:
            group = ProcessGroup(store, rank, world_size)
            group._set_default_backend(ProcessGroup.BackendType.GLOO)  # noqa: SLF001 - as torchft does
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001 - the way to name a device
            options._timeout = timedelta(seconds=FORM_SECONDS)  # noqa: SLF001 - the same
            options._devices = [ProcessGroupGloo.create_device(hostname=here)]  # noqa: SLF001 - the same
            backend = ProcessGroupGloo(store, rank, world_size, options)
            backend._set_default_timeout(self._timeout)  # noqa: SLF001 - of the calls
            group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, backend)  # noqa: SLF001
            return group

    return Gloo(timeout=timeout)


def no_transport() -> Any:
    """What torchft would heal a worker by, which is done here otherwise; its own opens a port to all networks."""
    from torchft.checkpointing import CheckpointTransport  # noqa: PLC0415 - an extra

    class Nothing(CheckpointTransport[Any]):  # type: ignore[misc]  # the same
        def metadata(self) -> str:
            return ""

        def send_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...

        def recv_checkpoint(self, *args: Any, **kwargs: Any) -> Any: ...

    return Nothing()
