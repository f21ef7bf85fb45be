"""Talking to MLflow with short patience and without its chatter."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

REQUEST_TIMEOUT_S = 6  # asked twice, a silent server is given up after 12 s
UPLOAD_TIMEOUT_S = 60  # a server may take its time to store a large file before it answers

# MLflow tells of the tables it makes, of models it checks, and of each error with a traceback; urllib3 of each retry.
_CHATTER = {
    "mlflow.store.db.utils": logging.CRITICAL + 1,
    "mlflow.pyfunc": logging.WARNING,
    "urllib3.connectionpool": logging.ERROR,
}


class _Bounds:
    """What is set while any thread asks MLflow for something, and what was there before."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._timeouts: list[int] = []
        self._environment: dict[str, str | None] = {}
        self._levels: dict[str, int] = {}

    def enter(self, timeout_s: int) -> None:
        with self._mutex:
            self._timeouts.append(timeout_s)
            bounds = {
                "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(self._timeouts)),
                "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
                "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
                # At the end of an MLflow run its client prints where to see it: an address with a user's password.
                "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            }
            if len(self._timeouts) == 1:
                self._environment = {name: os.environ.get(name) for name in bounds}
                self._levels = {name: logging.getLogger(name).level for name in _CHATTER}
                for name, level in _CHATTER.items():
                    logging.getLogger(name).setLevel(level)
            os.environ.update(bounds)

    def leave(self, timeout_s: int) -> None:
        with self._mutex:
            self._timeouts.remove(timeout_s)
            if self._timeouts:
                return
            for name, level in self._levels.items():
                logging.getLogger(name).setLevel(level)
            for name, value in self._environment.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


_bounds = _Bounds()


@contextmanager
def brief_requests(timeout_s: int | None = None) -> Iterator[None]:
    """Bound the time that the requests of a block take; what goes wrong is raised, so it is not logged as well.

    MLflow reads its patience from the environment at every request, so it is set for the time of the block only, or of
    all blocks that threads are in at the time.

    Args:
        timeout_s: seconds to wait for an answer, by default 6; it is asked for once again after that.
    """
    timeout = timeout_s or REQUEST_TIMEOUT_S
    _bounds.enter(timeout)
    try:
        yield
    finally:
        _bounds.leave(timeout)
