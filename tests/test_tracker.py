"""What a tracker brings into its store: the MLflow run, settings, metrics and files; all on real SQLite stores."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from dmaml_pl.errors import TrackingError
from dmaml_pl.provenance.environment import git_state
from dmaml_pl.tracking.params import clean_name, flatten
from dmaml_pl.tracking.sender import pause_after
from dmaml_pl.tracking.tracker import MLflowTracker
from tests.tracked import artifacts, client, files, make, read
from tests.trainings import empty_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a store as MLflow makes it: copying it is faster than making it."""
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    return tmp_path


# Opening


def test_constructor_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mlflow", None)  # importing it would raise
    tracker = MLflowTracker()
    assert (tracker.name, tracker.version, tracker.run_url) == ("dmaml", None, None)
    assert tracker.save_dir == "mlruns/checkpoints"
    tracker.finalize("success")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TrackingError, match="mlflow"):
        tracker.open()


def test_open_makes_store_experiment_and_run_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tracker = make(tmp_path / "a b" / "runs", run_name="first", tags={"paper": "maml"})
    tracker.open()
    tracker.open()
    assert capfd.readouterr() == ("", "")
    assert not caplog.records

    runs = client(tmp_path / "a b" / "runs").search_runs([read(tmp_path / "a b" / "runs", tracker).info.experiment_id])
    assert [run.info.run_id for run in runs] == [tracker.version]
    run = runs[0]
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "first"
    assert run.data.tags["paper"] == "maml"
    assert tracker.run_url == f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    assert artifacts(tracker) == tmp_path / "a b" / "runs" / "artifacts" / "dmaml" / run.info.run_id / "artifacts"
    assert tracker.name == "dmaml"
    assert tracker.save_dir == f"{tmp_path}/a b/runs/checkpoints"


def open_at(barrier: Barrier, folder: Path, ids: Connection) -> None:
    barrier.wait()
    tracker = make(folder)
    tracker.open()
    ids.send(tracker.version)


