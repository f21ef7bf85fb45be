"""Stores that a tracker cannot use: one error that names the setting, at the start."""

from __future__ import annotations

import os
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmaml_pl.errors import TrackingError
from dmaml_pl.tracking import patience as patience_module
from dmaml_pl.tracking import store as store_module
from dmaml_pl.tracking.store import Store
from tests.tracked import client, make
from tests.trainings import empty_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a store as MLflow makes it: copying it is faster than making it."""
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    return tmp_path


# Servers


def test_unreachable_server_is_told_fast(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(TrackingError, match=r"http://127.0.0.1:9: Connection refused.*init_args.tracking_uri"):
        make(tmp_path, tracking_uri="http://127.0.0.1:9").open()
    assert time.monotonic() - start < 15
    assert capfd.readouterr() == ("", "")
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_a_database_where_nobody_answers_is_told_at_once_without_its_password(tmp_path: Path) -> None:
    told = (
        r"^No MLflow server can be used at postgresql://\*\*\*@127.0.0.1:9/x: .*Connection refused\. Start it, or set "
    )
    with pytest.raises(TrackingError, match=told):
        Store.find("postgresql://me:s3cret@127.0.0.1:9/x", str(tmp_path)).connect()


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


# Folders and databases


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
