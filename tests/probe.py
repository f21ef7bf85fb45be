"""A callback that disturbs a training at a chosen place; copied beside it, as a user's own class would be."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl


class Disturber(pl.Callback):
    """At one meta-iteration of one worker, sends a signal; only once in a folder.

    Args:
        at: worker, run (from 1) and meta-iteration (from 1).
        send: name of the signal, or none.
        to: "self", "main" (the process that started this one) or "all" (the process group).
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
        os.kill(os.getppid() if self.to == "main" else os.getpid(), self.number)


class RunLines(pl.Callback):
    """Writes a line for every merge, with the process that was told of it."""

    def on_run_end(self, trainer: Any, module: Any, report: Any) -> None:
        if trainer.is_global_zero:
            with Path("merges.txt").open("a") as file:
                file.write(f"{trainer.global_step}\n")
