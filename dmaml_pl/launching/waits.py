"""Telling of a wait while it lasts."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONG_S = 5.0 if sys.stderr and sys.stderr.isatty() else 60.0
"""After so long a person at a terminal wants to know what lasts; a log is to hold only what does last."""


@contextmanager
def told_after(seconds: float, tell: Callable[[], object]) -> Iterator[None]:
    """Call `tell` once, in a thread of its own, where a block takes longer than so many seconds."""
    timer = threading.Timer(seconds, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # workers may be forked next, which no thread survives
