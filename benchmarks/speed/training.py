"""The training loop of `dmaml fit` beside bare compiled meta-steps, which the same process makes between its runs.

Legend: H meta-iterations of a run.
"""

from __future__ import annotations

import copy
import json
import os
import pty
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from dmaml_pl.engines.threads import limited_threads

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "sinusoid.yaml"

RUN_LENGTH = 100
WARM_RUNS = 5
"""Runs that are not counted: compilers, caches and the first checkpoint."""

SETTINGS = {
    "trainer.devices": 1,
    "trainer.strategy.run_length": RUN_LENGTH,
    "trainer.val_check_interval": 50,  # runs
    "data.meta_batch": 25,
    "model.compile": "true",
    "model.meta_optimizer.init_args.fused": "true",
    "meta_test": "false",
}
"""What differs from the config: one worker, the paper's meta-batch, and validation every 5,000 meta-iterations."""


@dataclass(frozen=True)
class Loop:
    """What the training loop costs.

    Attributes:
        loop: seconds of each run: sampling, meta-steps, Lightning, logging, checkpoints, the bar, validation.
        bare: seconds of as many meta-steps on one meta-batch, made after each run.
    """

    loop: list[float]
    bare: list[float]

    @property
    def ratio(self) -> float:
        """How many times the bare meta-steps the loop takes."""
        return sum(self.loop) / sum(self.bare)

    @property
    def ratios(self) -> list[float]:
        """The same, run by run."""
        return [whole / alone for whole, alone in zip(self.loop, self.bare, strict=True)]

    def seconds_of(self, meta_iterations: int) -> float:
        """How long so many meta-iterations take."""
        return sum(self.loop) / len(self.loop) / RUN_LENGTH * meta_iterations


class BareSteps(pl.Callback):
    """Times each run of a training from outside, and after it as many bare meta-steps as it has made.

    Args:
        output: file to write the times to.
    """

    def __init__(self, output: str) -> None:
        self._output = Path(output)
        self._since = 0.0
        self._loop: list[float] = []
        self._bare: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Make a copy of what is trained, to make bare steps with."""
        self._learner = copy.deepcopy(pl_module.learner)
        self._optimizer = pl_module.meta_optimizer(self._learner.parameters())
        self._batch = trainer.datamodule.sample(worker=0, run=0, iteration=0)  # type: ignore[attr-defined]
        self._engine = pl_module.engine.for_training(self._learner, self._batch)
        self._step()
        self._since = time.perf_counter()

    def on_run_end(self, trainer: pl.Trainer, pl_module: Any, report: Any) -> None:
        """Between two runs."""
        began = time.perf_counter()
        with limited_threads(self._engine.threads(self._learner, self._batch)):  # as in the loop
            for _ in range(RUN_LENGTH):
                self._step()
        ended = time.perf_counter()
        self._loop.append(began - self._since)
        self._bare.append(ended - began)
        self._since = time.perf_counter()

    def _step(self) -> None:
        self._optimizer.zero_grad()
        self._engine.meta_gradient(self._learner, self._batch)
        self._optimizer.step()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write down what was seen."""
        self._output.write_text(json.dumps({"loop": self._loop[WARM_RUNS:], "bare": self._bare[WARM_RUNS:]}))


def measure(runs: int) -> Loop:
    """Train sinusoid on a terminal of its own, so that the bar is drawn.

    Args:
        runs: H meta-iterations each, beside those that are not counted.

    Raises:
        RuntimeError: the training failed; with its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "times.json"
        overlay = Path(folder) / "overlay.yaml"
        clock = {"class_path": "benchmarks.speed.training.BareSteps", "init_args": {"output": str(output)}}
        overlay.write_text(json.dumps({"trainer": {"callbacks": [clock]}}))  # JSON is YAML
        settings = SETTINGS | {"trainer.max_steps": (runs + WARM_RUNS) * RUN_LENGTH}
        run_cli(["fit", "--config", str(CONFIG), "--config", str(overlay), *words(settings)], Path(folder))
        return Loop(**json.loads(output.read_text()))


def words(settings: dict[str, Any]) -> list[str]:
    """Settings as on a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def run_cli(arguments: list[str], folder: Path, environment: dict[str, str] | None = None) -> float:
    """Run `dmaml` in a folder and on a terminal of its own; returns when it was started, in `time.time`.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    ours, theirs = pty.openpty()
    said = bytearray()

    def listen() -> None:
        try:
            while heard := os.read(ours, 4096):
                said.extend(heard)
                del said[:-2000]
        except OSError:  # the terminal is closed
            return

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    began = time.time()
    code = subprocess.run(  # noqa: S603 - this project's own program
        [sys.executable, "-m", "dmaml_pl", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        check=False,
    ).returncode
    os.close(theirs)
    listener.join(timeout=5)
    os.close(ours)
    if code:
        raise RuntimeError(f"dmaml {' '.join(arguments)} exited with {code}:\n{said.decode(errors='replace')}")
    return began
