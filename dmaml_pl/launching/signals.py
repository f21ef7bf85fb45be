"""Signals that end a command."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def raised_at(error: type[BaseException], *numbers: signal.Signals) -> Iterator[None]:
    """Let each of these signals raise an error where nobody else answers it; a second one does not break that off.

    A Trainer that takes over calls the handler that it finds, too, which then leaves the answer to it.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        if signal.getsignal(number) is end:
            for each in numbers:
                signal.signal(each, signal.SIG_IGN)
            raise error

    if threading.current_thread() is not threading.main_thread():  # who alone may answer signals
        yield
        return
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
