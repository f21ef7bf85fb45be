"""Starts the other workers on this machine, and notices when one has died.

Lightning's own observer answers the death of a child by killing the main process with SIGKILL, which leaves no message,
no final status in the tracking store, and no exit code of ours. Here the main process is told instead, and ends itself.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

POLL_SECONDS = 0.5


class WorkerLauncher(_SubprocessScriptLauncher):
    """Runs the same command again for every other worker, and watches over the processes.

    Attributes:
        lost: what became of the first worker that ended before its time; None while all is well.
    """

    def __init__(self, cluster_environment: ClusterEnvironment, num_processes: int, num_nodes: int) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self.lost: str | None = None
        self._done = threading.Event()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the workers that nobody else starts (torchrun does), then call `function` here as worker 0."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally and not self.procs:
            self._call_children_scripts()
            threading.Thread(target=self._watch, daemon=True, name="worker-watch").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def stop_workers(self) -> None:
        """Kill the workers that this process started; whatever is worth keeping is kept by worker 0."""
        self._done.set()
        for process in self.procs:
            process.kill()

    def _watch(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            for rank, process in enumerate(self.procs, start=1):
                code = process.poll()
                if code:
                    self.lost = f"worker {rank} (process {process.pid}) {_fate(code)}"
                    return


def _fate(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
