"""Starts the other workers on this machine, and notices when one has died.

Lightning's own observer answers the death of a child by killing the main process with SIGKILL, which leaves no message,
no final status in the tracking store, and no exit code of ours. Here the main process is told instead, and ends itself.
"""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from dmaml_pl.launching import server

POLL_SECONDS = 0.5


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
        self._done = threading.Event()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the workers that nobody else starts (torchrun does), then call `function` here as worker 0."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=self._watch, daemon=True, name="worker-watch").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _call_children_scripts(self) -> None:
        """Lightning's, with workers forked where that can be."""
        forking = server.own()
        if forking is None:
            super()._call_children_scripts()
            return
        environment = self.cluster_environment
        told = {
            "MASTER_ADDR": environment.main_address,
            "MASTER_PORT": environment.main_port,
            "NODE_RANK": environment.node_rank(),
            "LOCAL_RANK": environment.local_rank(),
            "WORLD_SIZE": self.num_processes * self.num_nodes,
        }
        os.environ.update({name: str(value) for name, value in told.items()})
        self.procs = [forking.fork(os.environ | {"LOCAL_RANK": str(rank)}) for rank in range(1, self.num_processes)]
        if not self.procs:
            forking.close()

    def stop_workers(self) -> None:
        """Kill the workers that this process started; whatever is worth keeping is kept by worker 0."""
        self._done.set()
        self.kill(signal.SIGKILL)

    def is_alive(self, worker: int) -> bool:
        """Whether the process of a worker still runs; worker 0 is this one."""
        return worker == 0 or self.procs[worker - 1].poll() is None

    def end_worker(self, worker: int) -> None:
        """Kill a worker that did not come in time."""
        self.procs[worker - 1].kill()
        self.procs[worker - 1].wait()

    def _watch(self) -> None:
        while any(process.poll() is None for process in self.procs) and not self._done.wait(POLL_SECONDS):
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
