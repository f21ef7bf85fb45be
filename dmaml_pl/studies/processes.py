"""The processes of a study's trainings, and what each does between being forked and its exit code.

Light, as the study imports it too. The processes of a training see the environment that torchrun gives, so that
Lightning starts none itself.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dmaml_pl.console.meter import PLAIN_SECONDS
from dmaml_pl.launching.server import Forked, Server, started

LOADED = ("dmaml_pl.cli.run", "dmaml_pl.studies.checks", "mlflow.store.tracking.sqlalchemy_store")


def load() -> None:
    """Import what every training needs; nothing here may start a thread or touch a device: neither survives a fork."""
    for name in LOADED:
        importlib.import_module(name)
    importlib.import_module("dmaml_pl._learn2learn").load()
    importlib.import_module("dmaml_pl.provenance.environment").packages()  # which each training logs


def server() -> Server:
    """The server that a study, and whoever makes many trainings, has its processes forked from; started once."""
    return started(load)


def fork(words: tuple[str, ...], workers: int, log: Path, resolved: Path | None) -> Iterator[Forked]:
    """Start the workers of a training, whose whole output goes to a log file.

    Args:
        words: the command line, from `fit` on.
        workers: how many there are.
        log: the file.
        resolved: if given, the training is only checked, as its worker 0 would, and its resolved configuration
            written to this file.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    call = partial(_run, words, log.absolute(), resolved)
    for rank in range(workers if resolved is None else 1):
        yield server().fork(_environment(rank, workers, port), call)


def _environment(rank: int, workers: int, port: int) -> dict[str, str]:
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


def _run(words: tuple[str, ...], log: Path, resolved: Path | None) -> int:
    """Be one worker of a training; returns the exit code."""
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a user's own classes, as the front door finds them
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from dmaml_pl.cli.run import run  # noqa: PLC0415 - loaded in the process that this one is forked from
    from dmaml_pl.studies.checks import check  # noqa: PLC0415 - the same

    return run(list(words)) if resolved is None else check(list(words), resolved)
