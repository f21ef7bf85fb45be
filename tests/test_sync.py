"""What a training could not send, or left when it was killed: sent by `dmaml sync`, or by who goes on."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from dmaml_pl.__main__ import main
from dmaml_pl.errors import DmamlError
from dmaml_pl.studies.compare import main as compare
from dmaml_pl.tracking.mlflow_run import MLflowRun
from dmaml_pl.tracking.outbox import Outbox
from tests.servers import agreeing
from tests.tracked import history, lay_opened_store, locked, make


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    lay_opened_store(folder)
    return folder


# What is sent


def test_a_process_that_dies_between_sending_and_writing_it_down_doubles_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = make(store)
    tracker.open()
    run_id = tracker.version or ""
    send = MLflowRun.log_metrics

    def send_and_fail(run: MLflowRun, rows: Any) -> None:
        send(run, rows)
        raise ConnectionError("the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(MLflowRun, "log_metrics", send_and_fail)
        tracker.log_metrics({"a": 1.0, "inf": math.inf, "nan": math.nan}, 0)
        tracker.log_metrics({"a": 2.0}, 1)
        assert not tracker.flush()
        assert tracker._sender is not None
        tracker._sender.stop()
    assert history(store, run_id, "a")
    assert main(["sync", "--save_dir", str(store)]) == 0
    assert history(store, run_id, "a") == [(0, 1.0), (1, 2.0)]
    assert [len(history(store, run_id, name)) for name in ("inf", "nan")] == [1, 1]
    assert f"({run_id[:8]}): sent 4 metric values" in capsys.readouterr().out


def log_and_be_killed(folder: Path, run_id: Any) -> None:
    tracker = make(folder)
    tracker.open()
    run_id.send(tracker.version)
    tracker._sender._pause_s = 1e6  # type: ignore[union-attr]  # it will send nothing by itself
    for step in range(10):
        tracker.log_metrics({"a": step}, step)
    os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(function: Callable[..., None], store: Path) -> str:
    """The id of the MLflow run of a process that is killed in it."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(store, there))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    return str(here.recv())


