"""Starts the other workers on this machine, and notices when one has died.

A command's workers are forked by its server (`server.py`), or run the command again. In a notebook, and from
`dmaml_pl.fit`, they are forked here, make what the Trainer was asked for together with this process, and end.

Lightning's own observer answers the death of a child by killing the main process with SIGKILL, which leaves no message,
no final status in the tracking store, and no exit code of ours. Here the main process is told instead, and ends itself.
"""

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import ForkProcess
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from lightning_fabric.utilities.imports import _IS_INTERACTIVE
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from pytorch_lightning.trainer.call import _call_and_handle_interrupt
from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from dmaml_pl.errors import ConfigError, DmamlError, NonFiniteError, WorkerLostError
from dmaml_pl.launching import server

POLL_SECONDS = 0.5
END_SECONDS = 20.0
"""A forked worker that has nothing left to do is waited for so long."""


class ForkedHere(ForkProcess):
    """A worker forked from this process, with the part of `subprocess.Popen` that is needed of it."""

    def poll(self) -> int | None:
        """The exit code; None if the process still runs."""
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end at most so many seconds; returns as `poll`."""
        self.join(timeout)
        return self.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, if the process still runs."""
        if self.pid is not None and self.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)


class WorkerLauncher(_SubprocessScriptLauncher):
    """Forks the other workers from this process's server, or else runs its command again for each; watches over them.

    Args:
        cluster_environment: tells who is who.
        num_processes: workers on this machine.
        num_nodes: machines.
        forks: whether workers are forked here, for each thing that the Trainer is asked for; by default in notebooks.

    Attributes:
        lost: what became of the workers that ended before their time, the first one first.
    """

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int,
        forks: bool | None = None,
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self.forks = _IS_INTERACTIVE if forks is None else forks
        self.procs: list[Any] = []  # of Lightning's or forked ones, which have the same methods
        self.lost: list[str] = []
        self._told: set[int] = set()
        self._done = threading.Event()

    @property
    def is_interactive_compatible(self) -> bool:
        """Whether notebooks can use it; Lightning asks."""
        return self.forks

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the workers that nobody else starts (torchrun does), then call `function` here as worker 0.

        Raises:
            ConfigError: workers cannot be forked any more, as this process has used a GPU.
        """
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if self.forks and not self.cluster_environment.creates_processes_externally:
            call = partial(function, *args, **kwargs)
            return self._among_forked(call if trainer is None else partial(_call_and_handle_interrupt, trainer, call))
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=self._watch, args=(self._done,), daemon=True, name="worker-watch").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _call_children_scripts(self) -> None:
        """Lightning's, with workers forked where that can be."""
        forking = server.own()
        if forking is None:
            super()._call_children_scripts()
            return
        self._tell_who_is_who()
        self.procs = [forking.fork(os.environ | {"LOCAL_RANK": str(rank)}) for rank in range(1, self.num_processes)]
        if not self.procs:
            forking.close()

    def _tell_who_is_who(self) -> None:
        environment = self.cluster_environment
        told = {
            "MASTER_ADDR": environment.main_address,
            "MASTER_PORT": environment.main_port,
            "NODE_RANK": environment.node_rank(),
            "LOCAL_RANK": environment.local_rank(),
            "WORLD_SIZE": self.num_processes * self.num_nodes,
        }
        os.environ.update({name: str(value) for name, value in told.items()})

    def _among_forked(self, call: Callable[[], Any]) -> Any:
        """Make a call together with workers that are forked for it, and leave this process as it was."""
        if self.num_processes > 1 and torch.cuda.is_initialized():
            raise ConfigError(
                f"trainer.devices is {self.num_processes}, but this process has used a GPU, after which no worker can "
                "be forked from it: restart it (in a notebook, its kernel) and train before anything else uses a GPU, "
                "or set trainer.devices to 1."
            )
        self.lost, self._told, self._done = [], set(), threading.Event()
        with self._as_it_was():
            self._tell_who_is_who()
            self.procs = [ForkedHere(target=_be_worker, args=(rank, call)) for rank in range(1, self.num_processes)]
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", ".*use of fork", DeprecationWarning
                )  # of threads, for which see below
                for process in self.procs:
                    process.start()
            threading.Thread(target=self._watch, args=(self._done,), daemon=True, name="worker-watch").start()
            _set_num_threads_if_needed(num_processes=self.num_processes)
            try:
                result = call()
                for process in self.procs:
                    process.wait(END_SECONDS)
                return result
            finally:
                self.stop_workers()

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Put back what a training changes of its process: a notebook goes on, perhaps with another training."""
        environment, threads, hook = dict(os.environ), torch.get_num_threads(), sys.excepthook
        here = threading.current_thread() is threading.main_thread()  # who alone may answer signals
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if here else ()
        handlers = {number: signal.getsignal(number) for number in numbers}
        try:
            yield
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            self.cluster_environment.set_world_size(1)  # the others are gone, and nothing waits for them
            os.environ.clear()
            os.environ.update(environment)
            torch.set_num_threads(threads)
            sys.excepthook = hook  # PyTorch's writes the rank before each line of a traceback, once for each group
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def stop_workers(self) -> None:
        """Kill the workers that this process started; whatever is worth keeping is kept by worker 0."""
        self._done.set()
        self.kill(signal.SIGKILL)

    def _watch(self, done: threading.Event) -> None:
        while any(process.poll() is None for process in self.procs) and not done.wait(POLL_SECONDS):
            self.look()
        self.look()

    def look(self) -> None:
        """Notice workers that have ended before their time."""
        for rank, process in enumerate(self.procs, start=1):
            code = process.poll()
            if code and rank not in self._told and not self._done.is_set():
                self._told.add(rank)
                fate = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                self.lost.append(f"worker {rank} (process {process.pid}) {fate}")


def _be_worker(rank: int, call: Callable[[], Any]) -> None:
    """What a forked worker does; it ends with this, whatever the process that it was forked from goes on with."""
    os.environ["LOCAL_RANK"] = str(rank)
    vars(rank_zero_only)["rank"] = rank
    # OpenMP's threads are not forked, and would be waited for.
    torch.set_num_threads(1)
    try:
        call()
    except (NonFiniteError, WorkerLostError, KeyboardInterrupt, SIGTERMException):
        sys.exit(1)  # worker 0 tells of it
    except DmamlError as error:
        sys.exit(f"dmaml: error: worker {rank}: {error}")
