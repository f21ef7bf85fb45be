"""The container images, run by a real engine: `make image-test` builds them and runs these."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.containers import CLOSED, SERVER, TRAINER, USER, answers, engine, inspect, started, until
from tests.trainings import SMALL, flags
from tests.workers import free_port

pytestmark = [pytest.mark.image, pytest.mark.timeout(900)]

FIT = ["fit", "--config", "configs/sinusoid.yaml"]
LONG = SMALL | {"trainer.max_steps": 1_000_000}


@pytest.fixture(scope="module")
def network() -> Iterator[str]:
    name = f"dmaml-test-{os.getpid()}"
    engine("network", "create", name)
    yield name
    engine("network", "rm", name)


@pytest.fixture(scope="module")
def server(network: str) -> Iterator[MlflowClient]:
    """The tracking server in a container of its own, which others in the network call mlflow."""
    port = free_port()
    words = ["--network", network, "--network-alias", "mlflow", "--publish", f"127.0.0.1:{port}:5000", *CLOSED]
    words += ["--env", "MLFLOW_SERVER_ALLOWED_HOSTS=mlflow:5000,127.0.0.1:*"]
    with started(*words, SERVER, name="mlflow") as container:
        until(lambda: answers(f"http://127.0.0.1:{port}/health"), lambda: container.running)
        yield MlflowClient(f"http://127.0.0.1:{port}")


def newest(client: MlflowClient, experiment: str = "sinusoid") -> Run | None:
    found = client.get_experiment_by_name(experiment)
    runs = [] if found is None else client.search_runs([found.experiment_id], max_results=1)
    return runs[0] if runs else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this machine that belongs to the user in the image, or else to this one."""
    folder = tmp_path_factory.mktemp("volume")
    if os.getuid() == 0:
        os.chown(folder, USER, USER)
    return folder


@pytest.fixture(scope="module")
def trainer(network: str, folder: Path) -> list[str]:
    """How a training is run: its only way out are the volumes and the network."""
    words = ["--network", network, "--env", "MLFLOW_TRACKING_URI=http://mlflow:5000", *CLOSED]
    if os.getuid() != 0:
        words += ["--user", f"{os.getuid()}:{os.getgid()}", "--env", "HOME=/tmp"]
    return [*words, "--volume", f"{folder}:/app/mlruns"]


@dataclass
class Stopped:
    code: int
    output: str
    run: Run
    checkpoint: Path

    @property
    def step(self) -> int:
        return int(torch.load(self.checkpoint, weights_only=True)["global_step"])


@pytest.fixture(scope="module")
def stopped(trainer: list[str], server: MlflowClient, folder: Path) -> Stopped:
    """A training that `docker stop` ended in its midst."""
    with started(*trainer, TRAINER, *FIT, *flags(LONG), name="stopped") as container:

        def trains() -> bool:
            run = newest(server)
            return run is not None and "train/loss" in run.data.metrics

        until(trains, lambda: container.running)
        code, output = container.stop(), container.output
    run = newest(server)
    assert run is not None
    (checkpoint,) = folder.glob("checkpoints/sinusoid/*/checkpoints/last.ckpt")
    return Stopped(code, output, run, checkpoint)


def test_the_image_runs_as_a_user_with_a_number_and_holds_no_compiler() -> None:
    assert inspect("image", TRAINER)["Config"]["User"] == f"{USER}:{USER}"
    assert inspect("image", SERVER)["Config"]["User"] == f"{USER}:{USER}"
    for image in (TRAINER, SERVER):
        command = "command -v gcc g++ cc c++ clang; find / -xdev -type d -perm -0002 ! -perm -1000 2>/dev/null"
        done = engine("run", "--rm", "--entrypoint", "sh", image, "-c", command, check=False)
        assert done.stdout == "", "a compiler, or a folder that everybody may write"


def test_its_volumes_are_mlruns_data_and_what_is_kept_between_trainings() -> None:
    assert set(inspect("image", TRAINER)["Config"]["Volumes"]) == {"/app/mlruns", "/app/data", "/home/dmaml"}


def test_without_a_command_it_shows_the_usage() -> None:
    assert engine("run", "--rm", *CLOSED, TRAINER).stdout.startswith("usage: dmaml COMMAND")


def test_a_mistake_is_one_line_and_a_nonzero_exit_code() -> None:
    done = engine("run", "--rm", *CLOSED, TRAINER, *FIT, "--trainer.max_steps=soon", check=False)
    assert done.returncode != 0
    (line,) = (done.stdout + done.stderr).strip().splitlines()
    assert "trainer.max_steps" in line


