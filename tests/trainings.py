"""Real trainings by the command line, as a user makes them, and what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient

from dmaml_pl.tracking.store import Store
from tests import forked
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
    "model.compile": "false",  # also in trainings that would be long enough for it
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


def dmaml(
    folder: Path, *words: str, launcher: tuple[str, ...] | None = None, timeout: float = 280, new_session: bool = False
) -> subprocess.CompletedProcess[str]:
    """`dmaml ...` to its end, in a process of its own.

    Args:
        folder: where it runs.
        words: those after `dmaml`.
        launcher: what stands between `python` and `-m dmaml_pl`, possibly nothing: Python is then started anew. By
            default the process is forked from one that has the imports behind it (see `tests/forked.py`), and finds
            the empty tracking store that it would make.
        timeout: seconds.
        new_session: whether it leads a process group of its own.
    """
    if launcher is None:
        if words[0] == "fit":
            lay_store(folder)
        return forked.run(list(words), folder, environment(), timeout, new_session=new_session)
    return subprocess.run(
        [sys.executable, *launcher, "-m", "dmaml_pl", *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        start_new_session=new_session,
    )


@cache
def empty_store() -> bytes:
    """An MLflow store without experiments of ours: making one takes seconds, copying it none."""
    with tempfile.TemporaryDirectory() as folder:
        Store.find(f"sqlite:///{folder}/mlflow.db", folder).connect()
        return Path(folder, "mlflow.db").read_bytes()


def lay_store(folder: Path) -> None:
    """Lay an empty tracking store into `mlruns` of a folder, unless one is there."""
    file = folder / "mlruns" / "mlflow.db"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(empty_store())


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
    folder: Path,
    config: str,
    *words: str,
    disturb: dict[str, Any] | None = None,
    launcher: tuple[str, ...] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`dmaml fit` in a process group of its own, disturbed by `tests/probe.py`; see `dmaml`."""
    shutil.copy(Path(__file__).with_name("probe.py"), folder)
    callbacks = [] if disturb is None else [{"class_path": "probe.Disturber", "init_args": disturb}]
    listed = [f"--trainer.callbacks={json.dumps(callbacks)}"] if callbacks else []
    given = ["fit", "--config", config, *flags(SETTINGS), *words, *listed]
    return dmaml(folder, *given, launcher=launcher, timeout=120, new_session=True)


def of(folder: Path) -> Training:
    return Training(folder, [], subprocess.CompletedProcess([], 0))
