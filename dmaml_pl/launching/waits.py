"""Telling of a wait while it lasts."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
