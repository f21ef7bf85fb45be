"""Trainings on this machine: each in a process of its own, with GPUs of its own. Light: no PyTorch."""

import importlib
import os
import runpy
import signal
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from multiprocessing import connection
from pathlib import Path

from dmaml_pl.cli.configs import make_own_importable
from dmaml_pl.console.meter import PLAIN_SECONDS
from dmaml_pl.launching import server as forking
from dmaml_pl.launching.server import ROLES, Forked, Server
from dmaml_pl.studies.runner import LOOK_S, Job, Launcher

VISIBLE = "CUDA_VISIBLE_DEVICES"


def settings_of_trainings() -> dict[str, str]:
    """The variables of every training of a study; the meter's last line is what the study shows."""
    ours = {"OMP_NUM_THREADS": "1", PLAIN_SECONDS: "5"}
    return {name: os.environ.get(name, value) for name, value in ours.items()}


class Local(Launcher):
    """Forks trainings from a server that has their imports behind it."""

    def __init__(self) -> None:
        # Whoever has started the study has not started its trainings.
        self._environment = {name: value for name, value in os.environ.items() if name not in ROLES}
        self._environment |= settings_of_trainings()
        self._gpus = Gpus(self._environment)
        self._held: dict[Forked, tuple[str, ...]] = {}

    def start(self, job: Job) -> Forked:
        """Fork it, with the GPUs that fewest others have."""
        gpus = self._gpus.take(job.workers)
        job.log.write_bytes(b"")
        own = self._environment | ({VISIBLE: ",".join(gpus)} if gpus else {})
        process = server().fork(own, partial(_run, job))
        self._held[process] = gpus
        return process

    def code(self, started: Forked) -> int | None:
        """As of any process."""
        code = started.poll()
        if code is not None:
            self._gpus.give_back(self._held.pop(started, ()))
        return code

    def end(self, started: Forked, *, kill: bool = False) -> None:
        """By a signal."""
        if kill:
            started.kill()
            started.wait()
        else:
            started.send_signal(signal.SIGTERM)

    def wait(self, started: Collection[Forked]) -> None:
        """Until one has ended."""
        connection.wait([process.sentinel for process in started], LOOK_S)


class Gpus:
    """The GPUs of this machine, which are shared out: as many for each training as it has workers.

    They are those that the fewest others have: none has two trainings while another has none.

    Args:
        environment: in which CUDA_VISIBLE_DEVICES may say which they are; else all.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        named = environment.get(VISIBLE)
        found = [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
        gpus = found if named is None else [each for each in named.split(",") if each not in ("", "-1")]
        self._trainings = dict.fromkeys(gpus, 0)

    def take(self, count: int) -> tuple[str, ...]:
        """So many, or all where there are fewer."""
        taken = tuple(sorted(self._trainings, key=self._trainings.__getitem__)[:count])
        for gpu in taken:
            self._trainings[gpu] += 1
        return taken

    def give_back(self, taken: tuple[str, ...]) -> None:
        """What a training had that has ended."""
        for gpu in taken:
            self._trainings[gpu] -= 1


def load() -> None:
    """Import what every training needs; nothing here may start a thread or touch a device: neither survives a fork."""
    for name in ("dmaml_pl.studies.checks", "mlflow.store.tracking.sqlalchemy_store"):
        importlib.import_module(name)
    reference = importlib.import_module("dmaml_pl._learn2learn")
    if reference.installed():
        reference.load()
    importlib.import_module("dmaml_pl.provenance.environment").packages()  # which each training logs


def server() -> Server:
    """The server that a study, and whoever makes many trainings, has its processes forked from; started once."""
    return forking.started(load)


def _run(job: Job) -> int:
    """Be the training, or its check; returns the exit code."""
    with job.log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if job.resolved is not None:
        make_own_importable([*job.words])
        check: Callable[[list[str], Path], int] = importlib.import_module("dmaml_pl.studies.checks").check
        return check(list(job.words), job.resolved)
    sys.argv = ["dmaml", *job.words]
    runpy.run_module("dmaml_pl", run_name="__main__", alter_sys=True)  # as which it may be started again for workers
    return 0
