"""A command in a terminal of its own, with a real Ctrl-C, for tests."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

from tests.trainings import environment

CTRL_C = b"\x03"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

# So that Ctrl-C reaches all its processes, also where the tests run in the background of a script, which ignores it.
_TAKE_TERMINAL = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, '-m', 'dmaml_pl', *sys.argv[1:]])"
)


class Terminal:
    """`dmaml ...` as a user starts it: what it shows, and what is typed while it runs."""

    def __init__(self, folder: Path, *words: str, columns: int = 160) -> None:
        self.screen, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        clean = {name: value for name, value in environment().items() if name not in ("COLUMNS", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *words],
            cwd=folder,
            env=clean | {"TERM": "xterm"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._seen = b""

    @property
    def text(self) -> str:
        """Everything that was shown so far, without colours and movements."""
        return _CONTROL.sub("", self._seen.decode(errors="replace")).replace("\r\n", "\n")

    def read(self, seconds: float = 0.2) -> bool:
        """Read what comes within some time; False at the end."""
        if select.select([self.screen], [], [], seconds)[0]:
            try:
                read = os.read(self.screen, 65536)
            except OSError:  # Linux's way to say that nobody is at the other end
                return False
            self._seen += read
            return bool(read)
        return True

    def wait_until(self, there: Callable[[str], object], seconds: float = 120) -> None:
        """Read on until something is shown."""
        deadline = time.monotonic() + seconds
        while not there(self.text):
            assert self.read() or there(self.text), self.text
            assert time.monotonic() < deadline, self.text

    def type(self, keys: bytes) -> None:
        """Type."""
        os.write(self.screen, keys)

    def end(self, seconds: float = 60) -> int:
        """Read to the end; returns the exit code."""
        deadline = time.monotonic() + seconds
        while self.read():
            assert time.monotonic() < deadline, self.text
        return self.process.wait(30)

    def hang_up(self, seconds: float = 60) -> int:
        """Close the terminal; returns the exit code of what runs in it."""
        os.close(self.screen)
        self.screen = -1
        return self.process.wait(seconds)

    def close(self) -> None:
        """End what is still running."""
        self.process.kill()
        self.process.wait(30)
        if self.screen >= 0:
            os.close(self.screen)
