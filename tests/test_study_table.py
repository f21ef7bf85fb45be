"""What `dmaml study table` promises, with real trainings and a real MLflow store."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from dmaml_pl.__main__ import main

TINY = """\
data: {init_args: {meta_batch: 2, val_tasks: 4, test_tasks: 5}}
model: {init_args: {network: {init_args: {hidden: [4]}}}}
trainer: {max_steps: 4, val_check_interval: 1, strategy: {init_args: {run_length: 2}}}
"""

ROWS = """\
MAML: {}
head alone: {model.algorithm: ANIL, model.algorithm.inner_lr: 0.02}
"""


@pytest.mark.slow
def test_a_table_has_the_meta_test_time_memory_and_command_of_each_row_and_makes_each_training_once(
    repository: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "rows.yaml").write_text(ROWS)
    configs = ["--config", str(repository / "configs/sinusoid.yaml"), "--config", str(tmp_path / "tiny.yaml")]
    store = f"--trainer.logger.save_dir={tmp_path / 'mlruns'}"
    words = ["study", "table", *configs, store, "--rows", str(tmp_path / "rows.yaml"), "--steps", "0", "3"]
    assert main([*words, "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "model.algorithm.inner_lr=0.02" in printed
    with (tmp_path / "mlruns/studies/table-sinusoid/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == ["MAML", "head alone"]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "sinusoid"]
    for row in rows:
        point = f"tags.`dmaml.study.point` = '{row['row']}'"
        (run,) = client.search_runs([experiment.experiment_id], point)
        assert float(row["after_0"]) == pytest.approx(run.data.metrics["test/mse_step_0"])
        assert float(row["after_3"]) == pytest.approx(run.data.metrics["test/mse_step_3"])
        seconds = client.get_metric_history(run.info.run_id, "train/run_seconds")
        assert float(row["wall_seconds"]) == pytest.approx(sum(entry.value for entry in seconds))
        assert float(row["peak_memory_mib"]) == run.data.metrics["train/peak_memory_mib"] > 0
    assert main([*words, "--seeds", "1"]) == 0
    assert "2 of 2 trainings are known already." in capsys.readouterr().out


def test_rows_of_another_form_are_refused(repository: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "rows.yaml").write_text("MAML: 3\n")
    words = ["--config", str(repository / "configs/sinusoid.yaml"), "--rows", str(tmp_path / "rows.yaml")]
    assert main(["study", "table", *words]) == 1
    assert "has MAML: 3, but lines of the form `LABEL: {NAME: VALUE, ...}` are expected." in capsys.readouterr().err