def test_two_processes_open_a_fresh_store_at_the_same_moment(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")  # they need not import everything anew
    barrier = context.Barrier(2)
    here, there = context.Pipe(duplex=False)
    processes = [context.Process(target=open_at, args=(barrier, tmp_path / "runs", there)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert capfd.readouterr() == ("", "")
    experiment = client(tmp_path / "runs").get_experiment_by_name("dmaml")
    assert experiment is not None
    made = client(tmp_path / "runs").search_runs([experiment.experiment_id])
    assert {run.info.run_id for run in made} == {here.recv(), here.recv()}


def test_environment_is_logged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/dmaml", "fit"])
    tracker = make(folder)
    tracker.open()
    facts = json.loads(files(tracker)["environment.json"].read_text())
    assert facts["packages"]["torch"]
    assert {"python", "platform", "cpu_count", "command"} <= facts.keys()
    tags = read(folder, tracker).data.tags
    assert tags["dmaml.torch"] == facts["packages"]["torch"]
    assert tags["dmaml.pytorch_lightning"] == pl.__version__
    assert tags["dmaml.git_clean"] in ("true", "false", "unknown")
    assert tags["mlflow.user"]
    assert tags["mlflow.source.name"] == "dmaml"


def test_git_commit_is_logged(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "file").touch()
    git = ["git", "-C", str(repository), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.chdir(repository)
    tracker = make(folder)
    tracker.open()
    tags = read(folder, tracker).data.tags
    assert tags["dmaml.git_clean"] == "true"
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert tags["dmaml.git_commit"] == tags["mlflow.source.git.commit"] == head

    (repository / "other").touch()
    dirty = make(folder)
    dirty.open()
    assert read(folder, dirty).data.tags["dmaml.git_clean"] == "false"


@pytest.mark.parametrize(("told", "clean"), [("0a1b2c", "true"), ("0a1b2c-dirty", "false")])
def test_an_image_says_of_which_commit_it_was_made(told: str, clean: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMAML_GIT_COMMIT", told)
    assert git_state() == ("0a1b2c", clean)


# Configuration


def test_flatten() -> None:
    config = {
        "seed": None,
        "model": {"class_path": "dmaml_pl.Model", "init_args": {"lr": 0.01, "first_order": False, "empty": {}}},
        "trainer": {"callbacks": [{"class_path": "A"}, {"class_path": "B", "init_args": {"monitor": "val/loss"}}]},
        "a*": 1,
        "a?": 2,
        "uri": "http://me:secret@host/path",
    }
    assert flatten(config) == {
        "seed": "null",
        "model.class_path": "dmaml_pl.Model",
        "model.lr": "0.01",
        "model.first_order": "false",
        "model.empty": "{}",
        "trainer.callbacks.0.class_path": "A",
        "trainer.callbacks.1.class_path": "B",
        "trainer.callbacks.1.monitor": "val/loss",
        "a_": "1",
        "a__": "2",
        "uri": "http://***@host/path",
    }


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("val/acc@5", "val/acc_5"),
        ("/loss", "loss"),
        ("a//../b", "a/b"),
        ("..", "_"),
        ("a: b-c_d.e", "a: b-c_d.e"),
        ("é" * 300, "é" * 250),
    ],
)
def test_clean_name(name: str, clean: str) -> None:
    assert clean_name(name) == clean


def test_config_is_logged_whole(folder: Path) -> None:
    tracker = make(folder)
    long = "".join(str(digit % 10) for digit in range(13_000))
    config = {"long": long, "empty": "", **{f"key{index}": index for index in range(250)}}
    tracker.log_config(config, "long: ...\n")
    params = read(folder, tracker).data.params
    assert params["long"] + params["long.part2"] + params["long.part3"] == long
    assert params["empty"] == ""
    assert all(params[f"key{index}"] == str(index) for index in range(250))
    assert files(tracker)["config.yaml"].read_text() == "long: ...\n"


def test_resume_keeps_params_and_tells_changes(folder: Path) -> None:
    first = make(folder)
    first.log_config({"lr": 0.1, "ways": 5}, "lr: 0.1\nways: 5\n")
    first.finalize("success")

    second = make(folder)
    assert first.version is not None
    second.open(first.version)
    assert read(folder, second).info.status == "RUNNING"
    second.log_config({"lr": 0.2, "ways": 5}, "lr: 0.2\nways: 5\n")
    run = read(folder, second)
    assert second.version == first.version
    assert run.data.params == {"lr": "0.1", "ways": "5"}
    assert json.loads(run.data.tags["dmaml.changed_params"]) == {"lr": "0.2"}
    assert run.data.tags["dmaml.resumed"] == "1"
    assert files(second)["config.yaml"].read_text() == "lr: 0.1\nways: 5\n"
    assert files(second)["config.resumed-1.yaml"].read_text() == "lr: 0.2\nways: 5\n"
    assert "environment.resumed-1.json" in files(second)
    second.finalize("success")
    described = read(folder, second).data.tags["mlflow.note.content"]
    assert "Resumed with other settings than the parameters, which are the first: `lr` is 0.2." in described

    third = make(folder, run_id=first.version)
    third.log_config({"lr": 0.1, "ways": 5}, "lr: 0.1\nways: 5\n")
    assert "dmaml.changed_params" not in read(folder, third).data.tags
    assert "config.resumed-2.yaml" not in files(third)


def test_config_that_cannot_be_logged_stops_before_the_training(folder: Path) -> None:
    tracker = make(folder)
    tracker.open()
    run_id = tracker.version
    assert run_id is not None
    shutil.rmtree(folder / "artifacts")
    (folder / "artifacts").write_text("a file in the way")
    with pytest.raises(TrackingError, match=r"did not take the configuration.*init_args.save_dir"):
        tracker.log_config({"lr": 0.1}, "lr: 0.1\n")
    left = client(folder).get_run(run_id).info
    assert (left.status, left.lifecycle_stage) == ("FAILED", "deleted")


def test_hyperparameters_never_raise(folder: Path) -> None:
    tracker = make(folder)
    tracker.open()
    tracker.log_hyperparams({"lr": 0.1, "net": {"width": 4}})
    tracker.log_hyperparams({"lr": 0.2})
    assert read(folder, tracker).data.params == {"lr": "0.1", "net.width": "4"}


# Metrics


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_metrics_keep_steps_and_times(folder: Path) -> None:
    tracker = make(folder)
    tracker.open()
    before = int(time.time() * 1000)
    for step in range(3):
        tracker.log_metrics({"val/acc@5": step / 2, "nan": math.nan, "inf": math.inf}, step)
    after = int(time.time() * 1000)
    assert tracker.flush()
    assert tracker.version is not None
    history = client(folder).get_metric_history(tracker.version, "val/acc_5")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert all(before <= metric.timestamp <= after for metric in history)
    assert math.isnan(read(folder, tracker).data.metrics["nan"])


def test_metrics_reach_the_store_without_being_sent_on_purpose(folder: Path) -> None:
    tracker = make(folder)
    tracker.open()
    for step in range(10):
        tracker.log_metrics({"a": step}, step)
        tracker.save()
    wait_until(lambda: read(folder, tracker).data.metrics == {"a": 9})


def test_sending_takes_half_a_percent_of_a_core_at_most_and_never_pauses_for_long() -> None:
    for seconds in (0.0, 0.005, 0.1):
        assert seconds <= 0.005 * pause_after(seconds)
    assert pause_after(60.0) == 30.0


def test_system_metrics_start_and_stop(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    tracker = make(folder, system_metrics=True)
    tracker.open()
    wait_until(lambda: bool(read(folder, tracker).data.metrics))
    tracker.finalize("success")
    assert any(name.startswith("system/cpu") for name in read(folder, tracker).data.metrics)
    assert not any(thread.name == "SystemMetricsMonitor" for thread in threading.enumerate())
    assert capfd.readouterr() == ("", "")


# Everything else


def test_artifacts_texts_and_tags(folder: Path, tmp_path: Path) -> None:
    tracker = make(folder)
    tracker.open()
    (tmp_path / "figure.png").write_bytes(b"png")
    tracker.log_artifact(tmp_path / "figure.png", "figures")
    tracker.log_text("# Report", "reports/report.md")
    tracker.set_tags({"note": "n" * 6000})
    assert files(tracker)["figures/figure.png"].read_bytes() == b"png"
    assert files(tracker)["reports/report.md"].read_text() == "# Report"
    assert read(folder, tracker).data.tags["note"] == "n" * 6000


@pytest.fixture
def off_rank_zero(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("off_rank_zero")
def test_nothing_happens_off_rank_zero(tmp_path: Path) -> None:
    tracker = make(tmp_path / "runs")
    tracker.open()
    tracker.log_config({"a": 1}, "a: 1")
    tracker.log_hyperparams({"a": 1})
    tracker.log_metrics({"a": 1.0}, 0)
    tracker.save()
    tracker.flush()
    tracker.keep()
    tracker.log_text("a", "a.txt")
    tracker.log_artifact(tmp_path)
    tracker.set_tags({"a": "b"})
    tracker.log_graph(torch.nn.Identity())
    tracker.finalize("success")
    assert tracker.experiment is None
    assert tracker.version is None
    assert not list(tmp_path.iterdir())
