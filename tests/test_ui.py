"""The UI, served by a real process on a real store."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dmaml_pl.errors import TrackingError
from dmaml_pl.tracking.tracker import MLflowTracker
from dmaml_pl.tracking.ui import main
from tests.browser import CHROMIUM, DRIVER, MISSING, Browser, browsing, curves, picture
from tests.trainings import empty_store

# MLflow 3.17 still asks SQLAlchemy 2.1 for a loader strategy that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

START_TIMEOUT_S = 60  # about 10 s alone; the machine may be busy with other tests

COMMAND = "import sys; from dmaml_pl.tracking.ui import main; sys.exit(main(sys.argv[1:]))"


class Served:
    """A store of one MLflow run, and the process that serves it."""

    def __init__(self, folder: Path) -> None:
        (folder / "mlflow.db").write_bytes(empty_store())
        self.figure = folder / "curve.png"
        Image.new("RGB", (600, 400), "white").save(self.figure)
        self.trackers = [self.log(str(folder), workers) for workers in (1, 2)]
        self.tracker = self.trackers[0]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, "--save_dir", str(folder), "--port", str(self.port)],
                stdout=out,
                stderr=err,
                env={**os.environ, "PYTHONPATH": str(Path.cwd())},
            )

    def log(self, folder: str, workers: int) -> MLflowTracker:
        tracker = MLflowTracker(run_name=f"{workers} workers", save_dir=folder, system_metrics=False)
        tracker.log_config({"lr": 0.1, "trainer": {"devices": workers}}, "lr: 0.1\n")
        for run in (1, 2, 3):
            tracker.log_metrics({"val/mse": 1 / run, "val/mse_ci95": 0.1}, run * 10)
            tracker.log_metrics({"train/run": run, "train/tasks_seen": run * 100 * workers}, run * 10)
        tracker.log_artifact(self.figure, "figures")
        tracker.finalize("success")
        return tracker

    def page(self, tracker: MLflowTracker) -> str:
        return f"http://127.0.0.1:{self.port}/{tracker.run_url}"

    @property
    def address(self) -> str:
        """Which the command tells to open."""
        return self.out.read_text().partition("open ")[2].partition(" ")[0]

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "open http" not in self.out.read_text():
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> str:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        assert answer.status == 200, text
        return text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("runs"))
    try:
        served.wait_until_ready()
        yield served
    finally:
        served.process.send_signal(signal.SIGTERM)
        served.process.wait(30)


def test_run_page_and_artifacts_are_served(served: Served) -> None:
    assert "<title>MLflow</title>" in served.ask("GET", "/")
    assert served.tracker.run_url is not None
    _, _, experiment_id, _, run_id = served.tracker.run_url.split("/")
    found = json.loads(served.ask("POST", "/api/2.0/mlflow/runs/search", {"experiment_ids": [experiment_id]}))
    assert {run["info"]["run_id"] for run in found["runs"]} == {tracker.version for tracker in served.trackers}
    assert run_id == served.tracker.version
    assert found["runs"][0]["info"]["status"] == "FINISHED"
    assert served.ask("GET", f"/get-artifact?path=config.yaml&run_id={run_id}") == "lr: 0.1\n"


def test_tracker_writes_to_a_server(served: Served, tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{served.port}"
    tracker = MLflowTracker("remote", tracking_uri=uri, save_dir=str(tmp_path / "runs"), system_metrics=False)
    tracker.log_config({"empty": "", "none": None, "long": "x" * 7000}, "a: b\n")
    tracker.log_metrics({"loss": 1.0, "nan": float("nan"), "inf": float("inf")}, 7)
    tracker.save()
    tracker.finalize("failed")
    found = json.loads(served.ask("GET", f"/api/2.0/mlflow/runs/get?run_id={tracker.version}"))["run"]
    params = {param["key"]: param.get("value", "") for param in found["data"]["params"]}
    assert params == {"empty": "", "none": "null", "long": "x" * 6000, "long.part2": "x" * 1000}
    assert {metric["key"]: metric["step"] for metric in found["data"]["metrics"]} == {"loss": 7, "nan": 7, "inf": 7}
    assert found["info"]["status"] == "FAILED"
    assert served.ask("GET", f"/get-artifact?path=config.yaml&run_id={tracker.version}") == "a: b\n"
    assert tracker.ui_command() == f"{uri}/{tracker.run_url}"
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip(MISSING)
    with browsing() as browser:
        yield browser


def test_the_page_opens_on_the_trainings_with_their_metric_and_main_settings(served: Served, browser: Browser) -> None:
    browser.open(served.address)
    browser.wait_for_text("1 workers", "2 workers", "matching runs", "val/mse", "trainer.devices", "0.333")
    assert browser.evaluate("document.title").endswith("MLflow")
    assert "val/accuracy" not in browser.text()


def test_the_description_tells_the_figures_and_leads_to_curves_of_all_trainings_over_the_tasks_they_have_seen(
    served: Served, browser: Browser
) -> None:
    browser.open(served.page(served.trackers[1]))
    browser.wait_for_text("Finished after 3 runs and 600 tasks seen", "val/mse 0.3333 ± 0.1")
    for view, axis in (("by-run", "train/run"), ("by-tasks", "train/tasks_seen")):
        browser.open(served.page(served.trackers[1]))
        link = f"document.querySelector('a[href*=\"viewStateShareKey={view}\"]')"
        browser.wait_for(f"{link} !== null")
        browser.open(browser.evaluate(f"{link}.href"))
        browser.wait_for(curves(2))
        titles = browser.evaluate("[...document.querySelectorAll('.xtitle')].map(title => title.textContent)")
        assert set(titles) == {axis}


def test_the_metric_chart_and_the_figure_of_a_training_are_shown(served: Served, browser: Browser) -> None:
    browser.open(f"{served.page(served.tracker)}/model-metrics")
    browser.wait_for_text("val/mse")
    browser.wait_for(curves(1))
    browser.open(f"{served.page(served.tracker)}/artifacts/figures/curve.png")
    browser.wait_for(picture())


def test_port_in_use(served: Served) -> None:
    with pytest.raises(TrackingError, match="--port"):
        main(["--save_dir", served.tracker._save_dir, "--port", str(served.port)])


def test_ctrl_c_ends_it_quietly(served: Served) -> None:
    """The last test: it ends the server. It opens on the newest experiment's trainings."""
    assert served.tracker.run_url is not None
    table = "runs?workflowType=machine_learning&viewStateShareKey=table"
    uri = f"http://127.0.0.1:{served.port}/#/experiments/{served.tracker.run_url.split('/')[2]}/{table}"
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(30) == 0
    assert served.out.read_text().strip() == f"MLflow is starting ... open {uri} (Ctrl-C stops it)"
    assert served.err.read_text() == ""
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", served.port))


def test_missing_store(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"dmaml fit.*--save_dir"):
        main(["--save_dir", str(tmp_path)])


def test_foreign_file(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"x" * 5000)
    with pytest.raises(TrackingError, match="--save_dir"):
        main(["--save_dir", str(tmp_path)])
