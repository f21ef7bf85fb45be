"""Metrics on their way to MLflow."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dmaml_pl.tracking.params import clean_name

BATCH = 1000  # metrics in one request: MLflow's limit


class Row(NamedTuple):
    """One value of one metric; the fields are those of `mlflow.entities.Metric`, in its order."""

    key: str
    value: float
    timestamp: int  # milliseconds since 1970
    step: int


class MetricBuffer:
    """Rows that wait until it is worth, or possible, to send them.

    A request costs about 5 ms whether it carries 1 row or 100, and Lightning asks to save after every row. So `due`
    lets requests take `share` of the time and no more: a training that logs every second sends each row at once, one
    that logs every millisecond sends them by the dozen.

    Args:
        share: part of the time since the buffer was made that may go into sending; 2 % is below what is noticed.
        credit_s: seconds of sending that are free, so that the first rows appear at once.
    """

    def __init__(self, share: float = 0.02, credit_s: float = 0.5) -> None:
        self._share = share
        self._credit_s = credit_s
        self._rows: list[Row] = []
        self._since = time.monotonic()
        self._spent_s = 0.0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Take one value of some metrics, with the time of now; values may be infinite or not a number."""
        now = time.time_ns() // 1_000_000
        self._rows.extend(Row(clean_name(name), float(value), now, step) for name, value in metrics.items())

    @property
    def due(self) -> bool:
        """Whether sending what waits is worth its cost now."""
        elapsed = time.monotonic() - self._since
        return len(self) >= BATCH or (len(self) > 0 and self._spent_s <= self._credit_s + self._share * elapsed)

    def flush(self, send: Callable[[Sequence[Row]], None]) -> None:
        """Send every row, at most 1000 at a time; rows whose sending raises, and those after them, stay.

        Args:
            send: takes the rows of one request; what it raises is passed on.
        """
        start = time.monotonic()
        try:
            while batch := self._rows[:BATCH]:
                send(batch)
                del self._rows[: len(batch)]
        finally:
            self._spent_s += time.monotonic() - start
