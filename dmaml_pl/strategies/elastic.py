"""Going on without a worker that is lost: the others agree on who is left, and form a new process group.

A collective call that a worker leaves half-way may have succeeded on some of the others and failed on the rest. So
after each call every worker says in the group's key-value store (TCPStore, kept by worker 0) whether it succeeded, and
worker 0, which has started the others and knows who is alive, gives the verdict: all go on, or all form a new group
without the lost and make the call again. torchft (its Manager and Lighthouse) makes the same decision with a server.

Worker 0 itself cannot be done without: it holds the store, the tracking and the checkpoints.
"""

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from dmaml_pl.errors import WorkerLostError
from dmaml_pl.launching.workers import WorkerLauncher

POLL_SECONDS = 0.002
CONNECT_SECONDS = 30.0
"""A new group is formed within so many seconds, or again without those who did not come."""


class Membership:
    """The workers that are still there, and their decisions.

    Args:
        me: number of this worker at the start of the training.
        workers: how many there were at the start.
        timeout: seconds that a worker may take to come to a collective call.
        launcher: worker 0's knows which processes still run, and ends those that did not come in time.
        check: raises an error if this process is to stop.

    Attributes:
        members: numbers that the workers of the present group had at the start; this worker's place is its rank.
    """

    def __init__(
        self, *, me: int, workers: int, timeout: float, launcher: WorkerLauncher, check: Callable[[], None]
    ) -> None:
        self.members = list(range(workers))
        self._me = me
        self._timeout = timeout
        self._launcher = launcher
        self._check = check
        self._backend = torch.distributed.get_backend()
        self._store: Any = PrefixStore("dmaml", _get_default_store())
        self._call = 0

    @property
    def rank(self) -> int:
        """Rank of this worker in the present group."""
        return self.members.index(self._me)

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.members)

    def agree(self, succeeded: bool) -> bool:
        """Whether the last collective call succeeded on every worker; the same answer on all of them.

        If not, `members` are those who are left, and the group is gone: `regroup` before the next call.

        Raises:
            WorkerLostError: worker 0 is lost, or has given this worker up.
        """
        if not succeeded:
            self._leave()
        try:
            self._store.set(f"{self._call}/{self._me}", str(int(succeeded)))
            left = self._ask_everyone() if self._me == 0 else self._hear_verdict()
        except RuntimeError as error:  # the store went with worker 0
            raise WorkerLostError("worker 0 is lost, without which the others cannot go on.") from error
        self._call += 1
        if left is None:
            return True
        self._leave()
        if self._me not in left:
            raise WorkerLostError(
                f"worker {self._me} did not come within trainer.strategy.timeout ({self._timeout:g} s): the others have"
                " gone on without it."
            )
        self.members = left
        return False

    def regroup(self) -> None:
        """Form a group of the members; if another is lost meanwhile, one without it.

        Raises:
            WorkerLostError: as `agree`.
        """
        while not self.agree(self._join()):
            pass

    def _join(self) -> bool:
        """Whether all members came to a group under the number of the call."""
        try:
            torch.distributed.init_process_group(
                self._backend,
                store=PrefixStore(f"group {self._call}", self._store),
                rank=self.rank,
                world_size=len(self.members),
                timeout=timedelta(seconds=min(CONNECT_SECONDS, self._timeout)),
            )
            torch.distributed.set_timeout(timedelta(seconds=self._timeout))
        except RuntimeError:
            return False
        return True

    def _leave(self) -> None:
        """Close the connections, so that whoever waits for this worker in the same call is told."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    # -- the decision: who is left to make the call again, or None if all have made it -------------------------------

    def _hear_verdict(self) -> list[int] | None:
        name = f"{self._call}/verdict"
        if not self._wait_for(lambda: bool(self._store.check([name])), 4 * self._timeout + CONNECT_SECONDS):
            raise WorkerLostError("worker 0 does not answer, without which the others cannot go on.")
        left: list[int] | None = json.loads(self._store.get(name))
        return left

    def _ask_everyone(self) -> list[int] | None:
        """Worker 0: hear everyone who lives, within the time that a worker has to come, and give the verdict."""
        said: dict[int, bool] = {}

        def all_heard() -> bool:
            for member in self.members:
                if member not in said and self._store.check([f"{self._call}/{member}"]):
                    said[member] = self._store.get(f"{self._call}/{member}") == b"1"
            missing = [self._launcher.is_alive(member) for member in self.members if member not in said]
            if not (all(said.values()) and all(missing)):
                self._leave()  # some may wait in the call for this worker
            return not any(missing)

        self._wait_for(all_heard, self._timeout)
        left = None
        if len(said) < len(self.members) or not all(said.values()):
            for member in set(self.members) - said.keys():
                self._launcher.end_worker(member)
            # One that dies after it has spoken is found at the next call.
            left = [member for member in sorted(said) if self._launcher.is_alive(member)]
        self._store.set(f"{self._call}/verdict", json.dumps(left))
        for name in [*self.members, "verdict"]:  # whoever has come to this call has read the verdict of the last
            self._store.delete_key(f"{self._call - 1}/{name}")
        return left

    def _wait_for(self, done: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not done():
            self._check()
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True
