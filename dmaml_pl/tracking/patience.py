"""Talking to MLflow with short patience and without its chatter."""

from __future__ import annotations

import logging
import os
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


@contextmanager
def brief_requests(timeout_s: int | None = None) -> Iterator[None]:
    """Bound the time that the requests of a block take; what goes wrong is raised, so it is not logged as well.

    MLflow reads its patience from the environment at every request, so it is set for the time of the block only.

    Args:
        timeout_s: seconds to wait for an answer, by default 6; it is asked for once again after that.
    """
    bounds = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s or REQUEST_TIMEOUT_S),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    before = {name: os.environ.get(name) for name in bounds}
    levels = {name: logging.getLogger(name).level for name in _CHATTER}
    os.environ.update(bounds)
    for name, level in _CHATTER.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
