"""The tracker's promises, kept on real SQLite stores."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, TensorDataset

from dmaml_pl.errors import TrackingError
from dmaml_pl.provenance.environment import git_state
from dmaml_pl.tracking import patience as patience_module
from dmaml_pl.tracking import store as store_module
from dmaml_pl.tracking.description import wrap
from dmaml_pl.tracking.params import clean_name, flatten
from dmaml_pl.tracking.sender import pause_after
from dmaml_pl.tracking.store import Store
from dmaml_pl.tracking.tracker import MLflowTracker
from tests.trainings import empty_store

pytestmark = [
    # MLflow 3.17 still asks SQLAlchemy 2.1 for a loader strategy that it has deprecated.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    # Lightning speaks of workers and of few batches; the trainings here are a few batches on purpose.
    pytest.mark.filterwarnings("ignore:The .* does not have many workers"),
]


class Tiny(pl.LightningModule):
    """Four weights; `hook` runs before every training batch."""

    def __init__(self, hook: Callable[[int], None] = lambda _: None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.hook = hook

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.hook(batch_idx)
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss, on_step=True)
        return loss

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(TensorDataset(torch.ones(4, 4)), batch_size=1)


def trainer(tracker: MLflowTracker, **settings: Any) -> pl.Trainer:
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **settings,
    }
    return pl.Trainer(logger=tracker, **settings)


def make(folder: Path, **settings: Any) -> MLflowTracker:
    return MLflowTracker(save_dir=str(folder), **{"system_metrics": False, **settings})


def client(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


def read(folder: Path, tracker: MLflowTracker) -> Run:
    assert tracker.version is not None
    return client(folder).get_run(tracker.version)


def artifacts(tracker: MLflowTracker) -> Path:
    return Path(tracker.experiment.get_run(tracker.version).info.artifact_uri)


def files(tracker: MLflowTracker) -> dict[str, Path]:
    root = artifacts(tracker)
    return {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a store as MLflow makes it: copying it is faster than making it 20 times."""
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    return tmp_path


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def off_rank_zero(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    yield
    monkeypatch.undo()


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


# Failures at the start: one error that names the setting


def test_unreachable_server_is_told_fast(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(TrackingError, match=r"http://127.0.0.1:9: Connection refused.*init_args.tracking_uri"):
        make(tmp_path, tracking_uri="http://127.0.0.1:9").open()
    assert time.monotonic() - start < 15
    assert capfd.readouterr() == ("", "")
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_patience_is_bounded_without_a_write_into_the_environment_that_other_threads_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow.environment_variables import (
        MLFLOW_HTTP_REQUEST_MAX_RETRIES,
        MLFLOW_HTTP_REQUEST_TIMEOUT,
    )

    patience_module.disable_telemetry()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    written: list[bytes] = []
    monkeypatch.setattr(os, "putenv", lambda name, _: written.append(name))
    monkeypatch.setattr(os, "unsetenv", written.append)
    with patience_module.brief_requests(3):
        with patience_module.brief_requests(60):
            assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 60
        assert (MLFLOW_HTTP_REQUEST_TIMEOUT.get(), MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()) == (3, 1)
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 77
    assert not written


@pytest.mark.parametrize(
    ("of_a_request", "of_all", "match"),
    [(1, 60.0, r"timed out.*MLFLOW_TRACKING_URI"), (6, 0.2, r"it has not answered in 0.2 s.*MLFLOW_TRACKING_URI")],
)
def test_a_server_that_does_not_answer_is_told_of_and_given_up(
    of_a_request: int, of_all: float, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(patience_module, "REQUEST_TIMEOUT_S", of_a_request)
    monkeypatch.setattr(store_module, "KNOCK_S", 0.1)
    monkeypatch.setattr(store_module, "ANSWER_S", of_all)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(TrackingError, match=match):
            make(tmp_path).open()
    assert capsys.readouterr().err.startswith("Waiting for the MLflow server at http://127.0.0.1:")


def test_password_of_the_server_is_not_told(tmp_path: Path) -> None:
    with pytest.raises(TrackingError) as caught:
        make(tmp_path, tracking_uri="http://me:secret@127.0.0.1:9").open()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("prepare", "match"),
    [
        (lambda folder: folder.parent.write_text("a file"), "Not a directory.*init_args.save_dir"),
        (lambda folder: (folder / "mlflow.db").mkdir(parents=True), "not a usable tracking store.*init_args.save_dir"),
        (lambda folder: (folder.mkdir(parents=True), (folder / "mlflow.db").write_bytes(b"x" * 5000)), "save_dir"),
    ],
    ids=["a file in the way", "a folder in the way", "damaged"],
)
def test_unusable_save_dir(tmp_path: Path, prepare: Callable[[Path], object], match: str) -> None:
    prepare(tmp_path / "parent" / "runs")
    with pytest.raises(TrackingError, match=match):
        make(tmp_path / "parent" / "runs").open()


def test_foreign_database_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "mine.db"
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE accounts (name TEXT)")
    database.close()
    before = file.read_bytes()
    with pytest.raises(TrackingError, match=r"not one of MLflow.*init_args.tracking_uri"):
        make(tmp_path, tracking_uri=f"sqlite:///{file}").open()
    assert file.read_bytes() == before


def test_path_that_mlflow_misreads(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"init_args.save_dir"):
        make(tmp_path / "100%").open()


@pytest.mark.parametrize("run_id", ["0" * 32, "no run's id!"])
def test_unknown_run_id(folder: Path, run_id: str) -> None:
    with pytest.raises(
        TrackingError, match=r"init_args.run_id to an id that the UI shows, or \S+init_args.save_dir to the"
    ):
        make(folder, run_id=run_id).open()


def test_deleted_run(folder: Path) -> None:
    tracker = make(folder)
    tracker.open()
    assert tracker.version is not None
    client(folder).delete_run(tracker.version)
    with pytest.raises(TrackingError, match=r"was deleted.*init_args.run_id"):
        make(folder, run_id=tracker.version).open()


def test_deleted_experiment(folder: Path) -> None:
    client(folder).delete_experiment(client(folder).create_experiment("gone"))
    with pytest.raises(TrackingError, match=r"was deleted.*init_args.experiment_name"):
        make(folder, experiment_name="gone").open()


def test_store_that_was_moved(folder: Path) -> None:
    client(folder).create_experiment("moved", artifact_location="/no/such/folder")
    with pytest.raises(TrackingError, match=r"/no/such/folder.*init_args.experiment_name"):
        make(folder, experiment_name="moved").open()


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


def test_a_database_where_nobody_answers_is_told_at_once_without_its_password(tmp_path: Path) -> None:
    told = (
        r"^No MLflow server can be used at postgresql://\*\*\*@127.0.0.1:9/x: .*Connection refused\. Start it, or set "
    )
    with pytest.raises(TrackingError, match=told):
        Store.find("postgresql://me:s3cret@127.0.0.1:9/x", str(tmp_path)).connect()


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


# The end


def test_success_and_checkpoints(folder: Path) -> None:
    tracker = make(folder)
    best = ModelCheckpoint(monitor="train/loss", save_last=True, save_on_train_epoch_end=True)
    fitter = trainer(tracker, callbacks=[best])
    fitter.fit(Tiny(), loader())
    run = read(folder, tracker)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/loss"] >= 0
    assert Path(best.best_model_path).parent == folder / "checkpoints" / "dmaml" / run.info.run_id / "checkpoints"
    assert files(tracker)["checkpoints/best.ckpt"].read_bytes() == Path(best.best_model_path).read_bytes()
    assert files(tracker)["checkpoints/last.ckpt"].read_bytes() == Path(best.last_model_path).read_bytes()
    assert not files(tracker)["checkpoints/best.ckpt"].is_symlink()
    history = client(folder).get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [0, 1, 2, 3]

    seen = []
    model = Tiny()
    model.test_step = lambda *_: seen.append(read(folder, tracker).info.status)  # type: ignore[method-assign]
    fitter.test(model, loader(), verbose=False)
    assert set(seen) == {"RUNNING"}
    assert read(folder, tracker).info.status == "FINISHED"


def fail(batch_idx: int) -> None:
    if batch_idx == 2:
        raise ValueError("no luck with http://me:secret@host")


def press_ctrl_c(batch_idx: int) -> None:
    if batch_idx == 2:
        raise KeyboardInterrupt


def send_sigterm(batch_idx: int) -> None:
    if batch_idx == 2:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")  # on purpose: the second fit's
def test_failure(folder: Path) -> None:
    tracker = make(folder)
    checkpoint = ModelCheckpoint(every_n_train_steps=1)
    fitter = trainer(tracker, callbacks=[checkpoint])
    with pytest.raises(ValueError, match="no luck"):
        fitter.fit(Tiny(fail), loader())
    run = read(folder, tracker)
    assert run.info.status == "FAILED"
    assert run.data.tags["dmaml.error"] == "ValueError: no luck with http://***@host"
    assert "checkpoints/best.ckpt" in files(tracker)

    tracker.finalize("success")
    assert read(folder, tracker).info.status == "FAILED"
    fitter.fit(Tiny(), loader())
    run = read(folder, tracker)
    assert run.info.status == "FINISHED"
    assert "dmaml.error" not in run.data.tags


@pytest.mark.parametrize("stop", [press_ctrl_c, send_sigterm])
def test_interruption(folder: Path, stop: Callable[[int], None]) -> None:
    tracker = make(folder)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit):
            trainer(tracker).fit(Tiny(stop), loader())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    run = read(folder, tracker)
    assert run.info.status == "KILLED"
    assert "dmaml.error" not in run.data.tags


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


# What the UI shows


def test_the_description_tells_how_it_ended_its_figures_and_what_repeats_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/dmaml", "fit", "--config", "mine.yaml"])
    tracker = make(folder)
    tracker.open()
    tracker.log_metrics({"train/run": 3, "train/tasks_seen": 12_000, "train/loss": 0.5, "train/loss_worker_0": 9.0}, 30)
    tracker.log_metrics({"val/mse": 0.25, "val/mse_ci95": 0.0123, "val/mse_step_1": 7.0}, 30)
    with pytest.raises(ValueError, match="no luck"):
        trainer(tracker).fit(Tiny(fail), loader())
    note = read(folder, tracker).data.tags["mlflow.note.content"]
    assert note.startswith(
        "**Failed** after 3 runs and 12 000 tasks seen\n\n`ValueError: no luck with http://***@host`\n"
    )
    assert "\n\nval/mse **0.25 ± 0.012** · train/loss **" in note
    assert "\n```\ndmaml fit --config mine.yaml\n```\n" in note
    assert "worker_0" not in note
    assert "step_1" not in note

    monkeypatch.setattr(sys, "argv", ["/somewhere/dmaml", "fit", "--config", "mine.yaml", "--ckpt_path", "last"])
    resumed = make(folder, run_id=tracker.version)
    resumed.open()
    resumed.log_metrics({"test/mse": 0.125}, 30)
    resumed.finalize("success")
    note = read(folder, tracker).data.tags["mlflow.note.content"]
    assert note.startswith(
        "**Finished** after 3 runs and 12 000 tasks seen\n\ntest/mse **0.125** · val/mse **0.25 ± 0.012**"
    )
    assert "ckpt_path" not in note


def test_a_long_command_is_broken_where_a_shell_joins_it_again() -> None:
    words = ["printf", "%s.", "--run_name=a 'b", *(f"--setting.number.{index}={index}" for index in range(20))]
    command = shlex.join(words)
    broken = wrap(command)
    assert max(map(len, broken.splitlines())) <= 82
    said = [
        subprocess.run(["/bin/sh", "-c", text], capture_output=True, check=True).stdout for text in (command, broken)
    ]
    assert said[0] == said[1]


def test_a_description_that_a_person_wrote_stays(folder: Path) -> None:
    by_setting = make(folder, tags={"mlflow.note.content": "my own"})
    by_setting.open()
    by_setting.finalize("success")
    assert read(folder, by_setting).data.tags["mlflow.note.content"] == "my own"

    tracker = make(folder)
    tracker.open()
    tracker.finalize("success")
    client(folder).set_tag(str(tracker.version), "mlflow.note.content", "written in the UI")
    resumed = make(folder, run_id=tracker.version)
    resumed.open()
    resumed.finalize("success")
    assert read(folder, tracker).data.tags["mlflow.note.content"] == "written in the UI"


def test_an_experiment_has_views_over_runs_and_tasks_seen_which_a_user_may_change(folder: Path) -> None:
    make(folder).open()
    store = client(folder)
    experiment = store.get_experiment_by_name("dmaml")
    assert experiment is not None
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development", "else the UI opens on other pages"
    axes = {}
    for view in ("by-run", "by-tasks", "by-env-steps"):
        axis = json.loads(experiment.tags[f"mlflow.sharedViewState.{view}"])["globalLineChartConfig"]
        axes[view] = (axis["xAxisKey"], axis["selectedXAxisMetricKey"])
    assert axes == {
        "by-run": ("metric", "train/run"),
        "by-tasks": ("metric", "train/tasks_seen"),
        "by-env-steps": ("metric", "train/env_steps"),
    }
    store.set_experiment_tag(experiment.experiment_id, "mlflow.sharedViewState.by-run", "{}")
    make(folder).open()
    changed = store.get_experiment_by_name("dmaml")
    assert changed is not None
    assert changed.tags["mlflow.sharedViewState.by-run"] == "{}"


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


def test_a_failure_that_turns_out_to_be_a_stop_from_outside_is_corrected(folder: Path) -> None:
    tracker = make(folder)
    tracker.open()
    fitter = trainer(tracker)
    with pytest.raises(ValueError, match="no luck"):
        fitter.fit(Tiny(fail), loader())
    assert "dmaml.error" in read(folder, tracker).data.tags
    tracker.was_stopped()
    assert read(folder, tracker).info.status == "KILLED"
    assert "dmaml.error" not in read(folder, tracker).data.tags


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


def test_the_ui_command_shows_this_run_and_finds_dmaml_where_the_path_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert MLflowTracker().ui_command() == ".venv/bin/dmaml ui"
    assert MLflowTracker(save_dir="my runs").ui_command() == ".venv/bin/dmaml ui --save_dir 'my runs'"
    assert MLflowTracker(tracking_uri="http://host:5000").ui_command() == "http://host:5000"
    other = MLflowTracker(tracking_uri=f"sqlite:///{tmp_path}/other.db").ui_command()
    assert other == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/other.db"
    tracker = MLflowTracker(save_dir="mlruns", system_metrics=False)
    tracker.open()
    assert tracker.ui_command() == f".venv/bin/dmaml ui --run {tracker.version}"
