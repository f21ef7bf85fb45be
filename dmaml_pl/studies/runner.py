"""Makes trainings one after another, or several at a time, and tells how each has ended."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from dmaml_pl.launching.server import Forked
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
        return "\n".join(self._said()[-SHOWN_LINES:])

    def error(self) -> str:
        """The message of a user's mistake, if it was one, else the end of the log."""
        told = [line.removeprefix("dmaml: error: ") for line in self._said() if line.startswith("dmaml: error: ")]
        return told[-1] if told else self.last_words()

    def _said(self) -> list[str]:
        return self.job.log.read_text(encoding="utf-8", errors="replace").splitlines()


@dataclass
class _Running:
    job: Job
    processes: list[Forked] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    deadline: float = math.inf
    code: int = 0

    def ended(self) -> bool:
        """Whether all processes have ended; when one has ended badly, the others are given some time to do so."""
        codes = [process.poll() for process in self.processes]
        if not self.code and any(codes):
            self.code = next(code for code in codes if code)
            self.deadline = time.monotonic() + GRACE_S
        if time.monotonic() > self.deadline:
            _kill(self.processes)
            return True
        return None not in codes


def make(jobs: Iterable[Job], at_once: int, on_wait: Callable[[list[Job]], object] = lambda _: None) -> Iterator[Ended]:
    """Make jobs in their order; yields each when it has ended. Leaving the iterator ends what still runs.

    Args:
        jobs: what to make.
        at_once: jobs at the same time; wall times are only comparable if it is 1.
        on_wait: is told every second which jobs are under way.
    """
    waiting, running = deque(jobs), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                _start(waiting.popleft(), running)
            alive = [process.sentinel for one in running for process in one.processes if process.poll() is None]
            connection.wait(alive, LOOK_S if alive else 0.0)
            on_wait([one.job for one in running])
            for one in [one for one in running if one.ended()]:
                running.remove(one)
                yield Ended(one.job, one.code, time.monotonic() - one.began)
    finally:
        _stop([process for one in running for process in one.processes])


def _start(job: Job, running: list[_Running]) -> None:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.log.write_bytes(b"")
    one = _Running(job)
    running.append(one)  # before there is a process, so that none can be forgotten
    for process in processes.fork(job.words, job.workers, job.log, job.resolved):
        one.processes.append(process)


def _stop(some: list[Forked]) -> None:
    """End processes in good order: a training answers SIGTERM within a meta-iteration."""
    for process in some:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for process in some:
        process.wait(max(deadline - time.monotonic(), 0.0))
    _kill(some)


def _kill(some: list[Forked]) -> None:
    for process in some:
        process.kill()
    for process in some:
        process.wait()