def test_stopped_while_it_loads_it_ends_at_once() -> None:
    with started(*CLOSED, TRAINER, *FIT, name="loading") as container:
        assert container.stop() == 143


def test_stopped_in_training_it_ends_with_143_and_status_killed(stopped: Stopped) -> None:
    assert stopped.code == 143, stopped.output
    assert stopped.run.info.status == "KILLED"
    assert "Stopped. The last merge is kept in " in stopped.output
    assert stopped.output.strip().endswith("--ckpt_path last")


def test_stopped_in_training_it_leaves_the_last_merge_in_the_volume_as_its_user(stopped: Stopped, folder: Path) -> None:
    assert stopped.step > 0
    owner = USER if os.getuid() == 0 else os.getuid()
    assert {path.stat().st_uid for path in folder.rglob("*")} == {owner}


def test_mlflow_knows_the_commit_of_the_image(stopped: Stopped) -> None:
    commit = inspect("image", TRAINER)["Config"]["Labels"]["org.opencontainers.image.revision"]
    assert len(commit.removesuffix("-dirty")) == 40
    assert stopped.run.data.tags["dmaml.git_commit"] == commit.removesuffix("-dirty")


def test_a_new_container_goes_on_to_the_end_in_the_same_mlflow_run(
    stopped: Stopped, trainer: list[str], server: MlflowClient
) -> None:
    step = stopped.step
    settings = LONG | {"trainer.max_steps": step + 200}
    with started(*trainer, TRAINER, *FIT, *flags(settings), "--ckpt_path=last", name="resumed") as container:
        assert container.wait() == 0, container.output
    run = newest(server)
    assert run is not None
    assert (run.info.run_id, run.info.status) == (stopped.run.info.run_id, "FINISHED")
    assert stopped.step == step + 200
    steps = [point.step for point in server.get_metric_history(run.info.run_id, "train/loss")]
    assert len(steps) == len(set(steps))
    assert max(steps) >= step


def test_two_containers_that_torchrun_joins_train_together(trainer: list[str], server: MlflowClient) -> None:
    launch = ["--", "torchrun", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    launch += ["--rdzv-endpoint=first:29400", "--rdzv-id=dmaml", "-m", "dmaml_pl", *FIT, *flags(SMALL)]
    launch += ["--checkpoint.dirpath=mlruns/jobs/two", "--ckpt_path=auto"]
    words = [*trainer, "--env", "OMP_NUM_THREADS=1", "--entrypoint", "tini"]
    with (
        started(*words, "--network-alias", "first", "--hostname", "first", TRAINER, *launch, name="first") as first,
        started(*words, TRAINER, *launch, name="second") as second,
    ):
        assert first.wait() == 0, first.output
        assert second.wait() == 0, second.output
        assert "of 2 workers" in first.output + second.output
    run = newest(server)
    assert run is not None
    assert run.info.status == "FINISHED"
    assert (run.data.params["trainer.num_nodes"], run.data.params["trainer.devices"]) == ("2", "1")


def test_without_a_compiler_model_compile_has_no_effect_and_says_so_in_one_line() -> None:
    settings = SMALL | {"model.compile": "true", "model.engine": "vectorized", "trainer.devices": 1}
    done = engine("run", "--rm", *CLOSED, TRAINER, *FIT, *flags(settings))
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "model.compile" in line]
    assert line.startswith("model.compile has no effect: compiling failed (")
    assert "InvalidCxxCompiler" in line


def test_letters_are_rendered_into_the_volume_that_is_kept_between_trainings() -> None:
    volume = f"dmaml-test-{os.getpid()}"
    settings: dict[str, Any] = {
        "trainer.max_steps": 2,
        "trainer.strategy.run_length": 1,
        "data.meta_batch": 1,
        "data.val_tasks": 2,
        "meta_test": "false",
    }
    words = ["run", "--rm", *CLOSED, "--volume", f"{volume}:/home/dmaml"]
    try:
        engine(*words, TRAINER, "fit", "--config", "configs/glyphs.yaml", *flags(settings))
        found = engine(*words, "--entrypoint", "find", TRAINER, "/home/dmaml", "-name", "*.pixels", "-user", str(USER))
    finally:
        engine("volume", "rm", volume)
    assert "/home/dmaml/.cache/dmaml_pl/" in found.stdout
