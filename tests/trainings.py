"""Real trainings by the command line, as a user makes them, and what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient

from tests.recipes import same

LEFT_BEHIND = (
    "LOCAL_RANK",
    "RANK",
    "PL_GLOBAL_SEED",
    "OMP_NUM_THREADS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "WORLD_SIZE",
    "NODE_RANK",
)
SMALL = {
    "data.meta_batch": 5,
    "data.val_tasks": 10,
    "data.test_tasks": 20,
    "trainer.strategy.run_length": 10,
    "trainer.max_steps": 60,
    "trainer.val_check_interval": 2,
}
SETTINGS = SMALL | {"meta_test": "false", "trainer.val_check_interval": 4}


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def environment() -> dict[str, str]:
    """That of a user: a training in this process leaves its number of threads behind, which would oversubscribe."""
    clean = {name: value for name, value in os.environ.items() if name not in LEFT_BEHIND}
    return clean | {"COLUMNS": "100", "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}


def dmaml(folder: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, "-m", "dmaml_pl", *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@dataclass
class Training:
    folder: Path
    words: list[str]
    result: subprocess.CompletedProcess[str]

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder}/mlruns/mlflow.db")

    @property
    def runs(self) -> list[Any]:
        (experiment,) = [e for e in self.client.search_experiments() if e.name == "sinusoid"]
        return list(self.client.search_runs([experiment.experiment_id]))

    @property
    def run(self) -> Any:
        (run,) = self.runs
        return run

    def history(self, name: str) -> dict[int, float]:
        return {point.step: point.value for point in self.client.get_metric_history(self.run.info.run_id, name)}

    def artifact(self, name: str) -> Path:
        return Path(self.client.download_artifacts(self.run.info.run_id, name))

    def checkpoint(self, name: str) -> dict[str, Any]:
        (file,) = self.folder.glob(f"mlruns/checkpoints/sinusoid/*/checkpoints/{name}.ckpt")
        checkpoint: dict[str, Any] = torch.load(file, weights_only=True)
        return checkpoint


def same_weights(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Of two checkpoints."""
    return same(first["state_dict"], second["state_dict"])


def fit(
    folder: Path, config: str, *words: str, disturb: dict[str, Any] | None = None, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """`dmaml fit` in a process group of its own, disturbed by `tests/probe.py`."""
    shutil.copy(Path(__file__).with_name("probe.py"), folder)
    callbacks = [] if disturb is None else [{"class_path": "probe.Disturber", "init_args": disturb}]
    listed = [f"--trainer.callbacks={json.dumps(callbacks)}"] if callbacks else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", "dmaml_pl", "fit", "--config", config, *flags(SETTINGS), *words, *listed],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        start_new_session=True,
    )


def of(folder: Path) -> Training:
    return Training(folder, [], subprocess.CompletedProcess([], 0))
