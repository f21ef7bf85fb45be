"""Starts the other workers on this machine, and notices when one has died.

Lightning's own observer answers the death of a child by killing the main process with SIGKILL, which leaves no message,
no final status in the tracking store, and no exit code of ours. Here the main process is told instead, and ends itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from dmaml_pl.launching import server

POLL_SECONDS = 0.5
READY = "DMAML_READY"
"""Environment variable with the file by which a worker says that it is ready to meet the others."""


class WorkerLauncher(_SubprocessScriptLauncher):
    """Forks the other workers from this process's server, or else runs its command again for each; watches over them.

    Attributes:
        lost: what became of the workers that ended before their time, the first one first.
    """

    def __init__(self, cluster_environment: ClusterEnvironment, num_processes: int, num_nodes: int) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self.procs: list[Any] = []  # of Lightning's or forked ones, which have the same methods
        self.lost: list[str] = []
        self._told: set[int] = set()
        self._ready: TemporaryDirectory[str] | None = None
        self._done = threading.Event()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the workers that nobody else starts (torchrun does), then call `function` here as worker 0."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally and not self.procs:
            self._call_children_scripts()
            threading.Thread(target=self._watch, daemon=True, name="worker-watch").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _call_children_scripts(self) -> None:
        """Lightning's, with workers forked where that can be."""
        self._check_can_spawn_children()
        environment = self.cluster_environment
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        os.environ["NODE_RANK"] = str(environment.node_rank())
        os.environ["LOCAL_RANK"] = str(environment.local_rank())
        os.environ["WORLD_SIZE"] = str(self.num_processes * self.num_nodes)
        self._ready = TemporaryDirectory(prefix="dmaml-")
        forking = server.own()
        if forking and self.num_processes == 1:
            forking.close()
        for rank in range(1, self.num_processes):
            own = {**os.environ, "LOCAL_RANK": str(rank), READY: str(Path(self._ready.name, str(rank)))}
            again = forking.fork(own) if forking else subprocess.Popen(_basic_subprocess_cmd(), env=own)  # noqa: S603 - this
            self.procs.append(again)

    def await_workers(self, check: Callable[[], None]) -> None:
        """Wait until the workers that this process started are ready to meet, as a dead one would never come.

        PyTorch's rendezvous cannot be interrupted before its own timeout, neither by a signal nor by a thread.

        Args:
            check: raises an error if a worker is lost.
        """
        if READY in os.environ:
            with suppress(FileNotFoundError):  # at the meta-test after a training they meet again, without the folder
                Path(os.environ[READY]).touch()
        if self._ready is not None:
            while len(list(Path(self._ready.name).iterdir())) < len(self.procs):
                check()
                time.sleep(POLL_SECONDS / 10)
            self._ready.cleanup()
            self._ready = None

    def stop_workers(self) -> None:
        """Kill the workers that this process started; whatever is worth keeping is kept by worker 0."""
        self._done.set()
        for process in self.procs:
            process.kill()

    def is_alive(self, worker: int) -> bool:
        """Whether the process of a worker still runs; worker 0 is this one."""
        return worker == 0 or self.procs[worker - 1].poll() is None

    def end_worker(self, worker: int) -> None:
        """Kill a worker that did not come in time."""
        self.procs[worker - 1].kill()
        self.procs[worker - 1].wait()

    def _watch(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            self.look()

    def look(self) -> None:
        """Notice workers that have ended before their time."""
        for rank, process in enumerate(self.procs, start=1):
            code = process.poll()
            if code and rank not in self._told and not self._done.is_set():
                self._told.add(rank)
                self.lost.append(f"worker {rank} (process {process.pid}) {_fate(code)}")


def started_by_us() -> bool:
    """Whether a `WorkerLauncher` has started this process."""
    return READY in os.environ


def _fate(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