def test_what_a_killed_training_left_is_sent_and_its_status_told(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = run_until_killed(log_and_be_killed, store)
    assert history(store, run_id, "a") == []
    assert main(["sync", "--save_dir", str(store)]) == 0
    assert "sent 10 metric values; its process was killed, so its status is KILLED now." in capsys.readouterr().out
    assert history(store, run_id, "a") == [(step, step) for step in range(10)]
    run = MlflowClient(f"sqlite:///{store}/mlflow.db").get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.info.end_time >= run.info.start_time
    assert main(["sync", "--save_dir", str(store)]) == 0
    assert capsys.readouterr().out == f"Nothing waits in {store}: all was sent.\n"


def open_and_be_killed(folder: Path, run_id: Any) -> None:
    tracker = make(folder)
    tracker.open()
    assert tracker.flush()
    run_id.send(tracker.version)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_training_that_was_killed_is_told_so_by_the_next_command_that_shows_it(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed, under_way = run_until_killed(open_and_be_killed, store), make(store)
    under_way.open()
    with pytest.raises(DmamlError, match="nobody"):
        compare(["nobody", "nothing", "--save_dir", str(store)])
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    assert client.get_run(killed).info.status == "KILLED"
    assert client.get_run(under_way.version or "").info.status == "RUNNING"
    assert "its process was killed, so its status is KILLED now" in capsys.readouterr().out
    under_way.finalize("success")


def test_a_resumed_training_first_sends_what_the_killed_one_left(store: Path) -> None:
    first = make(store)
    first.open()
    run_id = first.version or ""
    first.finalize("success")
    outbox = Outbox.claim(store, run_id, {"run_id": run_id, "run_name": "x", "tracking_uri": ""})
    outbox.append({"do": "set_tags", "tags": {"order": "old"}})
    outbox.append({"do": "end", "status": "FAILED", "time_ms": 1})
    outbox.close()
    second = make(store, run_id=run_id, tags={"order": "new"})
    second.open()
    run = MlflowClient(f"sqlite:///{store}/mlflow.db").get_run(run_id)
    assert (run.info.status, run.data.tags["order"]) == ("RUNNING", "new")
    second.finalize("success")


def test_sync_leaves_a_training_alone_that_is_under_way(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = make(store)
    tracker.open()
    with locked(store):
        tracker.log_metrics({"a": 1.0}, 0)
        assert main(["sync", "--save_dir", str(store)]) == 1
    assert "under way" in capsys.readouterr().out
    tracker.finalize("success")
    assert history(store, tracker.version or "", "a") == [(0, 1.0)]


# What is not


def test_a_folder_that_a_process_had_only_just_made_when_it_was_killed_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outbox" / "a").mkdir(parents=True)
    (tmp_path / "outbox" / "a" / "outbox.db").touch()
    assert main(["sync", "--save_dir", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())


def test_a_damaged_outbox_is_told_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "outbox" / "a" / "outbox.db"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x" * 5000)
    assert main(["sync", "--save_dir", str(tmp_path)]) == 1
    assert "not sent, and still in" in capsys.readouterr().err
    assert file.read_bytes() == b"x" * 5000


def test_sync_names_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", "--save_dir", str(tmp_path / "nope")]) == 1
    assert capsys.readouterr().err == (
        f"dmaml: error: --save_dir is {tmp_path}/nope, but there is no such folder: it is where trainings keep theirs, "
        "mlruns by default.\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--port", "1"], "unrecognized arguments: --port 1"), (["x"], "unrecognized arguments: x")],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", *words]) == 1
    assert capsys.readouterr().err == f"dmaml: error: {message}. dmaml sync --help lists all.\n"


def test_a_server_that_is_still_away_is_told_and_all_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"run_id": "a" * 32, "run_name": "mine", "tracking_uri": "http://127.0.0.1:9"}
    outbox = Outbox.claim(tmp_path, "a" * 32, about)
    outbox.append({"do": "log_metrics", "rows": [["a", 1.0, 1, 0]]})
    outbox.append({"do": "end", "status": "FINISHED", "time_ms": 1})
    outbox.close()
    for words in ([], ["--tracking_uri", "http://127.0.0.1:9"]):
        assert main(["sync", "--save_dir", str(tmp_path), *words]) == 1
        error = capsys.readouterr().err
        assert "mine (aaaaaaaa): not sent, and still in" in error
        assert "1 metric value and the status FINISHED. No MLflow server can be used at http://127.0.0.1:9" in error
        assert error.count("\n") == 1
    assert len(list(Outbox.claim(tmp_path, "a" * 32, about).everything())) == 2


def test_sync_has_to_be_told_a_password_that_was_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"run_id": "a" * 32, "run_name": "mine", "tracking_uri": "http://***@127.0.0.1:9"}
    outbox = Outbox.claim(tmp_path, "a" * 32, about)
    outbox.append({"do": "end", "status": "FINISHED", "time_ms": 1})
    outbox.close()
    assert main(["sync", "--save_dir", str(tmp_path)]) == 1
    assert "give --tracking_uri (http://***@127.0.0.1:9)." in capsys.readouterr().err


def test_the_servers_password_is_not_printed_at_the_end_of_a_training_and_of_sync(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with agreeing(tmp_path / "artifacts") as host:
        address = f"http://me:secret@{host}"
        tracker = make(tmp_path, tracking_uri=address)
        tracker.open()
        tracker.log_metrics({"a": 1.0}, 0)
        tracker.finalize("success")
        outbox = Outbox.claim(tmp_path, "b", {"run_id": "a" * 32, "run_name": "mine", "tracking_uri": address})
        outbox.append({"do": "end", "status": "FINISHED", "time_ms": 1})
        outbox.close()
        assert main(["sync", "--save_dir", str(tmp_path), "--tracking_uri", address]) == 0
    printed = "".join(capfd.readouterr())
    assert "sent the status FINISHED" in printed
    assert "secret" not in printed
