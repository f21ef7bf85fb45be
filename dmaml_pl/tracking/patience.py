"""Talking to MLflow with short patience and without its chatter."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

REQUEST_TIMEOUT_S = 6  # asked twice, a silent server is given up after 12 s
UPLOAD_TIMEOUT_S = 60  # a server may take its time to store a large file before it answers

# MLflow tells of the tables it makes, of models it checks, and of each error with a traceback; urllib3 of each retry.
_CHATTER = {
    "mlflow.store.db.utils": logging.CRITICAL + 1,
    "mlflow.pyfunc": logging.WARNING,
    "urllib3.connectionpool": logging.ERROR,
}

_BOUNDS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": lambda: max(_timeouts),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": lambda: 1,
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": lambda: False,
    # At the end of an MLflow run its client prints where to see it: an address with a user's password.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": lambda: True,
}

_mutex = threading.Lock()
_timeouts: list[int] = []  # of the blocks that threads are in
_undo = ExitStack()  # what was there before the first of them


def disable_telemetry() -> None:
    """To be called before MLflow is imported.

    It would report usage over the network, from threads that the end of the process waits for; a person who wants that
    says MLFLOW_DISABLE_TELEMETRY=false.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@contextmanager
def brief_requests(timeout_s: int | None = None) -> Iterator[None]:
    """Bound the time that the requests of a block take; what goes wrong is raised, so it is not logged as well.

    MLflow reads its patience from the environment at every request. It is told another one for the time of the block
    only, or of all blocks that threads are in at the time, and the environment is left alone: C libraries read that in
    the thread that trains, and a write in another one while they do ends the process (glibc's getenv takes no lock).

    Args:
        timeout_s: seconds to wait for an answer, by default 6; it is asked for once again after that.
    """
    disable_telemetry()
    from mlflow import environment_variables  # noqa: PLC0415 (slow import)

    timeout = timeout_s or REQUEST_TIMEOUT_S
    with _mutex:
        _timeouts.append(timeout)
        if len(_timeouts) == 1:
            for name, level in _CHATTER.items():
                logger = logging.getLogger(name)
                _undo.callback(logger.setLevel, logger.level)
                logger.setLevel(level)
            for name, bound in _BOUNDS.items():
                variable: Any = getattr(environment_variables, name)
                _undo.callback(delattr, variable, "get")
                variable.get = bound
    try:
        yield
    finally:
        with _mutex:
            _timeouts.remove(timeout)
            if not _timeouts:
                _undo.close()
