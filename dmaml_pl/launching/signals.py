"""Signals that end a command."""

import errno
import os
import signal
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def raised_at(error: type[BaseException], *numbers: signal.Signals) -> Iterator[None]:
    """Let each of these signals raise an error where nobody else answers it; a second one does not break that off.

    SIGHUP (a closed terminal) that is ignored stays so, as nohup wants it.

    A Trainer that takes over calls the handler that it finds, too, which then leaves the answer to it.
    """
    heard = [number for number in numbers if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]

    def end(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            forget_terminal()
        if signal.getsignal(number) is end:
            for each in heard:
                signal.signal(each, signal.SIG_IGN)
            raise error

    if threading.current_thread() is not threading.main_thread():  # who alone may answer signals
        yield
        return
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def forget_terminal() -> None:
    """Write to nowhere what would go to a terminal that was closed, where every write fails."""
    for stream in (1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)
