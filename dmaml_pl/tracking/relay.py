"""What every worker keeps in mind of the log, where the one that sends it may be lost and another takes its place.

Workers that come and go log the same values at the same time, which worker 0 tells at every meeting of theirs. Worker 0
sends them once the next meeting has shown that the others have made the one before, and tells up to which meeting the
store has all. The others forget that; whoever becomes worker 0 sends the rest. What is sent twice so is the same to the
bit, and one row in MLflow's store.
"""

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from dmaml_pl.errors import LeftBehindError, TrackingError
from dmaml_pl.tracking import operations
from dmaml_pl.tracking.outbox import Operation
from dmaml_pl.tracking.sender import Sender
from dmaml_pl.tracking.store import Store
from dmaml_pl.tracking.tracker import AT_MOST_S, MLflowTracker

_TRY_AGAIN_S = 30.0  # where a store is away that another worker's MLflow run is in
_log = logging.getLogger(__name__)


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
        logged: what the others keep in mind, where this worker joins them: what may not be in the store, and after
            which meeting it was logged. The attribute is what this worker does.
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


class RelayedTracker(MLflowTracker):
    """Logs into the MLflow run of worker 0, whoever that is; every worker has one.

    Args:
        tracker: that the user has configured, whose place it takes.
        relay: what this worker keeps in mind of the log.
        run_id: id of the MLflow run, where it is known already.
    """

    def __init__(self, tracker: MLflowTracker, relay: Relay, run_id: str | None) -> None:
        vars(self).update(vars(tracker))
        self.relay = relay
        self._run_id = tracker.version or run_id or self._run_id
        self._configured = self._configured or self._run is None
        self._tries_again = 0.0

    @property
    def version(self) -> str | None:
        """Id of the MLflow run, on every worker."""
        return self._run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep in mind what all log alike, and send it if this is worker 0."""
        self.relay.add(operations.metrics(metrics, step or 0, self.relay.meetings.time_ms))
        self._take_turn()

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """As the tracker that it stands for, if this is worker 0."""
        self._take_turn()
        super().log_artifact(path, folder)

    def _put(self, wanted: Operation) -> None:
        self._take_turn()
        super()._put(wanted)

    def finalize(self, status: str) -> None:
        """End the MLflow run, if this is worker 0; one that was left behind leaves it to the others."""
        if isinstance(sys.exc_info()[1], LeftBehindError):
            self._withdraw()
        else:
            self._take_turn(all_of_it=True)
            super().finalize(status)

    def _take_turn(self, *, all_of_it: bool = False) -> None:
        now = time.monotonic()
        if self.relay.leads and self._run is None and now >= self._tries_again:
            try:
                self.open(self._run_id)
            except TrackingError as error:
                _log.warning("Worker 0 was lost, and its MLflow run cannot be gone on with yet: %s", error)
                self._tries_again = now + _TRY_AGAIN_S
        if self._sender is not None:
            self.relay.hand_to(self._sender, all_of_it=all_of_it)
        else:
            self.relay.prepare(self._store)

    def _withdraw(self) -> None:
        """Leave the MLflow run to the others, who have gone on without this worker."""
        if self._monitor is not None:
            self._monitor.stop()
        if self._sender is not None:
            self._sender.wait(0, AT_MOST_S)
            self._sender.stop()
        self._run = self._sender = self._ending = self._monitor = None


def _load(store: Store) -> None:
    with suppress(Exception):  # whoever needs it tells
        store.connect()
