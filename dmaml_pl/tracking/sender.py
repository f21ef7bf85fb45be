"""Sends what waits in an outbox, in the background, so that no training waits for a store that does not answer."""

import logging
import threading
import time
from pathlib import Path

from dmaml_pl.tracking.mlflow_run import MLflowRun
from dmaml_pl.tracking.operations import describe, first_request, is_refusal
from dmaml_pl.tracking.outbox import AT_ONCE, Operation, Outbox, find_outboxes
from dmaml_pl.tracking.store import reason

# A request costs several milliseconds whether it carries 1 value or 100. With this share of a core for sending, values
# go one by one where a run takes seconds, and by the dozen where it takes milliseconds.
_SHARE = 0.005
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0  # between attempts to reach a store that is away; it doubles
_SILENT_S = 600.0  # after which nobody waits for a request: longer than a large checkpoint takes, and not for ever
_STOP_S = 5.0  # that the request under way may take after `stop`

_log = logging.getLogger(__name__)


def pause_after(seconds: float) -> float:
    """Seconds until the next request, after one that took so many on a core."""
    return min(seconds / _SHARE, _LONGEST_PAUSE_S)


def deliver(run: MLflowRun, outbox: Outbox, at_most: int = AT_ONCE) -> None:
    """Send the first request that waits, of `at_most` so many operations, and write down that it was taken.

    What the store refuses for good is told and kept apart, and what comes after it is sent.

    Raises:
        Exception: whatever sending raises, as when the store is away; the request waits still.
    """
    waiting = outbox.read(at_most)
    if not waiting:
        return
    entries, method, arguments = first_request(waiting, outbox.folder)
    try:
        getattr(run, method)(**arguments)
    except Exception as error:
        if not is_refusal(error):
            raise
        if len(entries) > 1:  # one of them is to blame
            for _ in entries:
                deliver(run, outbox, at_most=1)
            return
        outbox.set_aside(entries[0], reason(error))
        one = entries[0].operation
        what = next(filter(None, map(one.get, ("artifact_file", "name", "staged"))), describe([one]))
        _log.warning("MLflow refuses %s: %s It is kept in %s.", what, reason(error), outbox.folder)
    else:
        outbox.acknowledge(entries)


def deliver_all(run: MLflowRun, outbox: Outbox) -> None:
    """Send all that waits, or raise as `deliver` does."""
    while outbox.waits:
        deliver(run, outbox)


def deliver_left(save_dir: Path, run: MLflowRun) -> None:
    """Send what ended processes left in `save_dir` for an MLflow run, as they could not wait for a busy store."""
    for folder in find_outboxes(save_dir):
        outbox = Outbox(folder)
        if folder.name.startswith(run.run_id) and outbox.adopt():
            try:
                deliver_all(run, outbox)
            finally:
                outbox.close()


class Sender:
    """A thread that sends what waits in an outbox for an MLflow run, and lives as long as something does."""

    def __init__(self, run: MLflowRun, outbox: Outbox) -> None:
        self.run = run
        self.outbox = outbox
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._away = False
        self._pause_s = 0.0  # from one attempt to the next
        self._tried_at = self._taken_at = time.monotonic()
        self._hurry = 0
        self._stopping = False

    def put(self, wanted: Operation) -> None:
        """Write an operation down, and send it soon; never raises, never waits."""
        with self._changed:
            has_its_turn = self.outbox.waits  # already, so that waking it would only take time from the training
            self.outbox.append(wanted)
            self._start()
            if not has_its_turn:
                self._changed.notify_all()

    def put_file(self, path: Path, folder: str, name: str | None = None, *, replaced_whole: bool = False) -> None:
        """As `put`: upload a file or folder as it is now into a folder of the artifacts, as `name` if one is given."""
        if not path.exists():
            _log.warning("MLflow does not get %s: there is no such file. The training goes on.", path)
            return
        with self._changed:  # else the thread might close the outbox in between
            staged = self.outbox.stage(path, replaced_whole=replaced_whole)
            self.put({"do": "log_file", "staged": staged, "folder": folder, "name": name})

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
                    if self._away and now - start >= patience_s:
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
        if thread is None or not thread.is_alive():
            self.outbox.close()

    def _start(self) -> None:
        """See to it that a thread sends, whatever was asked before; `_changed` is held."""
        self._stopping = False
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._loop, name="MLflowSender", daemon=True)
            self._thread.start()

    def _loop(self) -> None:
        while self._await_turn():
            start = time.thread_time()
            try:
                deliver(self.run, self.outbox)
            except Exception as error:  # whatever it is, hours of training are worth more
                self._has_gone(error)
            else:
                self._pause_s = pause_after(time.thread_time() - start)
                self._taken_at = time.monotonic()
                if self._away:
                    self._away = False
                    _log.warning("MLflow answers again, and gets what was kept.")
            with self._changed:
                self._tried_at = time.monotonic()
                self._changed.notify_all()

    def _await_turn(self) -> bool:
        """Wait until something may be sent; returns False, and leaves the outbox to others, once nothing more shall."""
        with self._changed:
            while not self._stopping:
                pause = None
                if self.outbox.waits:
                    least = _FIRST_PAUSE_S if self._away else 0.0
                    pause = self._tried_at - time.monotonic()
                    pause += min(self._pause_s, least) if self._hurry else self._pause_s
                    if pause <= 0:
                        return True
                self._changed.notify_all()
                self._changed.wait(pause)
            self.outbox.close()
            self._thread = None
            return False

    def _has_gone(self, error: Exception) -> None:
        if self._away:
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            return
        self._away, self._pause_s = True, _FIRST_PAUSE_S
        _log.warning(
            "MLflow does not answer: %s The training goes on; what is logged is kept in %s and sent later.",
            reason(error),
            self.outbox.folder,
        )
