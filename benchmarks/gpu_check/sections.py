"""Sections, each in a process of its own: what crashes, hangs or takes too long costs only itself.

They are forked from a process that has not touched the GPU, so that nothing is imported twice.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_utilities.core import rank_zero

Row = dict[str, Any]
Tell = Callable[[Row], None]


class Setting(NamedTuple):
    """What a section has to know.

    Attributes:
        device: "cuda" or "cpu".
        small: sizes are so small that a CPU is through in seconds; no figure of it says anything.
        ends: the time (`time.monotonic`) at which the section is cut off.
        omniglot: folder of Omniglot, for the training; without it pictures of letters take its place.
    """

    device: str
    small: bool
    ends: float
    omniglot: Path | None = None

    @property
    def left(self) -> float:
        """Seconds that the section still has."""
        return self.ends - time.monotonic()

    def wait(self) -> None:
        """Wait until the device has done all that it was asked to."""
        if self.device == "cuda":
            torch.cuda.synchronize()


Section = Callable[[Setting, Tell], None]


def run(section: Section, setting: Setting, log: Path) -> Iterator[Row]:
    """The rows of a section as they come, the last of them a failure if it failed or was cut off.

    Args:
        section: called with the setting and with what takes its rows.
        setting: for it.
        log: file to which all that it prints is added.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(section, setting, log, sender))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, setting.left)):
            yield receiver.recv()
        yield {"what": "all", "failed": "cut off by its budget of time"}
    except EOFError:
        process.join()
        if process.exitcode:
            yield {"what": "all", "failed": f"its process ended with {process.exitcode}, see {log.name}"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # with the processes that it has started
        process.join()


def attempt(tell: Tell, row: Row, measure: Callable[[], Row]) -> None:
    """Tell a row, or why there is none; the others go on. What was to be compiled and was not has failed, too."""
    notices = _Notices()
    rank_zero.log.addHandler(notices)
    try:
        found = measure() | notices.failed
    except Exception as error:
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]}
    finally:
        rank_zero.log.removeHandler(notices)
    tell(row | found)


class _Notices(logging.Handler):
    """Hears that the compiler has failed, of which the engine makes no error, as it can do without."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: Row = {}

    def emit(self, record: logging.LogRecord) -> None:
        """One line of the product's."""
        if record.getMessage().startswith("model.compile has no effect"):
            self.failed = {"failed": record.getMessage()[:200]}


def _work(section: Section, setting: Setting, log: Path, sender: Connection) -> None:
    os.setpgid(0, 0)
    if setting.small:
        torch.set_num_threads(1)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    try:
        section(setting, sender.send)
    except BaseException as error:
        traceback.print_exc()
        sender.send({"what": "all", "failed": f"{type(error).__name__}: {error}"[:200]})
