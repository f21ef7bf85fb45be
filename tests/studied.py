"""Tiny studies, made by the command line as a user makes them, and what they leave behind."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from dmaml_pl.__main__ import main

TINY = """\
data: {init_args: {meta_batch: 2, val_tasks: 4}}
model: {init_args: {network: {init_args: {hidden: [4]}}}}
trainer: {max_steps: 8, strategy: {init_args: {run_length: 2}}}
"""


@dataclass
class Studied:
    """A study that was made, and its store."""

    folder: Path
    kind: str
    words: list[str]
    code: int
    printed: str

    @property
    def output(self) -> Path:
        return self.folder / "mlruns" / "studies" / f"{self.kind}-sinusoid"

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder}/mlruns/mlflow.db")

    @property
    def runs(self) -> list[Run]:
        (experiment,) = [e for e in self.client.search_experiments() if e.name == "sinusoid"]
        return list(self.client.search_runs([experiment.experiment_id]))

    @property
    def parent(self) -> Run:
        (run,) = [run for run in self.runs if "mlflow.parentRunId" not in run.data.tags]
        return run

    @property
    def children(self) -> list[Run]:
        return [run for run in self.runs if run.data.tags.get("mlflow.parentRunId") == self.parent.info.run_id]

    def table(self, name: str = "table.csv") -> list[dict[str, str]]:
        with (self.output / name).open() as file:
            return list(csv.DictReader(file))

    def history(self, run: Run, metric: str) -> list[float]:
        entries = self.client.get_metric_history(run.info.run_id, metric)
        return [entry.value for entry in sorted(entries, key=lambda entry: entry.step)]

    def artifacts(self) -> set[str]:
        return {file.path for file in self.client.list_artifacts(self.parent.info.run_id)}


def words_of(repository: Path, folder: Path, kind: str, *words: str) -> list[str]:
    tiny = folder / "tiny.yaml"
    tiny.write_text(TINY)
    store = f"--trainer.logger.save_dir={folder / 'mlruns'}"
    configs = ["--config", str(repository / "configs/sinusoid.yaml"), "--config", str(tiny)]
    return ["study", kind, *configs, store, *words]


def study(repository: Path, folder: Path, capsys: Any, kind: str, *words: str) -> Studied:
    given = words_of(repository, folder, kind, *words)
    code = main(given)
    return Studied(folder, kind, given, code, "".join(capsys.readouterr()))
