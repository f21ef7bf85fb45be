"""compose.yaml, run by a real engine with the images of `make image-test`, and PostgreSQL."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.containers import DEADLINE_S, USER, Container, answers, engine, inspect, until
from tests.trainings import SMALL, flags
from tests.workers import free_port

pytestmark = [pytest.mark.image, pytest.mark.timeout(900)]

PASSWORD = "a/b c@d:e%20"  # noqa: S105 - what would break a URI


class Stack:
    """A project of the compose file."""

    def __init__(self, folder: Path, file: Path) -> None:
        self.name = f"dmaml-test-{os.getpid()}"
        self.port = free_port()
        postgres = os.environ.get("POSTGRES_IMAGE", "postgres:17")
        settings = folder / "settings"
        settings.write_text(
            f"POSTGRES_PASSWORD='{PASSWORD}'\nMLFLOW_PORT={self.port}\nPOSTGRES_IMAGE={postgres}\n"
            f"BASE_IMAGE={os.environ.get('BASE_IMAGE', 'python:3.11-slim')}\n"
        )
        self._command = [*shlex.split(os.environ.get("COMPOSE", "docker compose"))]
        self._command += ["--env-file", str(settings), "--file", str(file), "--project-name", self.name]

    def compose(self, *words: str) -> str:
        done = subprocess.run(
            [*self._command, *words], capture_output=True, text=True, timeout=2 * DEADLINE_S, check=False
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def container(self, service: str) -> str:
        labels = {"com.docker.compose.project": self.name, "com.docker.compose.service": service}
        words = [word for name, value in labels.items() for word in ("--filter", f"label={name}={value}")]
        return engine("ps", "--all", "--quiet", *words).stdout.strip()

    def is_healthy(self, service: str) -> bool:
        name = self.container(service)
        engine("healthcheck", "run", name, check=False)  # podman's, which needs systemd to look by itself
        state = inspect("container", name)["State"]
        return str((state.get("Health") or state.get("Healthcheck"))["Status"]) == "healthy"

    def query(self, statement: str) -> list[str]:
        words = ["exec", "--env", f"PGPASSWORD={PASSWORD}", self.container("postgres"), "psql", "--host", "127.0.0.1"]
        words += ["--username", "mlflow", "--tuples-only", "--no-align", "--command", statement]
        return engine(*words).stdout.split()


@pytest.fixture(scope="module")
def stack(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """PostgreSQL and the tracking server, both healthy."""
    stack = Stack(tmp_path_factory.mktemp("compose"), repository / "compose.yaml")
    try:
        for service in ("postgres", "mlflow"):
            stack.compose("up", "--detach", service)
            until(lambda service=service: stack.is_healthy(service))  # type: ignore[misc]
        yield stack
    finally:
        stack.compose("--profile", "torchrun", "down", "--volumes")


def test_the_server_answers_this_machine(stack: Stack) -> None:
    assert answers(f"http://127.0.0.1:{stack.port}/health")


def test_a_training_is_tracked_in_postgresql_and_its_files_in_the_servers_volume(stack: Stack) -> None:
    settings = flags(SMALL | {"trainer.logger.experiment_name": "small"})
    output = stack.compose("run", "--rm", "trainer", "fit", "--config", "configs/sinusoid.yaml", *settings)
    assert "http://mlflow:5000/#/experiments/" in output
    assert stack.query("SELECT status FROM runs") == ["FINISHED"]
    find = engine("exec", stack.container("mlflow"), "find", "/mlflow/artifacts", "-name", "*.ckpt", "-user", str(USER))
    assert {Path(line).name for line in find.stdout.split()} == {"best.ckpt", "last.ckpt"}


def test_two_trainers_join_in_one_training(stack: Stack) -> None:
    stack.compose("--profile", "torchrun", "up", "--detach", "worker-0", "worker-1")
    for service in ("worker-0", "worker-1"):
        container = Container(stack.container(service))
        assert container.wait() == 0, container.output
    client = MlflowClient(f"http://127.0.0.1:{stack.port}")
    experiment = client.get_experiment_by_name("sinusoid")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert (run.data.params["trainer.num_nodes"], run.data.params["trainer.devices"]) == ("2", "1")
    assert run.data.metrics["test/loss"] < 1
