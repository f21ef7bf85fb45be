"""A callback that disturbs a training at a chosen place; copied beside it, as a user's own class would be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytorch_lightning as pl


class Disturber(pl.Callback):
    """At one meta-iteration of one worker, sends a signal; only once in a folder.

    Args:
        at: worker, run (from 1) and meta-iteration (from 1).
        send: name of the signal, or none.
        to: "self", "main" (the process that had this one forked) or "all" (the process group).
        when_others_wait: first wait until worker 0 has made the last meta-iteration of that run.
    """

    def __init__(self, at: list[int], send: str, to: str = "self", when_others_wait: bool = False) -> None:
        self.at = tuple(at)
        self.number = signal.Signals[send]
        self.to = to
        self.when_others_wait = when_others_wait

    def on_meta_iteration_end(self, trainer: Any, module: Any, done: int, length: int, loss: float) -> None:
        run = module.runs_done + 1
        if trainer.global_rank == 0 and run == self.at[1] and done == length:
            Path("worker-0-waits").touch()
        if (trainer.global_rank, run, done) != self.at or Path("disturbed").exists():
            return
        Path("disturbed").touch()
        while self.when_others_wait and not Path("worker-0-waits").exists():
            time.sleep(0.01)
        if self.to == "all":
            os.killpg(0, self.number)
        main = psutil.Process(os.getppid()).ppid()  # this one's parent is the server that has forked it
        os.kill(main if self.to == "main" else os.getpid(), self.number)
        deadline = time.monotonic() + 60
        while self.to == "main" and trainer.strategy._asked_to_stop is None and time.monotonic() < deadline:
            time.sleep(0.01)  # a meta-iteration that takes as long as the signal to come back


class Early(pl.Callback):
    """Sends SIGTERM to its own process after the MLflow run is open, and before anything is trained."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class Traffic(pl.Callback):
    """Writes what has crossed a network interface, and when: after every meta-iteration and every merge."""

    def __init__(self, interface: str) -> None:
        self.interface = interface

    def on_meta_iteration_end(self, trainer: Any, module: Any, done: int, length: int, loss: float) -> None:
        self._write(trainer, run=module.runs_done, done=done)

    def on_run_end(self, trainer: Any, module: Any, report: Any) -> None:
        self._write(trainer, run=module.runs_done - 1, payload=report["merge"]["merge/bytes"])

    def _write(self, trainer: Any, **place: float) -> None:
        (line,) = [line for line in Path("/proc/self/net/dev").read_text().splitlines() if self.interface in line]
        counts = [int(count) for count in line.split(":")[1].split()]
        with Path(f"traffic-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(place | {"time": time.monotonic(), "bytes": counts[0] + counts[8]}) + "\n")


class Cutter(pl.Callback):
    """Takes the network away from one worker's machine, at a meta-iteration of a run (both from 1)."""

    def __init__(self, worker: int, run: int, iteration: int, interface: str) -> None:
        self.place = (worker, run, iteration)
        self.interface = interface

    def on_meta_iteration_end(self, trainer: Any, module: Any, done: int, length: int, loss: float) -> None:
        if (trainer.global_rank, module.runs_done + 1, done) == self.place:
            subprocess.run(["ip", "link", "set", self.interface, "down"], check=True)  # noqa: S607
