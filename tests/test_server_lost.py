"""Trainings whose MLflow server is killed: a real server, a real training, and what is in the store afterwards."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from mlflow import MlflowClient

from dmaml_pl.__main__ import main
from tests.adapting import SINES, train
from tests.servers import Server, serving

pytestmark = pytest.mark.slow  # a server takes its time to start, and starts three times

WORDS = ["--trainer.max_steps=20", "--trainer.val_check_interval=1", "--meta_test=true", "--data.test_tasks=4"]
TIMED = ("seconds", "tasks_per_second", "peak_memory_mib")
"""Metrics that measure time, and so differ between any two trainings."""


class Outage(pl.Callback):
    """Kills the server at the end of one run, and starts it again at the end of another; `server` is set by the test.

    Args:
        down: run (from 1) after which it is killed.
        up: run after which it is back; 0 for never.
    """

    server: Server
    warned: bool = False

    def __init__(self, down: int, up: int = 0) -> None:
        self.down = down
        self.up = up

    def on_run_end(self, trainer: Any, module: Any, report: Any) -> None:
        if module.runs_done == self.down:
            self.server.kill()
        if module.runs_done == self.up:
            self.server.launch()
            self.server.await_answer()


class Stored:
    """The one MLflow run of an experiment in a SQLite store, as its tables have it."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.client = MlflowClient(uri)
        found = self.client.get_experiment_by_name(experiment)
        assert found is not None
        (self.run,) = self.client.search_runs([found.experiment_id])
        with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
            rows = "SELECT key, step, value, timestamp FROM metrics WHERE run_uuid = ? ORDER BY key, step, timestamp"
            self.rows = list(database.execute(rows, (self.run.info.run_id,)))

    @property
    def metrics(self) -> list[tuple[str, int, float | None]]:
        """Every row of the whole history; of what measures time, the steps only."""
        return [(key, step, None if key.endswith(TIMED) else value) for key, step, value, _ in self.rows]


def files(folder: Path) -> dict[str, int]:
    """Below the artifacts of the only MLflow run in a folder."""
    (root,) = {path.parent for path in folder.rglob("config.yaml") if "artifacts" in path.parts}
    return {path.relative_to(root).as_posix(): 1 for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stored]:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder, SINES, *WORDS)
    return folder, Stored(f"sqlite:///{folder}/mlruns/mlflow.db", "dmaml")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        Outage.server = server
        yield server


def train_with(server: Server, folder: Path, experiment: str, **outage: int) -> Stored:
    logger = ["--trainer.logger.tracking_uri", server.uri, "--trainer.logger.experiment_name", experiment]
    callback = f'[{{"class_path": "{__name__}.Outage", "init_args": {str(outage).replace(chr(39), chr(34))}}}]'
    train(folder, SINES, *WORDS, *logger, f"--trainer.callbacks={callback}")
    return Stored(server.store, experiment)


def test_a_server_that_is_killed_and_started_again_lacks_nothing_and_has_nothing_twice(
    server: Server,
    undisturbed: tuple[Path, Stored],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, expected = undisturbed
    stored = train_with(server, tmp_path, "back", down=3, up=7)
    assert stored.metrics == expected.metrics
    assert stored.run.info.status == "FINISHED"
    assert files(server.folder) == files(folder)
    assert sorted(stored.rows, key=lambda row: row[3]) == sorted(stored.rows, key=lambda row: row[3])
    told = [record.getMessage().split(":")[0] for record in caplog.records if record.levelname == "WARNING"]
    assert told == ["MLflow does not answer", "MLflow answers again, and gets what was kept."]
    assert not (tmp_path / "mlruns" / "outbox").exists()


def test_a_server_that_stays_away_gets_everything_by_dmaml_sync(
    server: Server,
    undisturbed: tuple[Path, Stored],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, expected = undisturbed
    before = train_with(server, tmp_path, "away", down=3)
    assert before.run.info.status == "RUNNING"
    assert before.metrics != expected.metrics
    last = caplog.records[-1].getMessage()
    assert "MLflow lacks " in last
    assert "the status FINISHED. They are kept in" in last
    assert "dmaml sync" in last
    (kept,) = (tmp_path / "mlruns" / "outbox").iterdir()
    assert main(["sync", "--save_dir", str(tmp_path / "mlruns")]) == 1

    server.launch()
    server.await_answer()
    capsys.readouterr()
    assert main(["sync", "--save_dir", str(tmp_path / "mlruns")]) == 0
    printed = capsys.readouterr().out
    assert f"({kept.name[:8]}): sent " in printed
    after = Stored(server.store, "away")
    assert after.metrics == expected.metrics
    assert after.run.info.status == "FINISHED"
    assert after.run.info.end_time is not None
    assert "Finished" in after.run.data.tags["mlflow.note.content"]
    assert {item.path for item in MlflowClient(server.uri).list_artifacts(after.run.info.run_id)} >= {
        "checkpoints",
        "config.yaml",
        "figures",
    }
    assert not (tmp_path / "mlruns" / "outbox").exists()
