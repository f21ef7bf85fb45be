"""Forks processes from one that has its imports behind it, so that each of them starts at once.

Importing PyTorch, Lightning and MLflow takes longer than a short training. A server does it once, and waits; for every
order it forks a process, which inherits what the server has loaded. A server comes to be in two ways: `stand_by` forks
it from the process that calls, and workers go on from there; `started` starts Python anew, for a process that has
threads, or that is not to hand down what it has done.

What is forked must have used neither several threads (PyTorch's would be waited for and never come) nor a GPU. A server
only waits, and so has not. When the process that gives it orders dies, it ends what it has forked.
"""

from __future__ import annotations

import atexit
import gc
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing import reduction
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn

from dmaml_pl.launching.leaving import leave

PATIENCE_S = 20.0
"""Seconds that processes have to end in good order after the one that had them forked has died."""

ROLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")
"""The variables by which torchrun, SLURM, Kubernetes and Lightning tell the workers of a training who they are."""

_THREADS = Path("/proc/self/task")

_own: list[Server] = []
"""The server that was forked from this process, if there is one."""


class Forked:
    """A process that a server has forked, with the part of `subprocess.Popen` that is needed of it.

    Attributes:
        sentinel: readable when the process has ended, for `multiprocessing.connection.wait`.
    """

    def __init__(self, status: Connection) -> None:
        self.sentinel = status
        self._lock = threading.Lock()
        self.pid: int = status.recv()
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end at most so many seconds; returns the exit code, None if the process still runs."""
        if self._lock.acquire(blocking=timeout != 0):  # a signal handler cannot wait for what it has interrupted
            try:
                if self.returncode is None and self.sentinel.poll(timeout):
                    self.returncode = self.sentinel.recv()
            except EOFError:  # the server was killed, and nobody else knows
                self.returncode = -signal.SIGKILL
            finally:
                self._lock.release()
        return self.returncode

    def poll(self) -> int | None:
        """The exit code; None if the process still runs."""
        return self.wait(0)

    def send_signal(self, number: int) -> None:
        """Send a signal, if the process still runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process."""
        self.send_signal(signal.SIGKILL)


class Server:
    """The side of whoever has processes forked.

    Args:
        control: where orders go.
        pid: of the server.
    """

    def __init__(self, control: Connection, pid: int) -> None:
        self._control = control
        self._pid = pid

    def fork(self, environment: dict[str, str], call: Callable[[], object] | None = None) -> Forked:
        """Fork a process in the folder in which this one is.

        Args:
            environment: all of its environment.
            call: what it does, a picklable function that returns what `sys.exit` takes; None where it goes on from
                `stand_by`.
        """
        status, told = Pipe(duplex=False)
        # The call is unpickled by the forked process alone: the server must load nothing that is not for all.
        self._control.send((environment, str(Path.cwd()), pickle.dumps(call)))
        with told:
            reduction.send_handle(self._control, told.fileno(), self._pid)
        return Forked(status)

    def close(self) -> None:
        """End the server, which leaves the processes that it has forked to themselves."""
        atexit.unregister(self.close)
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


@cache
def started(prepare: Callable[[], object]) -> Server:
    """Start a server in a Python of its own, once for this process; returns before the server is ready.

    Args:
        prepare: what it calls first, to import what the processes will need.
    """
    mine, theirs = Pipe()
    os.set_inheritable(theirs.fileno(), True)
    # Libraries read the number of threads when they are loaded.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "dmaml_pl.launching.server", str(theirs.fileno()), sys.argv[0]]
    with theirs:
        pid = os.posix_spawn(sys.executable, command, environment)
    mine.send(prepare)
    return Server(mine, pid)


def stand_by() -> None:
    """Fork a server that keeps this process as it is now; whatever it forks for `own` returns from here, too.

    Does nothing where that is not safe, or in a process that somebody else has started as a worker.
    """
    launched = any(name in os.environ for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "WORLD_SIZE"))
    torch = sys.modules.get("torch")
    if launched or not _THREADS.is_dir() or (torch is not None and torch.cuda.is_initialized()):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    mine, theirs = Pipe()
    pid = os.fork()
    if not pid:
        mine.close()
        _serve(theirs)
        return
    theirs.close()
    server = Server(mine, pid)
    # OpenBLAS ends its threads for a fork. Others, as of a user's module, are missing in the server, and may be waited
    # for there.
    if len(list(_THREADS.iterdir())) > 1:
        server.close()
    else:
        atexit.register(server.close)
        _own[:] = [server]


def own() -> Server | None:
    """The server that `stand_by` has forked from this process; None if there is none."""
    return _own[0] if _own else None


def _serve(control: Connection) -> Any:
    """Fork a process for every order, and return there what it is to call; never returns in the server itself."""
    gc.freeze()  # else each collection in a forked process goes through all that is loaded, and copies its pages
    children: dict[int, Connection] = {}

    def reap(*_: object) -> None:
        for pid in list(children):
            with suppress(ChildProcessError):  # a signal has come in the midst of this
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    with suppress(OSError), children.pop(pid) as told:
                        told.send(os.waitstatus_to_exitcode(status))

    # A signal to the whole group is for the others: this process ends after the one that gives the orders. What is
    # forked must miss none, from its first moment.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    before = signal.signal(signal.SIGCHLD, reap)
    pid = -1
    while pid:
        try:
            environment, folder, call = control.recv()
            told = Connection(reduction.recv_handle(control), readable=False)
        except (EOFError, OSError):
            _end(children, reap)
        pid = os.fork()
        if pid:
            with suppress(OSError):
                told.send(pid)
            children[pid] = told
            reap()
    signal.signal(signal.SIGCHLD, before)
    for connection in (control, told, *children.values()):
        connection.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if "lightning_fabric" in sys.modules:  # it has read the rank when it was imported
        from lightning_fabric.utilities.rank_zero import _get_rank, rank_zero_only  # noqa: PLC0415 - if it is loaded

        vars(rank_zero_only)["rank"] = _get_rank() or 0
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pickle.loads(call)  # noqa: S301 - from the process that has started this one


def _end(children: dict[int, Connection], reap: Callable[[], None]) -> NoReturn:
    """Whoever gave orders has died: end what it cannot end any more, and this process."""
    deadline = time.monotonic() + PATIENCE_S
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in list(children):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        while children and time.monotonic() < deadline:
            time.sleep(0.05)
            reap()
    os._exit(0)


def main() -> None:
    """Be a server in a Python of its own, and every process that it forks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that gives orders
    control: Connection = Connection(int(sys.argv[1]))
    del sys.argv[:2]  # the rest is the name of the program, by which a user is told how to go on
    control.recv()()
    leave(_serve(control))


if __name__ == "__main__":
    main()
