"""Going on without a worker that is lost: the others agree on who is left, and form a new process group.

A collective call that a worker leaves half-way may have succeeded on some of the others and failed on the rest. So
after each call every worker says in the group's key-value store (TCPStore, kept by worker 0) whether it succeeded, and
worker 0, which has started the others and knows who is alive, gives the verdict: all go on, or all form a new group
without the lost and make the call again. torchft (its Manager and Lighthouse) makes the same decision with a server.

Worker 0 itself cannot be done without: it holds the store, the tracking and the checkpoints.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from dmaml_pl.errors import WorkerLostError

POLL_SECONDS = 0.002
CONNECT_SECONDS = 30.0
"""A new group is formed within so many seconds, or again without those who did not come."""


class Membership:
    """The workers that are still there, and their decisions.

    Args:
        me: number of this worker at the start of the training.
        workers: how many there were at the start.
        backend: of the process group.
        timeout: seconds that a worker may take to come to a collective call.
        is_alive: whether the process of a worker still runs; asked by worker 0 only.
        end: ends the process of a worker that did not come in time; called by worker 0 only.
        check: raises an error if this process is to stop.
    """

    def __init__(
        self,
        *,
        me: int,
        workers: int,
        backend: str,
        timeout: float,
        is_alive: Callable[[int], bool],
        end: Callable[[int], None],
        check: Callable[[], None],
    ) -> None:
        self.members = list(range(workers))
        self._me = me
        self._backend = backend
        self._timeout = timeout
        self._is_alive = is_alive
        self._end = end
        self._check = check
        self._store: Any = PrefixStore("dmaml", _get_default_store())
        self._call = 0
        self._groups = 0

    @property
    def rank(self) -> int:
        """Rank of this worker in the present group."""
        return self.members.index(self._me)

    @property
    def size(self) -> int:
        """Workers in the present group."""
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
            verdict = self._verdict(succeeded)
        except RuntimeError as error:  # the store went with worker 0
            raise WorkerLostError("worker 0 is lost, without which the others cannot go on.") from error
        self._call += 1
        if verdict.succeeded:
            return True
        self._leave()
        if self._me not in verdict.members:
            raise WorkerLostError(
                f"worker {self._me} did not come within trainer.strategy.timeout ({self._timeout:g} s): the others have"
                " gone on without it."
            )
        self.members = verdict.members
        return False

    def regroup(self) -> None:
        """Form a group of the members; if another is lost meanwhile, one without it.

        Raises:
            WorkerLostError: as `agree`.
        """
        while True:
            self._groups += 1
            try:
                self._join()
                joined = True
            except (RuntimeError, torch.distributed.DistError):
                joined = False
            if self.agree(joined):
                return

    def _join(self) -> None:
        torch.distributed.init_process_group(
            self._backend,
            store=PrefixStore(f"group {self._groups}", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=min(CONNECT_SECONDS, self._timeout)),
        )
        torch.distributed.set_timeout(timedelta(seconds=self._timeout))

    def _leave(self) -> None:
        """Close the connections, so that whoever waits for this worker in the same call is told."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    # -- the decision ----------------------------------------------------------------------------------------------

    def _verdict(self, succeeded: bool) -> _Verdict:
        call = self._call
        self._store.set(f"{call}/{self._me}", "1" if succeeded else "0")
        if self._me != 0:
            name = f"{call}/verdict"
            if not self._wait_for(lambda: bool(self._store.check([name])), 4 * self._timeout + CONNECT_SECONDS):
                raise WorkerLostError("worker 0 does not answer, without which the others cannot go on.")
            return _Verdict(*json.loads(self._store.get(name)))
        verdict = self._hear_everyone(call)
        self._store.set(f"{call}/verdict", json.dumps(verdict))
        if call:  # whoever has come to this call has read the verdict of the last
            for name in [*map(str, range(max(self.members) + 1)), "verdict"]:
                self._store.delete_key(f"{call - 1}/{name}")
        return verdict

    def _hear_everyone(self, call: int) -> _Verdict:
        """Worker 0: hear everyone who lives, within the time that a worker has to come."""
        said: dict[int, bool] = {}

        def all_heard() -> bool:
            for member in self.members:
                if member not in said and self._store.check([f"{call}/{member}"]):
                    said[member] = self._store.get(f"{call}/{member}") == b"1"
            missing = [member for member in self.members if member not in said]
            if not all(said.values()) or not all(map(self._is_alive, missing)):
                self._leave()  # some may wait in the call for this worker
            return not any(map(self._is_alive, missing))

        self._wait_for(all_heard, self._timeout)
        if len(said) == self.size and all(said.values()):
            return _Verdict(True, self.members)
        for member in self.members:
            if member not in said:
                self._end(member)
        # One that dies after it has spoken is found at the next call.
        return _Verdict(False, [member for member in self.members if member in said and self._is_alive(member)])

    def _wait_for(self, done: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not done():
            self._check()
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True


class _Verdict(NamedTuple):
    """Whether a call succeeded on every worker, and who takes part in the next."""

    succeeded: bool
    members: list[int]
