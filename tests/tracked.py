"""Trackers with SQLite stores of their own: what these hold, and what may happen to them."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from dmaml_pl.tracking.tracker import MLflowTracker
from tests.trainings import empty_store


def make(folder: Path, **settings: Any) -> MLflowTracker:
    return MLflowTracker(save_dir=str(folder), **{"system_metrics": False, **settings})


def lay_opened_store(folder: Path) -> None:
    """Lay a store with an experiment into a folder."""
    (folder / "mlflow.db").write_bytes(empty_store())
    tracker = make(folder)
    tracker.open()
    tracker.finalize("success")


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


def history(folder: Path, run_id: str, metric: str) -> list[tuple[int, float]]:
    """All rows of the store's table, in which a doubled one would be seen."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        rows = "SELECT step, value FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step, value"
        return list(database.execute(rows, (run_id, metric)))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Another process holds the SQLite store."""
    with closing(sqlite3.connect(folder / "mlflow.db", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        yield
        database.execute("ROLLBACK")


@contextmanager
def full_disk(bytes_left_in_a_file: int) -> Iterator[None]:
    """No file can be written beyond so many bytes; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left_in_a_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
