"""Signals that end a command."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupted_by(*numbers: signal.Signals) -> Iterator[None]:
    """Let each of these signals end what is under way as Ctrl-C does; a second one does not break off its end."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def raised_at_sigterm(error: type[BaseException]) -> Iterator[None]:
    """Let SIGTERM raise an error wherever nobody else answers it, as before and after the work of a Trainer.

    A Trainer that takes over calls the handler that it finds, too, which then leaves the answer to it.

    Args:
        error: what is raised.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        if signal.getsignal(number) is end:
            raise error

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
