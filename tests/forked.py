"""`dmaml ...` in a process of its own that starts at once: forked from a server that has the imports behind it.

All that `python -m dmaml_pl ...` does is done, in a real process with its own folder, environment, output and exit
code; only the seconds in which Python loads PyTorch, Lightning and MLflow are saved. PyTorch begins with one thread.
What is about the start itself (which modules are loaded, what a launcher or an option of the interpreter does, a line
that an import prints) must start Python: see `tests.trainings.dmaml`.
"""

from __future__ import annotations

import fcntl
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest

from dmaml_pl import _learn2learn
from dmaml_pl.studies.local import server


class Command:
    """A command line that runs, with the part of `subprocess.Popen` that tests use.

    Args:
        words: those after `dmaml`.
        folder: where it runs.
        environment: all of its environment.
        new_session: whether it leads a process group of its own.
    """

    def __init__(
        self, words: list[str], folder: Path, environment: dict[str, str], *, new_session: bool = False
    ) -> None:
        self.args = words
        outputs = Path(tempfile.mkdtemp(prefix="dmaml-test-"))
        self._files = [outputs / "stdout", outputs / "stderr"]
        for file in self._files:
            file.touch()
        self._said: tuple[str, str] | None = None
        self._process = server().fork(environment, partial(_be_dmaml, words, folder, self._files, new_session))
        self.pid = self._process.pid
        self.poll = self._process.poll
        self.send_signal = self._process.send_signal
        self.kill = self._process.kill

    @property
    def returncode(self) -> int | None:
        """As of `subprocess.Popen`."""
        return self.poll()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end, also of what it started and what still speaks, as for the end of a pipe.

        Returns:
            Standard output and standard error.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        if self._said is not None:
            return self._said
        deadline = time.monotonic() + (3600 if timeout is None else timeout)
        code = self._process.wait(timeout)
        ended = code is not None and all(_is_silent(file, deadline) for file in self._files)
        out, err = (file.read_text() for file in self._files)
        if not ended:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0, out, err)
        shutil.rmtree(self._files[0].parent)
        self._said = out, err
        return self._said


def _is_silent(file: Path, deadline: float) -> bool:
    """Wait until no process can write to a file that is locked by its writers; False if they do not end in time."""
    with file.open() as reader:
        while True:
            try:
                fcntl.flock(reader, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.02)
            else:
                return True


def run(
    words: list[str], folder: Path, environment: dict[str, str], timeout: float, *, new_session: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end, as `subprocess.run` would; see `Command`."""
    command = Command(words, folder, environment, new_session=new_session)
    try:
        out, err = command.communicate(timeout)
    finally:
        command.kill()
    assert command.returncode is not None
    if _learn2learn.MISSING in err:
        pytest.skip(_learn2learn.MISSING)
    return subprocess.CompletedProcess(words, command.returncode, out, err)


def _be_dmaml(words: list[str], folder: Path, files: list[Path], new_session: bool) -> None:
    """What the forked process does."""
    if new_session:
        os.setsid()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["dmaml", *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in ((1, files[0]), (2, files[1])):
        output = os.open(file, os.O_WRONLY | os.O_APPEND)
        fcntl.flock(output, fcntl.LOCK_EX)  # by all that inherit it, until the last of them has ended
        os.dup2(output, number)
        os.close(output)
    runpy.run_module("dmaml_pl", run_name="__main__", alter_sys=True)
