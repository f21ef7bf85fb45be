"""What waits for MLflow waits on disk: in order, whole, and for whoever comes next."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from dmaml_pl.__main__ import main
from dmaml_pl.errors import DmamlError, TrackingError
from dmaml_pl.studies.compare import main as compare
from dmaml_pl.tracking import sender as sender_module
from dmaml_pl.tracking.ending import PATIENCE_S, EndStatus
from dmaml_pl.tracking.mlflow_run import MLflowRun
from dmaml_pl.tracking.outbox import Outbox, find_outboxes
from dmaml_pl.tracking.tracker import MLflowTracker
from tests.servers import agreeing
from tests.trainings import empty_store

ABOUT = {"run_id": "a" * 32}


def claim(folder: Path) -> Outbox:
    return Outbox.claim(folder, ABOUT["run_id"], ABOUT)


def numbers(outbox: Outbox) -> list[int]:
    return [operation["n"] for operation in outbox.everything()]


def make(folder: Path, **settings: Any) -> MLflowTracker:
    return MLflowTracker(save_dir=str(folder), **{"system_metrics": False, **settings})


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


# The database


def test_operations_come_out_in_order_and_only_what_was_not_acknowledged_comes_again(tmp_path: Path) -> None:
    first = claim(tmp_path)
    for number in range(5):
        first.append({"n": number})
    entries = first.read()
    assert [entry.operation["n"] for entry in entries] == [0, 1, 2, 3, 4]
    first.acknowledge(entries[:2])
    first.close()
    second = claim(tmp_path)
    assert numbers(second) == [2, 3, 4]
    second.append({"n": 5})
    second.acknowledge(second.read())
    assert not second.waits
    second.close()
    assert not list(tmp_path.iterdir())


def test_a_second_writer_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    first = claim(tmp_path)
    first.append({"n": 1})
    second = claim(tmp_path)
    second.append({"n": 2})
    assert (numbers(first), numbers(second)) == ([1], [2])
    assert first.folder != second.folder


def test_closing_twice_removes_nothing_that_waits(tmp_path: Path) -> None:
    outbox = claim(tmp_path)
    outbox.append({"n": 1})
    outbox.close()
    outbox.close()
    assert numbers(claim(tmp_path)) == [1]


def test_what_was_logged_while_the_outbox_was_closed_comes_after_what_waited_in_it(tmp_path: Path) -> None:
    outbox = claim(tmp_path)
    outbox.append({"n": 1})
    outbox.close()
    other = claim(tmp_path)
    outbox.append({"n": 2})
    assert numbers(outbox) == [2]
    other.close()
    outbox.append({"n": 3})
    assert numbers(outbox) == [1, 2, 3]


def test_the_outbox_of_a_long_training_stays_small(tmp_path: Path) -> None:
    outbox = claim(tmp_path)
    for number in range(20_000):
        outbox.append({"n": number})
        if number % 10 == 9:
            assert [entry.operation["n"] for entry in outbox.read()] == list(range(number - 9, number + 1))
            outbox.acknowledge(outbox.read())
    assert sum(file.stat().st_size for file in outbox.folder.iterdir()) < 6_000_000
    outbox.append({"n": 20_000})
    outbox.close()
    assert numbers(claim(tmp_path)) == [20_000]


def test_a_folder_that_a_process_had_only_just_made_when_it_was_killed_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outbox" / "a").mkdir(parents=True)
    (tmp_path / "outbox" / "a" / "outbox.db").touch()
    assert main(["sync", "--save_dir", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())


def test_what_stands_where_outboxes_are_kept_and_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "outbox").write_text("x")
    with pytest.raises(TrackingError, match="/outbox is no folder, which trainings keep there for what waits: move it"):
        MLflowTracker(save_dir=str(tmp_path)).open()


def test_a_damaged_outbox_is_told_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "outbox" / "a" / "outbox.db"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x" * 5000)
    assert main(["sync", "--save_dir", str(tmp_path)]) == 1
    assert "not sent, and still in" in capsys.readouterr().err
    assert file.read_bytes() == b"x" * 5000


def test_a_long_text_is_kept_whole(tmp_path: Path) -> None:
    outbox = claim(tmp_path)
    outbox.append({"n": 1, "text": "x" * 1_000_000})
    outbox.append({"n": 2})
    first = outbox.read()[0]
    assert len(first.operation["text"]) == 1_000_000
    outbox.acknowledge([first])
    assert numbers(outbox) == [2]


def test_where_no_more_can_be_written_operations_wait_in_memory_and_keep_their_order(tmp_path: Path) -> None:
    outbox = claim(tmp_path)
    outbox.append({"n": 0})
    with full_disk(bytes_left_in_a_file=20):
        for number in range(1, 4):
            outbox.append({"n": number})
        assert numbers(outbox) == [0, 1, 2, 3]
        outbox.acknowledge(outbox.read(at_most=2))
        assert [entry.operation["n"] for entry in outbox.read()] == [2, 3]
        outbox.acknowledge(outbox.read()[:1])
    outbox.append({"n": 4})
    outbox.close()
    assert numbers(claim(tmp_path)) == [3, 4]


@pytest.mark.parametrize("replaced_whole", [True, False])
def test_a_staged_file_stays_as_it_was(tmp_path: Path, *, replaced_whole: bool) -> None:
    file = tmp_path / "last.ckpt"
    file.write_text("first")
    outbox = claim(tmp_path)
    name = outbox.stage(file, replaced_whole=replaced_whole)
    outbox.append({"staged": name})
    if replaced_whole:
        other = tmp_path / "other"
        other.write_text("second")
        other.replace(file)
    else:
        file.write_text("second")
    assert (outbox.folder / name).read_text() == "first"
    outbox.acknowledge(outbox.read())
    assert not (outbox.folder / name).exists()


# With a store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    (folder / "mlflow.db").write_bytes(empty_store())
    tracker = make(folder)
    tracker.open()
    tracker.finalize("success")
    return folder


def test_keeping_brings_what_waits_into_the_database_and_tells_of_what_it_could_not_write(tmp_path: Path) -> None:
    """SQLite synchronises at such a checkpoint, unless it is told to synchronise never."""

    def kept() -> list[int]:
        """What the database has without the log beside it."""
        copy = tmp_path / "copy.db"
        copy.write_bytes((outbox.folder / "outbox.db").read_bytes())
        with closing(sqlite3.connect(copy)) as database:
            return [json.loads(text)["n"] for (text,) in database.execute("SELECT operation FROM waiting")]

    outbox = claim(tmp_path / "runs")
    outbox.append({"n": 0})
    assert outbox.keep()
    outbox.append({"n": 1})
    assert kept() == [0]
    assert outbox.keep()
    assert kept() == [0, 1]
    assert outbox._database is not None
    assert outbox._database.execute("PRAGMA synchronous").fetchone() != (0,)
    with full_disk(bytes_left_in_a_file=20):
        outbox.append({"n": "a" * 10_000})
        assert not outbox.keep()
    assert outbox.keep()
    assert kept() == [0, 1, "a" * 10_000]


def test_what_cannot_be_kept_on_the_disk_is_sent_at_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = make(store)
    tracker.open()
    assert tracker._sender is not None
    monkeypatch.setattr(tracker._sender.outbox, "keep", lambda: False)
    tracker.log_metrics({"a": 1.0}, 0)
    tracker.keep()
    assert history(store, tracker.version or "", "a") == [(0, 1.0)]
    tracker.finalize("success")


def test_a_full_disk_costs_nothing_but_time(store: Path) -> None:
    tracker = make(store)
    tracker.open()
    run_id = tracker.version or ""
    with full_disk(bytes_left_in_a_file=100_000):
        for step in range(1000):
            tracker.log_metrics({"a": step, "b": step}, step)
        assert not tracker.flush()
        for step in range(1000, 3000):  # now, the journal itself is full, too
            tracker.log_metrics({"a": step, "b": step}, step)
    tracker.finalize("success")
    assert history(store, run_id, "a") == [(step, step) for step in range(3000)]
    assert MlflowClient(f"sqlite:///{store}/mlflow.db").get_run(run_id).info.status == "FINISHED"


@pytest.mark.slow  # MLflow itself tries for half a minute
def test_a_locked_store_costs_no_time_and_gets_everything_once_when_it_is_free(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = make(store)
    tracker.open()
    run_id = tracker.version or ""
    with locked(store):
        for step in range(300):
            tracker.log_metrics({"a": step, "nan": math.nan}, step)
        assert not tracker.flush()
        start = time.monotonic()
        tracker.set_tags({"a": "b"})
        assert time.monotonic() - start < 2
    tracker.finalize("success")
    assert history(store, run_id, "a") == [(step, step) for step in range(300)]
    run = MlflowClient(f"sqlite:///{store}/mlflow.db").get_run(run_id)
    assert (run.info.status, run.data.tags["a"]) == ("FINISHED", "b")
    told = [record.getMessage().split(":")[0] for record in caplog.records]
    assert told == ["MLflow does not answer", "MLflow answers again, and gets what was kept."]
    assert not (store / "outbox" / run_id).exists()


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


def test_what_the_store_will_never_take_is_kept_apart_and_holds_up_nothing(
    store: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = make(store)
    tracker.open()
    assert tracker._sender is not None
    tracker.log_metrics({"a": 1.0}, 0)
    tracker._sender.put({"do": "log_metrics", "rows": [["a" * 300, 1.0, 1, 0]]})
    tracker.log_metrics({"a": 2.0}, 1)
    assert tracker.flush()
    assert history(store, tracker.version or "", "a") == [(0, 1.0), (1, 2.0)]
    assert caplog.records[0].getMessage().startswith("MLflow refuses 1 metric value:")
    folder = tracker._sender.outbox.folder
    assert json.loads((folder / "refused.jsonl").read_text())["rows"][0][0] == "a" * 300
    tracker.finalize("success")
    assert main(["sync", "--save_dir", str(store)]) == 1
    assert "MLflow refused 1 of it for good" in capsys.readouterr().err


def test_a_file_counts_as_sent_when_the_store_tells_of_it_and_not_when_it_says_yes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plots = tmp_path / "plots"
    (plots / "deep").mkdir(parents=True)
    (plots / "deep" / "a.txt").write_text("abc")
    tracker = make(store)
    tracker.open()
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", lambda *given: None)
        patch.setattr(MlflowClient, "log_text", lambda *given: None)
        tracker.log_artifact(plots, "figures")
        tracker.log_text("told", "notes/n.txt")
        tracker.finalize("success")
    assert tracker.version in [left.name for left in find_outboxes(store)]
    main(["sync", "--save_dir", str(store)])
    assert tracker.version not in [left.name for left in find_outboxes(store)]
    files = Path(MlflowClient(f"sqlite:///{store}/mlflow.db").get_run(tracker.version or "").info.artifact_uri)
    assert (files / "figures" / "plots" / "deep" / "a.txt").read_text() == "abc"
    assert (files / "notes" / "n.txt").read_text() == "told"


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


# Nothing waits for ever


class Slow:
    """A store that answers when it is told to: replaces how metrics are sent.

    Attributes:
        asked: set while a request is under way.
        answers: to be set for it to be answered.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.answers, self.before = threading.Event(), threading.Event(), threading.Event()
        send = MLflowRun.log_metrics

        def slow(run: MLflowRun, rows: Any) -> None:
            if not self.before.is_set():
                self.before.set()
                raise ConnectionError("away")
            self.asked.set()
            assert self.answers.wait(60)
            send(run, rows)

        monkeypatch.setattr(MLflowRun, "log_metrics", slow)


