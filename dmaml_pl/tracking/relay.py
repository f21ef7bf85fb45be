"""What every worker keeps in mind of the log, where the one that sends it may be lost and another takes its place.

Workers that come and go log the same values at the same time, which worker 0 tells at every meeting of theirs. Worker 0
sends them once the next meeting has shown that the others have made the one before, and tells up to which meeting the
store has all. The others forget that; whoever becomes worker 0 sends the rest. What is sent twice so is the same to the
bit, and one row in MLflow's store.
"""

import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Protocol

from dmaml_pl.tracking.outbox import Operation
from dmaml_pl.tracking.sender import Sender
from dmaml_pl.tracking.store import Store


class Meetings(Protocol):
    """The meetings of workers.

    Attributes:
        rank: of this worker; 0 sends.
        step: meetings that this worker has behind it.
        time_ms: the time of the last one, in ms since 1970, the same on all.
        kept: meetings up to which the store has what was logged; worker 0 sets it, and the others learn of it.
    """

    rank: int
    time_ms: int
    kept: int

    @property
    def step(self) -> int:
        """As above."""
        ...


class Relay:
    """What was logged, until it is known to be in the store.

    Args:
        meetings: of the workers.
        logged: what the others keep in mind, where this worker joins them.

    Attributes:
        logged: what may not be in the store, and after which meeting it was logged.
    """

    def __init__(self, meetings: Meetings, logged: Iterable[tuple[int, Operation]] = ()) -> None:
        self.meetings = meetings
        self.logged = deque(logged)
        self._sent_to = 0
        self._prepared = False

    @property
    def leads(self) -> bool:
        """Whether this worker is the one that sends."""
        return self.meetings.rank == 0

    def add(self, operation: Operation) -> None:
        """Keep something in mind."""
        self.logged.append((self.meetings.step, operation))
        if not self.leads:
            while self.logged[0][0] <= self.meetings.kept and len(self.logged) > 1:
                self.logged.popleft()

    def prepare(self, store: Store) -> None:
        """Let the next in line load in the background what sending takes, so that nobody waits for it then."""
        if self.meetings.rank == 1 and not self._prepared:
            self._prepared = True
            threading.Thread(target=_load, args=(store,), name="next-in-line", daemon=True).start()

    def hand_to(self, sender: Sender, *, all_of_it: bool = False) -> None:
        """Send what the others are known to know, or at the end all of it."""
        if not sender.outbox.waits:
            self.meetings.kept = max(self.meetings.kept, self._sent_to)
        while self.logged and (all_of_it or self.logged[0][0] < self.meetings.step):
            self._sent_to, operation = self.logged.popleft()
            sender.put(operation)


def _load(store: Store) -> None:
    with suppress(Exception):  # whoever needs it tells
        store.connect()
