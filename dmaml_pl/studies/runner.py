"""Makes the trainings of a study, wherever a launcher has them run, and tells how each has ended. Light: no PyTorch."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        workers: W of the training, each of which needs a core, and a GPU where it trains on GPUs; 0 for a check.
        digest: of all that makes it this training.
    """

    key: Any
    words: tuple[str, ...]
    log: Path
    resolved: Path | None = None
    workers: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Ended:
    """A job that has ended, and its exit code; None where it was given up before it began."""

    job: Job
    code: int | None
    seconds: float

    def last_words(self) -> str:
        """The end of the log."""
        return "\n".join(self._said()[-SHOWN_LINES:])

    def error(self) -> str:
        """The message of a user's mistake, if it was one, else the end of the log."""
        told = [line.removeprefix("dmaml: error: ") for line in self._said() if line.startswith("dmaml: error: ")]
        return told[-1] if told else self.last_words()

    def _said(self) -> list[str]:
        if not self.job.log.exists():  # on another machine, which is lost
            return []
        return self.job.log.read_text(encoding="utf-8", errors="replace").splitlines()


class Launcher(ABC):
    """Has trainings run somewhere.

    What `start` returns is whatever it takes to know a training again.
    """

    @abstractmethod
    def start(self, job: Job) -> Any:
        """Begin a training; all that it says goes to the job's log."""

    @abstractmethod
    def code(self, started: Any) -> int | None:
        """The exit code of a training; None while it goes on."""

    @abstractmethod
    def end(self, started: Any, *, kill: bool = False) -> None:
        """Ask a training to end, which it does within a meta-iteration; or kill it."""

    def wait(self, started: Collection[Any]) -> None:
        """Return when one of these may have ended, after LOOK_S at most."""
        time.sleep(LOOK_S)

    def goes_on(self, job: Job) -> bool:
        """Whether a training that an earlier command began is still under way; `start` then takes it over."""
        return False


def make(
    jobs: Iterable[Job],
    at_once: int,
    launcher: Launcher,
    on_wait: Callable[[list[Job]], object] = lambda _: None,
    hopeless: Callable[[Job], bool] = lambda _: False,
) -> Iterator[Ended]:
    """Make jobs in their order; yields each when it has ended. Leaving the iterator ends what still runs.

    Args:
        jobs: what to make.
        at_once: jobs at the same time; wall times are only comparable if it is 1.
        launcher: has them run.
        on_wait: is told every second which jobs are under way.
        hopeless: is asked before each job, and every second while it is under way, whether it is to be given up.
    """
    waiting, running, given_up = deque(jobs), dict[int, tuple[Any, Job, float]](), set[int]()
    number = 0
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job, number = waiting.popleft(), number + 1
                if hopeless(job):
                    yield Ended(job, None, 0.0)
                    continue
                job.log.parent.mkdir(parents=True, exist_ok=True)
                running[number] = launcher.start(job), job, time.monotonic()
            launcher.wait([started for started, _, _ in running.values()])
            on_wait([job for _, job, _ in running.values()])
            for each, (started, job, began) in list(running.items()):
                if (code := launcher.code(started)) is not None:
                    del running[each]
                    yield Ended(job, code, time.monotonic() - began)
                elif each not in given_up and hopeless(job):
                    given_up.add(each)
                    launcher.end(started)
    finally:
        left = [started for started, _, _ in running.values()]
        for started in left:
            launcher.end(started)
        deadline = time.monotonic() + GRACE_S
        while (left := [started for started in left if launcher.code(started) is None]) and time.monotonic() < deadline:
            launcher.wait(left)
        for started in left:
            launcher.end(started, kill=True)
