"""What logging costs a training: the same one with MLflow and without, in turn.

    python -m benchmarks.logging_cost --config configs/sinusoid.yaml --pairs 4

Prints, for each pair, the seconds of training with and without, which a busy machine stretches, and what it does not:
the seconds that worker 0 was on a core, in the former training, for the training itself, in the logger, and in the
logger's threads. These may run beside the training or take a core from it, so the last two as a share of the first are
the most that logging can have cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytorch_lightning as pl

METHODS = ("log_metrics", "save", "set_tags")
THREADS = ("MLflowSender", "SystemMetricsMonitor")


class Stopwatch(pl.Callback):
    """Writes how long the training took on worker 0, and how much of it went into the logger.

    Args:
        file: the JSON file.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.inside = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin."""
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                for name in METHODS:
                    setattr(logger, name, self._timed(getattr(logger, name)))
            self.threads_start = _cpu_seconds_of_threads()
            self.start, self.cpu_start = time.perf_counter(), time.thread_time()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End, before what is logged at the end of any training, such as checkpoints."""
        if trainer.is_global_zero:
            figures = {
                "seconds": time.perf_counter() - self.start,
                "training": time.thread_time() - self.cpu_start - self.inside,
                "inside": self.inside,
                "threads": _cpu_seconds_of_threads() - self.threads_start,
            }
            Path(self.file).write_text(json.dumps(figures))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return method(*args, **kwargs)
            start = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.inside += time.thread_time() - start

        return timed


def _cpu_seconds_of_threads() -> float:
    ours = {thread.native_id for thread in threading.enumerate() if thread.name in THREADS}
    return sum(thread.user_time + thread.system_time for thread in psutil.Process().threads() if thread.id in ours)


def train(config: str, words: list[str], *, logged: bool) -> dict[str, float]:
    """One training in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        callback = {"class_path": "benchmarks.logging_cost.Stopwatch", "init_args": {"file": str(file)}}
        command = [sys.executable, "-m", "dmaml_pl", "fit", "--config", config, "--meta_test", "false"]
        command += ["--checkpoint.dirpath", f"{folder}/kept", f"--trainer.callbacks=[{json.dumps(callback)}]"]
        command += ["--trainer.logger.save_dir", f"{folder}/mlruns"] if logged else ["--trainer.logger", "false"]
        subprocess.run([*command, *words], check=True, stderr=subprocess.DEVNULL)  # noqa: S603 (our own arguments)
        figures: dict[str, float] = json.loads(file.read_text())
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What logging costs a training.", allow_abbrev=False)
    parser.add_argument("--config", default="configs/sinusoid.yaml", help="of the training")
    parser.add_argument("--pairs", type=int, default=4, help="trainings with, and as many without")
    given, words = parser.parse_known_args()
    ratios, shares = [], []
    print("wall with, without (s)  ratio | on a core (s): training, logger, its threads | share at most")
    for _ in range(given.pairs):
        logged, bare = train(given.config, words, logged=True), train(given.config, words, logged=False)
        ratios.append(logged["seconds"] / bare["seconds"])
        shares.append((logged["inside"] + logged["threads"]) / logged["training"])
        print(
            f"{logged['seconds']:12.2f} {bare['seconds']:9.2f}  {ratios[-1]:5.3f} | {logged['training']:23.2f} "
            f"{logged['inside']:7.3f} {logged['threads']:12.3f} | {shares[-1]:13.2%}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.3f}, median share {statistics.median(shares):.2%}")


if __name__ == "__main__":
    main()
