"""Who tries which trial of a sweep, by Optuna's storage alone: any number of commands, on any machines.

Each trial that is asked for has a number, from 1, and may be begun more than once. An attempt at it is one of Optuna's
trials; it ends as FAIL where its owner was lost, or a training failed. Of the attempts at a number the first one that
has not ended so counts. Optuna gives an attempt to one command only, and who has one that does not count leaves it: so
no number is tried by two at a time, no finished one is tried again, and there are never more than were asked for.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

import optuna
import psutil
from filelock import FileLock
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from dmaml_pl.studies.space import Space
from dmaml_pl.tracking.store import knock, told_in_one_line

Direction = Literal["minimize", "maximize"]

NUMBER, OWNER, ALIVE = "dmaml.number", "dmaml.owner", "dmaml.alive"
"""Attributes of attempts: at which number, by which process, and a count that goes up while that lives."""

LOST_S = 300.0
"""Seconds without a sign of life after which the owner of an attempt, on another machine, is taken for lost."""

TRIES = 3
"""How often a database that answers is opened again."""

LOCK_S = 60.0
"""Seconds that others may take to write to a journal."""


class Attempts:
    """The attempts at the trials of one search.

    Args:
        place: a journal file, or the URL of a database.
        name: of Optuna's study in it.
        direction: "minimize" or "maximize".
        pruner: Optuna's.
        trials: how many are asked for.

    Raises:
        TrackingError: the place cannot be used; in all that follows, too.
    """

    def __init__(self, place: str, name: str, direction: Direction, pruner: BasePruner, trials: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._place, self._trials = place, trials
        self._tried: set[int] = set()
        self._seen: dict[int, tuple[object, float]] = {}
        # SQLite, alone of all databases, lets two take one attempt.
        file = place.removeprefix("sqlite:///")
        self._taking = nullcontext() if file == place else FileLock(f"{file}.flock", timeout=LOCK_S)
        with self._told(), self._taking:
            storage = _open(place)
            self.optuna_study = optuna.create_study(
                storage=storage, study_name=name, direction=direction, pruner=pruner, load_if_exists=True
            )

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what goes wrong with the storage into one line."""
        problem = f"{self._place}, in which Optuna keeps its trials, cannot be used"
        remedy = (
            "Set --storage to one that can be" if "://" in self._place else "Move it away, or set --storage to another"
        )
        with told_in_one_line(problem, f"{remedy}. Trainings that have finished are not made again."):
            yield

    def take(self, space: Space, sampler: Callable[[int], BaseSampler]) -> tuple[int, optuna.Trial] | None:
        """Take the first number that nobody has or had; None if there is none at present.

        One whose attempts have failed is tried again, once by every command.

        Args:
            space: what may be asked for; a number that is tried again has the settings that it had.
            sampler: makes the one of a number.
        """
        with self._told(), self._taking:
            while (number := self._free()) is not None:
                self.optuna_study.sampler = sampler(number)
                taken = self.optuna_study.ask(space)
                taken.set_user_attr(OWNER, (platform.node(), os.getpid(), _began(os.getpid())))
                number = taken.user_attrs.get(NUMBER, 0)  # none where another command was faster, and nothing waited
                if self._counting(number)[:1] == [taken.number]:
                    self._tried.add(number)
                    return number, taken
                self.end(taken, TrialState.FAIL)
            return None

    def _free(self) -> int | None:
        """Find a number to be tried, and make an attempt at it that waits to be taken."""
        for number, attempts in self._by_number().items():
            counting = [attempt for attempt in attempts if attempt.state != TrialState.FAIL]
            if counting and counting[0].state == TrialState.WAITING:
                return number
            if not counting and number not in self._tried:
                asked = [attempt.params for attempt in attempts if attempt.params]
                self.optuna_study.enqueue_trial(asked[0] if asked else {}, user_attrs={NUMBER: number})
                return number
        return None

    def _counting(self, number: int) -> list[int]:
        return [each.number for each in self._by_number().get(number, []) if each.state != TrialState.FAIL]

    def _by_number(self) -> dict[int, list[FrozenTrial]]:
        """The attempts at each number, in their order; those of lost owners are ended."""
        found: dict[int, list[FrozenTrial]] = {number: [] for number in range(1, self._trials + 1)}
        for attempt in self.optuna_study.trials:
            if attempt.state == TrialState.RUNNING and self._is_lost(attempt):
                attempt.state = self.optuna_study.tell(
                    attempt.number, state=TrialState.FAIL, skip_if_finished=True
                ).state
            # Those that have no number are of an older version, or belong to nobody.
            before = attempt.number + 1 if attempt.state == TrialState.COMPLETE else 0
            found.get(attempt.user_attrs.get(NUMBER, before), []).append(attempt)
        return found

    def _is_lost(self, attempt: FrozenTrial) -> bool:
        """Whether its owner was a process of this machine that has ended, or has given no sign of life for long."""
        machine, process, began = attempt.user_attrs.get(OWNER, ("", 0, 0.0))
        if machine == platform.node():
            return bool(_began(process) != began)
        sign, now = attempt.user_attrs.get(ALIVE), time.monotonic()
        before, since = self._seen.setdefault(attempt.number, (sign, now))
        if before != sign:
            self._seen[attempt.number] = sign, now
            return False
        return now - since > LOST_S

    def give_sign(self, attempt: optuna.Trial) -> None:
        """Say that one is alive, at an attempt that is one's own."""
        with self._told():
            attempt.set_user_attr(ALIVE, attempt.user_attrs.get(ALIVE, 0) + 1)

    def report(self, attempt: optuna.Trial, values: Mapping[int, float]) -> bool:
        """Tell of values of the metric by step; returns whether the pruner gives the attempt up."""
        with self._told():
            known = self.optuna_study.trials[attempt.number].intermediate_values
            for step in sorted(values.keys() - known.keys()):
                attempt.report(values[step], step)
            return bool(attempt.should_prune())

    def end(self, attempt: optuna.Trial, state: TrialState, score: float | None = None) -> None:
        """End an attempt, unless others have done so, who took its owner for lost."""
        with self._told():
            self.optuna_study.tell(attempt, score, state=state, skip_if_finished=True)

    def over(self) -> bool:
        """Whether nothing is under way, here or elsewhere; asked where nothing is free."""
        with self._told():
            states = {attempt.state for attempts in self._by_number().values() for attempt in attempts}
        return TrialState.RUNNING not in states

    def done(self) -> dict[int, FrozenTrial]:
        """The attempts that counted and came to an end, by number."""
        with self._told():
            ends = (TrialState.COMPLETE, TrialState.PRUNED)
            every = [(number, each) for number, attempts in self._by_number().items() for each in attempts]
        return {number: attempt for number, attempt in reversed(every) if attempt.state in ends}


class _SystemLock:
    """A lock of the system on a journal, which ends with its owner; Optuna's own outlives one that was killed."""

    def __init__(self, file: str) -> None:
        self._lock = FileLock(f"{file}.flock", timeout=LOCK_S)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


def _open(place: str) -> BaseStorage:
    """Open a storage of Optuna's."""
    if "://" in place:
        for _ in range(TRIES):  # two that make the tables at the same moment disturb each other
            knock(place)
            with suppress(SQLAlchemyError):
                return RDBStorage(place)
            time.sleep(1.0)
        return RDBStorage(place)
    file = Path(place)
    file.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError), file.open("rb") as stream:
        if not b'{"op_code"'.startswith(stream.read(10)):
            raise ValueError("it is there already, and no journal of Optuna's")
    return JournalStorage(JournalFileBackend(place, _SystemLock(place)))  # type: ignore[arg-type] # its base is private


def _began(process: int) -> float:
    """When a process of this machine began, which tells it from a later one with its number; 0 if there is none."""
    try:
        return psutil.Process(process).create_time()
    except psutil.NoSuchProcess:
        return 0.0
