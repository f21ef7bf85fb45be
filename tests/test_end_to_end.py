"""What a user does at the command line, with real processes and a real MLflow store."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests import forked
from tests.trainings import SMALL, Training, dmaml, environment, flags, lay_store, same_weights
from tests.workers import ends


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sinusoid: str) -> Training:
    folder = tmp_path_factory.mktemp("trained")
    words = ["fit", "--config", sinusoid, *flags(SMALL)]
    result = dmaml(folder, *words, launcher=())
    assert result.returncode == 0, result.stderr
    return Training(folder, words, result)


def test_fit_prints_the_table_the_figures_and_the_command_that_shows_this_training(trained: Training) -> None:
    out = trained.result.stdout
    assert "Mean squared error on the query sets of 20 held-out" in out
    rows = re.findall(r"│\s+(\d+) │ +([\d.]+) ± [\d.]+ │ +([\d.]+) ± [\d.]+ │ +([\d.]+) ± [\d.]+ │", out)
    assert [row[0] for row in rows] == ["0", "1", "5", "10"]
    for name in ("figures/adaptation_curve.png", "figures/tasks.png"):
        (shown,) = re.findall(rf"^  (mlruns/.*{name})$", out, re.MULTILINE)
        assert (trained.folder / shown).read_bytes().startswith(b"\x89PNG")
    assert f"ui --run {trained.run.info.run_id}" in out


def test_fit_says_nothing_but_its_progress(trained: Training) -> None:
    lines = trained.result.stderr.splitlines()
    expected = [
        r"Parameters: 0 frozen, 0 learned, 1,761 adapting",
        r"Training with the vectorized engine \.\.\.",
        r"Trained 6 runs, 60 meta-iterations on each of 2 workers, 600 tasks, in \d+ s\.",
        r"Training the baseline \.\.\.",
        r"Meta-test \.\.\.",
    ]
    assert len(lines) == len(expected), trained.result.stderr
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line)


def test_one_finished_mlflow_run_holds_every_setting(trained: Training) -> None:
    run = trained.run
    assert run.info.status == "FINISHED"
    expected = {
        "seed_everything": "0",
        "data.class_path": "data_modules.Sinusoid",
        "data.shots": "10",
        "data.evaluation_seed": "0",
        "model.algorithm.inner_lr": "0.01",
        "model.algorithm.first_order": "false",
        "model.meta_optimizer.class_path": "torch.optim.Adam",
        "model.meta_optimizer.betas.0": "0.9",
        "trainer.devices": "2",
        "trainer.max_steps": "60",
        "trainer.strategy.run_length": "10",
        "trainer.strategy.merge.class_path": "dmaml_pl.MeanMerge",
        "checkpoint.monitor": "val/loss",
    }
    assert {name: run.data.params.get(name) for name in expected} == expected


def test_the_table_of_trainings_in_the_ui_has_columns_for_their_metric_and_main_settings(trained: Training) -> None:
    experiment = trained.client.get_experiment(trained.run.info.experiment_id)
    columns = json.loads(experiment.tags["mlflow.sharedViewState.table"])["selectedColumns"]
    shown = [re.fullmatch(r"(metrics|params)\.`(.+)`", column) for column in columns]
    kept = {"metrics": trained.run.data.metrics, "params": trained.run.data.params}
    there = [each[2] for each in shown if each and each[2] in kept[each[1]]]
    assert there[:4] == ["val/mse", "test/mse", "model.algorithm.class_path", "model.algorithm.inner_lr"]
    assert {"data.shots", "trainer.devices", "trainer.strategy.run_length", "trainer.max_steps"} <= set(there)


def test_the_metrics_stand_at_their_meta_iterations(trained: Training) -> None:
    metrics = trained.run.data.metrics
    assert list(trained.history("train/loss")) == [10, 20, 30, 40, 50, 60]
    workers = [trained.history(f"train/loss_worker_{worker}") for worker in (0, 1)]
    for step, value in trained.history("train/loss").items():
        assert math.isclose(value, (workers[0][step] + workers[1][step]) / 2, rel_tol=1e-5)
    assert workers[0] != workers[1]
    assert trained.history("train/tasks_seen") == {10 * n: 100.0 * n for n in range(1, 7)}
    assert list(trained.history("val/mse_step_10")) == [20, 40, 60]
    for name in ("seconds", "drift", "agreement", "bytes"):
        assert metrics[f"merge/{name}"] > 0
    for name in ("train/tasks_per_second", "val/loss", "val/mse_step_0"):
        assert metrics[name] > 0
    for name in ("test/mse_step_1", "test/baseline_mse_step_1", "test/untrained_mse_step_1", "test/baseline_mse_ci95"):
        assert metrics[name] > 0
    assert any(name.startswith("system/") for name in metrics)


def test_the_artifacts_are_there(trained: Training) -> None:
    assert "class_path: data_modules.Sinusoid" in trained.artifact("config.yaml").read_text()
    assert json.loads(trained.artifact("environment.json").read_text())["packages"]["torch"] == version("torch")
    for name in ("best", "last"):
        kept = torch.load(trained.artifact(f"checkpoints/{name}.ckpt"), weights_only=True)
        assert same_weights(kept, trained.checkpoint(name))
    assert trained.artifact("figures/tasks.png").stat().st_size > 10_000
    assert json.loads(trained.artifact("report.json").read_text())["tasks"] == 20
    assert "(figures/tasks.png)" in trained.artifact("report.md").read_text()


def test_the_config_artifact_repeats_the_training(trained: Training, tmp_path: Path) -> None:
    result = dmaml(tmp_path, "fit", "--config", str(trained.artifact("config.yaml")))
    assert result.returncode == 0, result.stderr
    again = Training(tmp_path, [], result)
    assert same_weights(again.checkpoint("last"), trained.checkpoint("last"))
    volatile = re.compile(r"seconds|per_second|memory|^system/")
    first, second = (
        {name: value for name, value in training.run.data.metrics.items() if not volatile.search(name)}
        for training in (trained, again)
    )
    assert first == second


def test_the_command_in_the_report_prints_the_same_table_and_adds_no_mlflow_run(trained: Training) -> None:
    report = trained.artifact("report.md").read_text()
    (command,) = re.findall(r"^python -m dmaml_pl (test .*)$", report, re.MULTILINE)
    before = trained.run
    result = dmaml(trained.folder, *shlex.split(command))
    assert result.returncode == 0, result.stderr
    table = re.findall(r"^[│┃].*$", result.stdout, re.MULTILINE)
    assert table == re.findall(r"^[│┃].*$", trained.result.stdout, re.MULTILINE)
    after = trained.run
    assert (after.info.status, after.info.end_time) == ("FINISHED", before.info.end_time)
    assert (after.data.params, after.data.tags) == (before.data.params, before.data.tags), "they are the training's"


def test_predict_writes_every_prediction(trained: Training, tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    words = [*trained.words[1:], "--ckpt_path=last", f"--predictions.file={file}", "--trainer.devices=1"]
    result = dmaml(trained.folder, "predict", *words)
    assert result.returncode == 0, result.stderr
    lines = file.read_text().splitlines()
    assert lines[0] == "task,query,input,target,prediction"
    assert len(lines) == 1 + 20 * 10


def test_validate_judges_a_checkpoint(trained: Training) -> None:
    result = dmaml(trained.folder, "validate", *trained.words[1:], "--ckpt_path=last", "--trainer.devices=1")
    assert result.returncode == 0, result.stderr
    assert "val/mse_step_10" in result.stdout


class Running:
    """A training that goes on until it is stopped."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.folder = folder
        self.words = words
        lay_store(folder)
        self.process = forked.Command(words, folder, environment())

    def wait_for_checkpoint(self) -> None:
        deadline = time.monotonic() + 90
        while not list(self.folder.glob("mlruns/checkpoints/*/*/checkpoints/last.ckpt")):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def workers(self) -> list[int]:
        (server,) = psutil.Process(self.process.pid).children()
        return [worker.pid for worker in server.children()]

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=60)
        code = self.process.returncode
        assert code is not None
        return code, errors


