"""Takes what waits in an outbox to its MLflow run, one request after the other."""

from __future__ import annotations

from pathlib import Path

from dmaml_pl.tracking.mlflow_run import MLflowRun
from dmaml_pl.tracking.operations import Request, is_refusal
from dmaml_pl.tracking.outbox import Outbox, find_outboxes
from dmaml_pl.tracking.store import reason


class Delivery:
    """Sends what waits, in order.

    Args:
        run: the MLflow run.
        outbox: what waits for it.
    """

    def __init__(self, run: MLflowRun, outbox: Outbox) -> None:
        self._run = run
        self._outbox = outbox
        self._single = 0

    def step(self) -> str | None:
        """Send the first request, if anything waits, and write down that it was taken.

        Returns:
            What the store refused for good, and why, which is kept apart now; None if it took all.

        Raises:
            Exception: whatever sending raises, as when the store is away; the request waits still.
        """
        entries = self._outbox.read()
        if not entries:
            return None
        request = Request.first_of(entries, single=self._single > 0)
        try:
            request.send(self._run, self._outbox.folder)
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(request.entries) > 1:  # one of them is to blame
                self._single = len(request.entries)
                return None
            self._outbox.set_aside(request.entries[0], reason(error))
            return f"{request.name}: {reason(error)}"
        self._outbox.acknowledge(request.entries)
        self._single = max(self._single - len(request.entries), 0)
        for entry in request.entries:
            if "staged" in entry.operation:
                self._outbox.unstage(entry.operation["staged"])
        return None

    def everything(self) -> None:
        """Send all that waits.

        Raises:
            Exception: as `step`.
        """
        while self._outbox.waits:
            self.step()


def deliver_left(save_dir: Path, run: MLflowRun) -> None:
    """Send what ended processes have left for an MLflow run, as a training that could not wait for a busy store.

    Args:
        save_dir: folder of the tracking, below which outboxes are.
        run: the MLflow run.

    Raises:
        Exception: whatever sending raises; what was not sent waits still.
    """
    for folder, about in find_outboxes(save_dir):
        outbox = Outbox(folder, about)
        if about.get("run_id") == run.run_id and outbox.adopt():
            try:
                Delivery(run, outbox).everything()
            finally:
                outbox.close()
