"""The MLflow model that `dmaml fit --register` leaves: loaded, and served by MLflow's own server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient

import dmaml_pl
from data_modules import Glyphs, Sinusoid
from dmaml_pl.cli.run import run
from dmaml_pl.serving.register import save_model
from dmaml_pl.tracking.tracker import MLflowTracker
from tests.adapting import LETTERS_SEEN, SINES, first_task
from tests.trainings import dmaml, environment

START_TIMEOUT_S = 120  # the machine may be busy with other tests

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def store(checkpoint: Path) -> str:
    return f"sqlite:///{checkpoint.parents[1]}/mlruns/mlflow.db"


def experiment_of(client: MlflowClient, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    return str(experiment.experiment_id)


def test_a_training_registers_a_ready_model_with_signature_and_example(sines: Path) -> None:
    client = MlflowClient(store(sines), registry_uri=store(sines))
    (version,) = client.search_model_versions("name='sines'")
    (found,) = client.search_runs([experiment_of(client, "dmaml")])
    assert (str(version.version), version.status, version.run_id) == ("1", "READY", found.info.run_id)
    assert found.info.status == "FINISHED"
    assert found.outputs is not None
    (output,) = found.outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert (logged.name, logged.status) == ("sines", "READY")
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "sines", "version": "1"}]


def test_the_registered_model_loads_and_answers_as_python_does(sines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.setattr(sys, "path", sys.path.copy())  # to which MLflow adds the model's own code
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store(sines))  # `set_tracking_uri` would set it for good
    model = mlflow.pyfunc.load_model("models:/sines/1")
    assert [spec.name for spec in model.metadata.signature.inputs] == ["support_x", "support_y", "query_x"]
    assert {name: array.shape for name, array in model.input_example.items()} == {
        "support_x": (10, 1),
        "support_y": (10, 1),
        "query_x": (2, 1),
    }
    learner, task = dmaml_pl.load(sines), first_task(Sinusoid())
    asked = {name: getattr(task, name).numpy() for name in ("support_x", "support_y", "query_x")}
    for params, steps in ((None, 2), ({"steps": 5}, 5)):
        expected = learner.adapt(task.support_x, task.support_y, steps).predict(task.query_x)
        np.testing.assert_array_equal(model.predict(asked, params=params), expected.numpy())


def test_a_model_holds_the_code_of_a_network_of_ones_own(sines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own_nets.py").write_text("from dmaml_pl import MLP\nclass Wide(MLP):\n    pass\n")
    monkeypatch.syspath_prepend(".")
    learner = dmaml_pl.load(sines)
    assert learner.config is not None
    learner.config["model"]["init_args"]["network"]["class_path"] = "own_nets.Wide"
    save_model(learner, first_task(Sinusoid()), Path("model"))
    assert {path.name for path in Path("model/code").iterdir()} == {"dmaml_pl", "data_modules", "own_nets.py"}
    assert "torch==" in Path("model/requirements.txt").read_text()


def test_a_model_that_cannot_be_logged_costs_the_model_only(sines: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = MLflowTracker("unlucky", tracking_uri=store(sines), system_metrics=False)
    tracker.open()

    def fail(folder: Path, record: object) -> None:
        raise OSError("the disk is full")

    assert tracker.log_model("sines", fail) is None
    assert [record.getMessage() for record in caplog.records] == [
        "MLflow did not take the model sines: the disk is full. The training goes on."
    ]
    tracker.finalize("success")
    client = MlflowClient(store(sines))
    assert not client.search_logged_models([experiment_of(client, "unlucky")])
    assert client.get_run(str(tracker.version)).info.status == "FINISHED"


def test_a_model_that_cannot_be_sent_is_kept_and_registered_once(
    sines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MLflowTracker("late", tracking_uri=store(sines), save_dir=str(tmp_path), system_metrics=False)
    tracker.open()
    create = MlflowClient.create_model_version

    def create_and_fail(client: MlflowClient, *args: Any, **settings: Any) -> None:
        create(client, *args, **settings)
        raise ConnectionError("the answer was lost")

    monkeypatch.setattr(MlflowClient, "create_model_version", create_and_fail)
    learner = dmaml_pl.load(sines)
    assert tracker.log_model("late", partial(save_model, learner, first_task(Sinusoid()))) is None
    tracker.finalize("success")
    client = MlflowClient(store(sines))
    (logged,) = client.search_logged_models([experiment_of(client, "late")])
    (version,) = client.search_model_versions("name = 'late'")
    assert (logged.status, version.source, version.run_id) == ("READY", logged.artifact_location, tracker.version)
    answers = mlflow.pyfunc.load_model(logged.artifact_location)
    assert answers.metadata.model_id == logged.model_id


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--register=a/b"], "register is 'a/b', but must be a name without / and :."),
        (["--register=a", "--trainer.logger=false"], "needs trainer.logger to be dmaml_pl.MLflowTracker."),
        (["--register=a", "--trainer.enable_checkpointing=false"], "needs trainer.enable_checkpointing to be true."),
    ],
)
def test_a_model_that_could_not_be_registered_is_told_before_training(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's call
    Path("config.yaml").write_text(yaml.safe_dump(SINES))
    assert run(["fit", "--config", "config.yaml", *words]) == 1
    said = capfd.readouterr().err
    assert said.startswith("dmaml: error: ")
    assert said.endswith(f"{message}\n")
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_worker_0_of_two_registers_a_model_that_mlflow_serves(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(LETTERS_SEEN))
    words = ["--trainer.devices=2", "--register=letters", "--checkpoint.dirpath=kept"]
    done = dmaml(tmp_path, "fit", "--config", "config.yaml", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Registered in MLflow: models:/letters/1") == 1
    (version,) = MlflowClient(*[f"sqlite:///{tmp_path}/mlruns/mlflow.db"] * 2).search_model_versions("name='letters'")

    learner, task = dmaml_pl.load(tmp_path / "kept" / "best.ckpt"), first_task(Glyphs(queries=2))
    inputs = {name: getattr(task, name).tolist() for name in ("support_x", "support_y", "query_x")}
    with served(tmp_path, str(version.source)) as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps({"inputs": inputs, "params": {"steps": 3}})
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = json.loads(answer.read())
        connection.close()
    assert answer.status == 200, content
    expected = learner.adapt(task.support_x, task.support_y, 3).predict(task.query_x)
    torch.testing.assert_close(torch.tensor(content["predictions"]), expected)


@contextmanager
def served(folder: Path, model: str) -> Iterator[int]:
    """`mlflow models serve`; the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["models", "serve", "-m", model, "--env-manager", "local", "-p", str(port), "-w", "1"]
    programs = Path(sys.executable).parent  # MLflow starts uvicorn by its name
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            cwd=folder,
            env=environment() | {"MLFLOW_DISABLE_TELEMETRY": "true", "PATH": f"{programs}:{os.environ['PATH']}"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(port):
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield port
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def answers(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
