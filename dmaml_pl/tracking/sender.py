"""Sends what waits in an outbox, in the background, so that no training waits for a store that does not answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dmaml_pl.tracking.delivery import Delivery
from dmaml_pl.tracking.mlflow_run import MLflowRun
from dmaml_pl.tracking.outbox import Operation, Outbox
from dmaml_pl.tracking.store import reason

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0  # between attempts to reach a store that is away; it doubles
_SILENT_S = 600.0  # after which nobody waits for a request: longer than a large checkpoint takes, and not for ever
_STOP_S = 5.0  # that the request under way may take after `stop`

_log = logging.getLogger(__name__)


class Pace:
    """Lets an activity take a share of the time and no more.

    A request costs several milliseconds whether it carries 1 value or 100. So a training that logs every second sends
    each value at once, and one that logs every millisecond sends them by the dozen.

    Args:
        share: part of the time since now that may be taken.
        credit_s: seconds that are free, so that the first values appear at once.
    """

    def __init__(self, share: float = 0.005, credit_s: float = 0.05) -> None:
        self._share = share
        self._credit_s = credit_s
        self._since = time.monotonic()
        self._spent_s = 0.0

    def spend(self, seconds: float) -> None:
        """So much was taken."""
        self._spent_s += seconds

    @property
    def wait_s(self) -> float:
        """Seconds until more may be taken; 0 if now."""
        return max((self._spent_s - self._credit_s) / self._share - (time.monotonic() - self._since), 0.0)


class Sender:
    """A thread that sends what waits, and lives as long as something does.

    Args:
        run: the MLflow run.
        outbox: what waits for it.
    """

    def __init__(self, run: MLflowRun, outbox: Outbox) -> None:
        self.run = run
        self.outbox = outbox
        self._delivery = Delivery(run, outbox)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pace = Pace()
        self._away_since: float | None = None
        self._pause_s = 0.0
        self._taken_at = time.monotonic()
        self._hurry = 0
        self._stopping = False

    def put(self, operation: Operation) -> None:
        """Write an operation down, and send it soon; never raises, never waits."""
        with self._changed:
            self.outbox.append(operation)
            self._start()
            self._changed.notify_all()

    def put_file(self, path: Path, operation: Callable[[str], Operation], *, replaced_whole: bool = False) -> None:
        """As `put`, for a file or folder, which is kept as it is now.

        Args:
            path: the file or folder.
            operation: makes the operation from its name in the outbox.
            replaced_whole: as for `Outbox.stage`.
        """
        if path.exists():
            with self._changed:  # else the thread might close the outbox in between
                self.put(operation(self.outbox.stage(path, replaced_whole=replaced_whole)))
        else:
            _log.warning("MLflow does not get %s: there is no such file. The training goes on.", path)

    @property
    def away(self) -> bool:
        """Whether the store did not take what was last sent."""
        return self._away_since is not None

    def wait(self, patience_s: float, at_most_s: float = float("inf")) -> bool:
        """Wait until all is sent, or the store has taken nothing for 10 minutes; returns whether it is.

        Args:
            patience_s: seconds to go on trying where the store is away; 0 does not wait for one that is.
            at_most_s: seconds to wait in any case, as for a store that answers slowly.
        """
        start = time.monotonic()
        with self._changed:
            self._hurry += 1
            try:
                while self.outbox.waits:
                    self._start()
                    self._changed.notify_all()
                    now = time.monotonic()
                    if self._away_since is not None and now - start >= patience_s:
                        return False
                    if now - start >= at_most_s or now - max(start, self._taken_at) >= _SILENT_S:
                        return False
                    self._changed.wait(0.1)
            finally:
                self._hurry -= 1
        return True

    def stop(self) -> None:
        """Send nothing more until the next `put` or `wait`, and leave what waits to others.

        A request that takes longer than 5 s from now is not waited for; the outbox is left when it ends.
        """
        with self._changed:
            self._stopping = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join(_STOP_S)
        else:
            self.outbox.close()

    def _start(self) -> None:
        """See to it that a thread sends, whatever was asked before; `_changed` is held."""
        self._stopping = False
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._loop, name="MLflowSender", daemon=True)
            self._thread.start()

    def _loop(self) -> None:
        attempted = 0.0
        while True:
            with self._changed:
                while not self._stopping:
                    if not self.outbox.waits:
                        pause = None
                    elif self._away_since is not None:
                        pause = attempted + (min(self._pause_s, 0.5) if self._hurry else self._pause_s)
                        pause -= time.monotonic()
                    else:
                        pause = 0.0 if self._hurry else self._pace.wait_s
                    if pause is not None and pause <= 0:
                        break
                    self._changed.notify_all()
                    self._changed.wait(pause)
                if self._stopping:
                    self.outbox.close()
                    self._thread = None
                    return
            start = time.monotonic()
            self._attempt()
            attempted = time.monotonic()
            if self._away_since is None:
                self._pace.spend(attempted - start)
                self._taken_at = attempted
            with self._changed:
                self._changed.notify_all()

    def _attempt(self) -> None:
        try:
            refused = self._delivery.step()
        except Exception as error:  # whatever it is, hours of training are worth more
            self._has_gone(error)
            return
        if refused is not None:
            _log.warning("MLflow refuses %s It is kept in %s; the training goes on.", refused, self.outbox.folder)
        if self._away_since is not None:
            self._away_since = None
            _log.warning("MLflow answers again, and gets what was kept.")

    def _has_gone(self, error: Exception) -> None:
        if self._away_since is None:
            self._away_since, self._pause_s = time.monotonic(), _FIRST_PAUSE_S
            _log.warning(
                "MLflow does not answer: %s The training goes on; what is logged is kept in %s and sent later.",
                reason(error),
                self.outbox.folder,
            )
        else:
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
