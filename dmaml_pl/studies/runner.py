"""Makes the trainings of a study, each in a process of its own, and tells how each has ended. Light: no PyTorch."""

import importlib
import os
import runpy
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

from dmaml_pl.cli.configs import make_own_importable
from dmaml_pl.console.meter import PLAIN_SECONDS
from dmaml_pl.launching.server import ROLES, Forked, Server, started

GRACE_S = 20.0
"""Seconds that a training has to end after SIGTERM."""

SHOWN_LINES = 8

LOOK_S = 1.0
"""Seconds between two looks at what the trainings under way say."""


@dataclass(frozen=True)
class Job:
    """A command line of `dmaml fit`.

    Attributes:
        key: by which whoever asks for it knows it again.
        words: the command line, from `fit` on.
        log: file for all that its processes say.
        resolved: if given, the training is only checked, and its resolved configuration written to this file.
    """

    key: Any
    words: tuple[str, ...]
    log: Path
    resolved: Path | None = None


@dataclass(frozen=True)
class Ended:
    """A job that has ended, and its exit code."""

    job: Job
    code: int
    seconds: float

    def last_words(self) -> str:
        """The end of the log."""
        return "\n".join(self._said()[-SHOWN_LINES:])

    def error(self) -> str:
        """The message of a user's mistake, if it was one, else the end of the log."""
        told = [line.removeprefix("dmaml: error: ") for line in self._said() if line.startswith("dmaml: error: ")]
        return told[-1] if told else self.last_words()

    def _said(self) -> list[str]:
        return self.job.log.read_text(encoding="utf-8", errors="replace").splitlines()


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
    return started(load)


def make(jobs: Iterable[Job], at_once: int, on_wait: Callable[[list[Job]], object] = lambda _: None) -> Iterator[Ended]:
    """Make jobs in their order; yields each when it has ended. Leaving the iterator ends what still runs.

    Args:
        jobs: what to make.
        at_once: jobs at the same time; wall times are only comparable if it is 1.
        on_wait: is told every second which jobs are under way.
    """
    # Whoever has started the study has not started its trainings; the meter's last line is what the study shows.
    environment = {name: value for name, value in os.environ.items() if name not in ROLES}
    environment = {"OMP_NUM_THREADS": "1", PLAIN_SECONDS: "5", **environment}
    waiting, running = deque(jobs), dict[Forked, tuple[Job, float, int]]()
    shares = gpu_shares(at_once, environment)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.popleft()
                job.log.parent.mkdir(parents=True, exist_ok=True)
                job.log.write_bytes(b"")
                place = next(each for each in range(at_once) if each not in {used for _, _, used in running.values()})
                own = environment | ({"CUDA_VISIBLE_DEVICES": shares[place]} if shares else {})
                running[server().fork(own, partial(_run, job))] = job, time.monotonic(), place
            connection.wait([process.sentinel for process in running], LOOK_S)
            on_wait([job for job, _, _ in running.values()])
            for process in [process for process in running if process.poll() is not None]:
                job, began, _ = running.pop(process)
                yield Ended(job, process.wait() or 0, time.monotonic() - began)
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)  # which a training answers within a meta-iteration
        deadline = time.monotonic() + GRACE_S
        for process in running:
            process.wait(max(deadline - time.monotonic(), 0.0))
            process.kill()
            process.wait()


def gpu_shares(at_once: int, environment: Mapping[str, str]) -> list[str]:
    """The GPUs of each of so many trainings at the same time, as CUDA_VISIBLE_DEVICES; empty where that is one's own.

    All see all, but each another one first: a training takes as many as it has workers, and all would take the first.
    """
    named = environment.get("CUDA_VISIBLE_DEVICES")
    found = [file.name.removeprefix("nvidia") for file in Path("/dev").glob("nvidia[0-9]*")]
    gpus = sorted(found, key=int) if named is None else [each for each in named.split(",") if each not in ("", "-1")]
    if at_once == 1 or not gpus:
        return []
    each = max(len(gpus) // at_once, 1)
    firsts = [place * each % len(gpus) for place in range(at_once)]
    return [",".join([*gpus[first:], *gpus[:first]]) for first in firsts]


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
