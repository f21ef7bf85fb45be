"""`dmaml ...` in a process of its own that starts at once: forked from a server that has the imports behind it.

All that `python -m dmaml_pl ...` does is done, in a real process with its own folder, environment, output and exit
code; only the seconds in which Python loads PyTorch, Lightning and MLflow are saved, by every worker that it starts,
too. PyTorch begins with one thread. What is about the start itself (which modules are loaded, what a launcher or an
option of the interpreter does, a line that an import prints) must start Python: see `tests.trainings.dmaml`.
"""

from __future__ import annotations

import atexit
import fcntl
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

CORES = 8
"""Spares cost nothing here, so there is one for every worker, however few cores there are."""


def warm_up() -> None:
    """Let the server begin its imports; it is the one of `dmaml study`, which keeps it free of threads."""
    from dmaml_pl.studies.runner import Runner

    Runner().warm_up()


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
        warm_up()
        self.args = words
        outputs = Path(tempfile.mkdtemp(prefix="dmaml-test-"))
        self._files = [outputs / "stdout", outputs / "stderr"]
        for file in self._files:
            file.touch()
        self._said: tuple[str, str] | None = None
        context = multiprocessing.get_context("forkserver")
        arguments = (words, str(folder), environment, [str(file) for file in self._files], new_session)
        self._process = context.Process(target=_be_dmaml, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As of `subprocess.Popen`."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, if it still runs."""
        self._process.kill()

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
        self._process.join(timeout)
        ended = self.returncode is not None and all(_is_silent(file, deadline) for file in self._files)
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
    return subprocess.CompletedProcess(words, command.returncode, out, err)


# -- in the forked process -----------------------------------------------------------------------------------------


def _be_dmaml(words: list[str], folder: str, environment: dict[str, str], files: list[str], new_session: bool) -> None:
    if new_session:
        os.setsid()
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = ["dmaml", *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    outputs = [os.open(file, os.O_WRONLY | os.O_APPEND) for file in files]
    for output in outputs:
        fcntl.flock(output, fcntl.LOCK_EX)  # by all that inherit it, until the last of them has ended
    _connect(os.open(os.devnull, os.O_RDONLY), *outputs)
    _surround(environment)

    from dmaml_pl.launching import prestarted

    vars(prestarted)["subprocess"] = SimpleNamespace(Popen=_Spare, PIPE=subprocess.PIPE)
    os.cpu_count = lambda: CORES
    _live(lambda: runpy.run_module("dmaml_pl", run_name="__main__", alter_sys=True))


def _connect(*handles: int) -> None:
    """Take other files for standard input, output and error."""
    sys.stdout.flush()
    sys.stderr.flush()
    for number, handle in enumerate(handles):
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the server's is closed


def _surround(environment: dict[str, str]) -> None:
    """Give this process an environment, and what Lightning reads in it when it is imported."""
    from lightning_fabric.utilities.rank_zero import _get_rank, rank_zero_only

    os.environ.clear()
    os.environ.update(environment)
    vars(rank_zero_only)["rank"] = _get_rank() or 0


def _live(program: Callable[[], object]) -> NoReturn:
    """Run a program, and end this process as an interpreter would end."""
    code = 0
    try:
        program()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class _Spare:
    """The part of `subprocess.Popen` that spares and the launcher use, for a spare that is forked.

    The command line starts its spares before it does anything else, when it has one thread and has computed nothing.
    """

    def __init__(self, command: list[str], env: dict[str, str], stdin: int) -> None:
        assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads cannot be forked"
        assert stdin == subprocess.PIPE
        reader, writer = os.pipe()
        self.stdin = open(writer, "wb")  # noqa: PTH123, SIM115 - closed by whoever gives orders
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            os.close(writer)
            _be_a_spare(command[command.index("-c") + 2 :], env, reader)
        os.close(reader)

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        return self._wait(0)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, options)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _be_a_spare(words: list[str], environment: dict[str, str], reader: int) -> NoReturn:
    from dmaml_pl.launching import prestarted

    sys.argv = ["-c", *words]
    _connect(reader)
    _surround(environment)
    _live(lambda: sys.exit(prestarted.stand_by()))
