"""What waits reaches the store whole and once, whatever the store does, and holds up no training."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from dmaml_pl.__main__ import main
from dmaml_pl.tracking import sender as sender_module
from dmaml_pl.tracking.ending import PATIENCE_S, EndStatus
from dmaml_pl.tracking.mlflow_run import MLflowRun
from dmaml_pl.tracking.outbox import find_outboxes
from tests.tracked import full_disk, history, lay_opened_store, locked, make


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    lay_opened_store(folder)
    return folder


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
