"""What a key-value store tells workers of each other: that all have come, and what attempts before this one have left.

`torchrun --max-restarts N` starts every worker again when one has died. The key-value store of its agent outlives the
workers, so there a training leaves which MLflow run it belongs to and where its last checkpoint is: a restart goes on
with this very training, whatever other trainings of the experiment there are, and needs no file that says so. Where
workers come and go, `supervisor.py` keeps such a store for those of its machine.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed import FileStore, PrefixStore, TCPStore  # type: ignore[attr-defined]

from dmaml_pl.errors import CheckpointError, ConfigError, WorkerLostError
from dmaml_pl.launching.variables import MEMORY, WAY_OUT

POLL_SECONDS = 0.02
CONNECT = timedelta(seconds=60)
START_SECONDS = 120.0
"""So long workers wait for each other at the start at least, however soon they are to notice a lost one later."""

BEGUN, LAST, REFUSED = "begun", "last", "refused"
"""Names in the agent's store: the id of the MLflow run, as JSON; the last checkpoint; whether the user was told of a
mistake, which a restart does not mend."""


class Origin(NamedTuple):
    """What a command starts from.

    Attributes:
        checkpoint: the file; None: from the beginning.
        mlflow_run_id: the MLflow run that it belongs to, if one is known.
        in_mind: for each logger, what it was given and may not have sent.
    """

    checkpoint: Path | None
    mlflow_run_id: str | None
    in_mind: Sequence[Any] = ()


def agent_store() -> Any:
    """The store of torchrun's agent, or of ours; None where there is no agent that outlives this process.

    Raises:
        ConfigError: nobody answers where torchrun's is said to be.
    """
    if MEMORY in os.environ:
        return PrefixStore("dmaml", FileStore(os.environ[MEMORY], -1))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not torch.distributed.is_available():
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection((address, port), timeout=CONNECT.total_seconds()).close()
    except OSError as error:
        raise ConfigError(
            f"TORCHELASTIC_USE_AGENT_STORE is True, but torchrun's agent does not answer at {address}:{port}, as "
            f"MASTER_ADDR and MASTER_PORT say ({error.strerror or error}). {WAY_OUT}"
        ) from error
    return PrefixStore("dmaml", TCPStore(address, port, is_master=False, timeout=CONNECT, wait_for_workers=False))


def remember(name: str, value: str = "") -> None:
    """Tell later attempts something, by one of the names above."""
    store = agent_store()
    if store is not None:
        store.set(name, value)


def was_refused() -> bool:
    """Whether the user has been told of a mistake, by an attempt before this one or another worker of it."""
    store = agent_store()
    return store is not None and bool(store.check([REFUSED]))


def current() -> Origin | None:
    """The training that torchrun, or our own agent, is restarting; None at its first start, or without such.

    Raises:
        CheckpointError: its checkpoint cannot be seen from this machine.
    """
    store = agent_store()
    if store is None or not store.check([BEGUN]):
        return None
    run_id = json.loads(store.get(BEGUN))
    if not store.check([LAST]):
        return Origin(None, run_id)
    path = Path(store.get(LAST).decode())
    if not path.is_file():
        raise CheckpointError(
            f"This training is started again, but its last checkpoint {path} is not on this machine: set "
            "checkpoint.dirpath (or trainer.logger.init_args.save_dir) to a folder on a disk that all machines share."
        )
    return Origin(path, run_id)


def meet(store: Any, *, rank: int, workers: int, timeout: float, check: Callable[[], None]) -> Any:
    """Wait until all workers have come; returns a corner of the store for them, apart from what attempts before left.

    PyTorch's process group finds the addresses of workers that are dead where an earlier attempt used the same store.
    torchrun's count of restarts cannot tell attempts apart, as the agents of several machines count differently, and
    machines that join do not count. So each worker asks worker 0 under a name that was never used before.

    Args:
        store: the agent's, or one for this training alone.
        rank: of this worker.
        workers: how many there are.
        timeout: seconds to wait for the others.
        check: raises an error if this process is to stop.

    Raises:
        WorkerLostError: another worker did not come.
    """
    me = uuid.uuid4().hex
    deadline = time.monotonic() + timeout
    if rank:
        store.set(f"hello/{rank}", me)
    while True:
        if rank == 0:
            others = range(1, workers)
            for hello in (f"hello/{other}" for other in others):
                if store.check([hello]):
                    store.set(f"answer/{store.get(hello).decode()}", me)
            if all(store.check([f"{me}/{other}"]) for other in others):
                return PrefixStore(me, store)
        elif store.check([f"answer/{me}"]):
            attempt = store.get(f"answer/{me}").decode()
            store.set(f"{attempt}/{rank}", "")
            return PrefixStore(attempt, store)
        check()
        if time.monotonic() > deadline:
            raise WorkerLostError(
                f"worker {rank} has waited {timeout:g} s for the other {workers - 1} worker(s) at the start, and not "
                "all of them have come: look for their own messages, or set trainer.strategy.timeout higher."
            )
        time.sleep(POLL_SECONDS)
