"""Runs trainings as processes that are forked from a server which has PyTorch loaded, so that each starts at once.

Importing PyTorch, Lightning and MLflow takes longer than a short training; the server does it once. It has one thread
and has computed nothing, which is what makes forking it safe.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from dmaml_pl.studies import processes

GRACE_S = 20.0
"""Seconds that the workers of a training have to end after one of them has ended badly, or after SIGTERM."""

SHOWN_LINES = 8

LOOK_S = 1.0
"""Seconds between two looks at what the trainings under way say."""


@dataclass(frozen=True)
class Job:
    """A command line of `dmaml fit` for some workers.

    Attributes:
        key: by which whoever asks for it knows it again.
        words: the command line, from `fit` on.
        workers: processes.
        log: file for what the processes say.
        resolved: if given, the training is only checked, and its resolved configuration written to this file.
    """

    key: Any
    words: tuple[str, ...]
    workers: int
    log: Path
    resolved: Path | None = None


@dataclass(frozen=True)
class Ended:
    """A job that has ended: 0 if all its processes ended well, else the exit code of the first that did not."""

    job: Job
    code: int
    seconds: float

    def last_words(self) -> str:
        """The end of the log."""
        lines = self.job.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-SHOWN_LINES:])

    def error(self) -> str:
        """The message of a user's mistake, if it was one, else the end of the log."""
        lines = self.job.log.read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line.removeprefix("dmaml: error: ") for line in lines if line.startswith("dmaml: error: ")]
        return told[-1] if told else self.last_words()


@dataclass
class _Running:
    job: Job
    processes: list[ForkServerProcess]
    began: float = field(default_factory=time.monotonic)
    deadline: float = math.inf
    code: int = 0

    def ended(self) -> bool:
        """Whether all processes have ended; when one has ended badly, the others are given some time to do so."""
        codes = [process.exitcode for process in self.processes]
        bad = [code for code in codes if code]
        if bad and not self.code:
            self.code = bad[0]
            self.deadline = time.monotonic() + GRACE_S
        if time.monotonic() > self.deadline:
            _kill(self.processes)
            return True
        return None not in codes


class Runner:
    """Runs jobs, some of them at the same time.

    Args:
        at_once: jobs at the same time; wall times are only comparable if it is 1.
    """

    def __init__(self, at_once: int = 1) -> None:
        self.at_once = at_once
        self._context = multiprocessing.get_context("forkserver")

    def warm_up(self) -> None:
        """Let the server begin its imports, while this process does something else."""
        self._context.set_forkserver_preload(["dmaml_pl.studies.preload"])
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when the libraries are loaded
        try:
            forkserver.ensure_running()
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]

    def run(self, jobs: Iterable[Job], on_wait: Callable[[list[Job]], None] | None = None) -> Iterator[Ended]:
        """Run jobs in their order; yields each when it has ended. Leaving the iterator ends what still runs.

        Args:
            jobs: what to run.
            on_wait: is told every second which jobs are running.
        """
        self.warm_up()
        waiting, running = deque(jobs), list[_Running]()
        try:
            while waiting or running:
                while waiting and len(running) < self.at_once:
                    self._start(waiting.popleft(), running)
                alive = [p.sentinel for one in running for p in one.processes if p.exitcode is None]
                patience = min(one.deadline for one in running) - time.monotonic()
                if on_wait is not None:
                    patience = min(patience, LOOK_S)
                if alive:  # else it would wait for ever
                    connection.wait(alive, None if patience == math.inf else max(patience, 0.0))
                if on_wait is not None:
                    on_wait([one.job for one in running])
                for one in [one for one in running if one.ended()]:
                    running.remove(one)
                    yield Ended(one.job, one.code, time.monotonic() - one.began)
        finally:
            _stop([process for one in running for process in one.processes])

    def _start(self, job: Job, running: list[_Running]) -> None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.log.write_bytes(b"")
        port = processes.free_port()
        one = _Running(job, [])
        running.append(one)  # before there is a process, so that none can be forgotten
        for rank in range(1 if job.resolved else job.workers):
            target, arguments = self._task(job, processes.environment(rank, job.workers, port))
            process = self._context.Process(target=target, args=arguments)
            process.start()
            one.processes.append(process)

    @staticmethod
    def _task(job: Job, surroundings: dict[str, str]) -> tuple[Callable[..., None], tuple[Any, ...]]:
        if job.resolved is None:
            return processes.train, (list(job.words), surroundings, job.log)
        return processes.check, (list(job.words), surroundings, job.log, job.resolved)


def _stop(some: list[ForkServerProcess]) -> None:
    """End processes in good order: a training answers SIGTERM within a meta-iteration."""
    for process in some:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in some:
        process.join(max(deadline - time.monotonic(), 0.0))
    _kill(some)


def _kill(some: list[ForkServerProcess]) -> None:
    for process in some:
        if process.exitcode is None:
            process.kill()
        process.join()
