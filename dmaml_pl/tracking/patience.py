"""Talking to MLflow with short patience and without its chatter."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

REQUEST_TIMEOUT_S = 6  # asked twice, a silent server is given up after 12 s
UPLOAD_TIMEOUT_S = 60  # a server may take its time to store a large file before it answers

# MLflow tells of the tables it makes, of models it checks, and of each error with a traceback; urllib3 of each retry.
_CHATTER = {
    "mlflow.store.db.utils": logging.CRITICAL + 1,
    "mlflow.pyfunc": logging.WARNING,
    "urllib3.connectionpool": logging.ERROR,
}

_BOUNDS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "",  # as the block says
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # At the end of an MLflow run its client prints where to see it: an address with a user's password.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

_mutex = threading.Lock()
_timeouts: list[int] = []  # of the blocks that threads are in
_undo = ExitStack()  # what was there before the first of them


@contextmanager
def brief_requests(timeout_s: int | None = None) -> Iterator[None]:
    """Bound the time that the requests of a block take; what goes wrong is raised, so it is not logged as well.

    MLflow reads its patience from the environment at every request, so it is set for the time of the block only, or of
    all blocks that threads are in at the time.

    Args:
        timeout_s: seconds to wait for an answer, by default 6; it is asked for once again after that.
    """
    timeout = timeout_s or REQUEST_TIMEOUT_S
    with _mutex:
        if not _timeouts:
            for name, level in _CHATTER.items():
                logger = logging.getLogger(name)
                _undo.callback(logger.setLevel, logger.level)
                logger.setLevel(level)
            for name, value in _BOUNDS.items():
                before = os.environ.get(name)
                _undo.callback(*((os.environ.pop, name) if before is None else (os.environ.__setitem__, name, before)))
                os.environ[name] = value
        _timeouts.append(timeout)
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(_timeouts))
    try:
        yield
    finally:
        with _mutex:
            _timeouts.remove(timeout)
            if not _timeouts:
                _undo.close()
