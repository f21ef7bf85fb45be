"""Makes the screenshots of docs/tracking.md from real trainings.

    python -m docs.screenshots STORE EXPERIMENT

STORE is the folder of a tracking store (`mlruns`), EXPERIMENT the name of an experiment with some finished trainings.
"""

from __future__ import annotations

import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

from mlflow import MlflowClient

from dmaml_pl.tracking.views import table_page, view_page
from tests.browser import CHROMIUM, DRIVER, MISSING, browsing, curves, picture
from tests.workers import free_port

IMAGES = Path(__file__).with_name("images")


def main(store: str, experiment_name: str) -> None:
    """Take them all."""
    if CHROMIUM is None or DRIVER is None:
        sys.exit(MISSING)
    client = MlflowClient(f"sqlite:///{Path(store).absolute()}/mlflow.db")
    experiment = client.get_experiment_by_name(experiment_name)
    assert experiment is not None, f"there is no experiment {experiment_name}"  # noqa: S101 (a script of ours)
    number = experiment.experiment_id
    runs = client.search_runs([number])
    run, port = runs[0].info.run_id, free_port()
    command = [sys.executable, "-m", "dmaml_pl", "ui", "--save_dir", store, "--port", str(port)]
    with subprocess.Popen(command) as server, browsing(1400, 1150) as browser:  # noqa: S603 (our own arguments)
        try:
            _await(port)
            root, kind = f"http://127.0.0.1:{port}", "?workflowType=machine_learning"
            browser.open(f"{root}/{table_page(number, set(experiment.tags))}")
            browser.wait_for_text("matching runs", runs[0].info.run_name)
            browser.tidy()
            time.sleep(2)  # the panel slides away
            browser.screenshot(IMAGES / "ui_runs.png")
            browser.open(f"{root}/{view_page(number, 'by-tasks')}")
            browser.wait_for(curves(len(runs)))
            time.sleep(2)  # curves are drawn one after the other
            browser.screenshot(IMAGES / "ui_by_tasks.png")
            browser.open(f"{root}/#/experiments/{number}/runs/{run}{kind}")
            browser.wait_for_text("Show more", "Finished after")
            browser.evaluate("[...document.querySelectorAll('button')].find(b => b.innerText === 'Show more').click()")
            time.sleep(1)
            browser.screenshot(IMAGES / "ui_run.png")
            browser.open(f"{root}/#/experiments/{number}/runs/{run}/artifacts/figures/tasks.png{kind}")
            browser.wait_for(picture())
            time.sleep(1)
            browser.screenshot(IMAGES / "ui_figure.png")
        finally:
            server.terminate()


def _await(port: int) -> None:
    while True:
        try:
            connection = HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            connection.getresponse()
        except OSError:
            time.sleep(0.5)
        else:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
