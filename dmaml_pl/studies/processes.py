"""One process of a training: what it does between being forked and its exit code. Light, as the study imports it too.

The processes of a training see the environment that torchrun gives, so that Lightning starts none itself.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from multiprocessing import connection, parent_process
from pathlib import Path

from dmaml_pl.console.meter import PLAIN_SECONDS

ORPHAN_PATIENCE_S = 20.0
"""Seconds that a worker whose study was killed has to end in good order."""


def environment(rank: int, workers: int, port: int) -> dict[str, str]:
    """This process's environment with torchrun's variables for one worker, and one thread a worker by default."""
    return {
        "OMP_NUM_THREADS": "1",
        PLAIN_SECONDS: "5",  # its last line is what the study shows
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "dmaml-study",
    }


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def train(words: list[str], surroundings: dict[str, str], log: Path) -> None:
    """Be one worker of a training: `dmaml fit ...`, with all that it says in a log file."""
    _settle(surroundings, log)
    from dmaml_pl.cli.run import run  # noqa: PLC0415 - loaded in the process that this one is forked from

    sys.exit(run(words))


def check(words: list[str], surroundings: dict[str, str], log: Path, resolved: Path) -> None:
    """Check a training as its worker 0 would; what is wrong stands in the log, else the configuration in `resolved`."""
    _settle(surroundings, log)
    from dmaml_pl.studies import checks  # noqa: PLC0415 - loaded in the process that this one is forked from

    sys.exit(checks.check(words, resolved))


def _settle(surroundings: dict[str, str], log: Path) -> None:
    os.environ.clear()
    os.environ.update(surroundings)
    if os.getcwd() not in sys.path and "" not in sys.path:  # noqa: PTH109 - sys.path holds strings
        sys.path.insert(0, os.getcwd())  # noqa: PTH109 - a user's own classes, as the front door finds them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the study, which ends its trainings by SIGTERM
    with log.open("ab") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_the_study, daemon=True, name="study-watch").start()


def _end_with_the_study() -> None:
    """A study that was killed cannot end its trainings, and one that goes on would make them twice."""
    study = parent_process()
    if study is None:
        return
    connection.wait([study.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(ORPHAN_PATIENCE_S)
    os.kill(os.getpid(), signal.SIGKILL)