@pytest.fixture
def running(tmp_path: Path, sinusoid: str) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(**settings: Any) -> Running:
        words = ["fit", "--config", sinusoid, *flags(SMALL | {"trainer.max_steps": 1_000_000} | settings)]
        started.append(Running(tmp_path, words))
        started[-1].wait_for_checkpoint()
        return started[-1]

    yield start
    for training in started:
        training.process.kill()
        training.process.communicate()


def status_of(folder: Path) -> tuple[str, dict[str, str]]:
    run = Training(folder, [], subprocess.CompletedProcess([], 0)).run
    return run.info.status, run.data.tags


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_ends_in_killed_and_says_how_to_go_on(
    running: Callable[..., Running], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    training = running()
    workers = training.workers()
    training.process.send_signal(number)
    returncode, errors = training.end()
    assert returncode == code, errors
    kept = r"Stopped\. The last merge is kept in (mlruns/checkpoints/sinusoid/.*/last\.ckpt)\. To go on:\n  (.*)\n"
    ((file, command),) = re.findall(kept, errors)
    assert (tmp_path / file).is_file()
    assert shlex.split(command) == ["python", "-m", "dmaml_pl", *training.words, "--ckpt_path", "last"]
    assert "Traceback" not in errors
    assert status_of(tmp_path)[0] == "KILLED"
    assert all(ends(worker, within_s=10) for worker in workers)


@pytest.mark.parametrize("where", ["a run", "a validation"])
def test_a_killed_worker_ends_the_training_with_a_clear_error(
    running: Callable[..., Running], tmp_path: Path, where: str
) -> None:
    long = {"data.val_tasks": 2000, "trainer.val_check_interval": 1}
    training = running(**(long if where == "a validation" else {}))
    (worker,) = training.workers()
    os.kill(worker, signal.SIGKILL)
    returncode, errors = training.end()
    assert returncode == 1, errors
    assert re.search(rf"dmaml: error: worker 1 \(process {worker}\) was killed by SIGKILL while run \d+", errors)
    assert "Traceback" not in errors
    status, tags = status_of(tmp_path)
    assert status == "FAILED"
    assert "was killed by SIGKILL" in tags["dmaml.error"]


def test_a_training_that_diverges_names_the_place_and_leaves_the_last_good_checkpoint(
    trained: Training, tmp_path: Path
) -> None:
    words = [*trained.words, "--trainer.max_steps=20", "--meta_test=false"]
    assert dmaml(tmp_path, *words).returncode == 0
    diverging = [
        "--trainer.max_steps=60",
        "--model.algorithm.inner_lr=1e12",
        "--model.algorithm.inner_steps=4",
        "--ckpt_path=last",
    ]
    result = dmaml(tmp_path, *words, *diverging)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert re.match(r"dmaml: error: the query loss of worker \d is not finite in run 2, meta-iteration 0\.", errors[0])
    assert "Traceback" not in result.stderr
    failed = Training(tmp_path, [], result)
    assert failed.run.info.status == "FAILED"
    kept = failed.checkpoint("last")
    assert kept["global_step"] == 20
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept["state_dict"].values())


SIXTH = {"trainer.max_steps": 500, "data.val_tasks": 20, "data.test_tasks": 200}


def test_a_sixth_of_the_training_of_make_train_cuts_the_error_to_a_third_and_improves_with_further_steps(
    sinusoid: str, tmp_path: Path
) -> None:
    result = dmaml(tmp_path, "fit", "--config", sinusoid, *flags(SIXTH))
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("mlruns/checkpoints/sinusoid/*/report.json")
    found = json.loads(file.read_text())
    assert found["tasks"] == 200
    trained = [row["trained"] for row in found["steps"]]
    assert trained[1] < found["steps"][1]["baseline"] / 2
    assert trained[1] < found["steps"][1]["untrained"] / 3
    assert trained[10] < trained[5] < trained[1] < trained[0]