@pytest.mark.parametrize("answers_first", [True, False], ids=["before the meta-test", "during the meta-test"])
def test_a_request_that_outlasts_the_end_of_a_training_holds_up_no_meta_test_and_loses_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch, *, answers_first: bool
) -> None:
    monkeypatch.setattr(sender_module, "_FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(sender_module, "_STOP_S", 0.0)
    monkeypatch.setitem(PATIENCE_S, EndStatus.FINISHED, 0.0)
    slow = Slow(monkeypatch)
    tracker = make(store)
    tracker.open()
    sender = tracker._sender
    assert sender is not None
    tracker.log_metrics({"a": 1.0}, 0)
    assert slow.asked.wait(60)
    tracker.finalize("success")  # of the fit: the store has been away, and does not answer
    thread = sender._thread
    assert thread is not None
    if answers_first:
        slow.answers.set()
        thread.join(60)
    monkeypatch.setattr(sender_module, "_STOP_S", 60.0)
    monkeypatch.setitem(PATIENCE_S, EndStatus.FINISHED, 60.0)
    tracker.log_metrics({"a": 2.0}, 1)
    slow.answers.set()
    tracker.finalize("success")  # of the meta-test
    assert history(store, tracker.version or "", "a") == [(0, 1.0), (1, 2.0)]
    assert MlflowClient(f"sqlite:///{store}/mlflow.db").get_run(tracker.version or "").info.status == "FINISHED"
    assert not (store / "outbox" / (tracker.version or "")).exists()


def test_a_request_that_never_ends_is_not_waited_for_and_what_waits_is_kept(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sender_module, "_SILENT_S", 0.0)
    monkeypatch.setattr(sender_module, "_STOP_S", 0.0)
    slow = Slow(monkeypatch)
    slow.before.set()
    tracker = make(tmp_path, tracking_uri=f"sqlite:///{store}/mlflow.db")
    tracker.open()
    sender = tracker._sender
    assert sender is not None
    tracker.log_metrics({"a": 1.0}, 0)
    assert slow.asked.wait(60)
    tracker.finalize("success")
    assert "MLflow lacks 1 metric value" in caplog.records[-1].getMessage()
    thread = sender._thread
    assert thread is not None
    slow.answers.set()
    thread.join(60)  # it leaves the outbox to others when its request ends
    assert main(["sync", "--save_dir", str(tmp_path)]) == 0
    assert "the status FINISHED" in capsys.readouterr().out
    assert history(store, tracker.version or "", "a") == [(0, 1.0)]


def test_a_sending_thread_that_died_is_replaced(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = make(store)
    tracker.open()
    sender = tracker._sender
    assert sender is not None
    dead = sender._thread = threading.Thread(target=lambda: None)
    dead.start()
    dead.join()
    tracker.log_metrics({"a": 1.0}, 0)
    tracker.finalize("success")
    assert history(store, tracker.version or "", "a") == [(0, 1.0)]


# Passwords


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
