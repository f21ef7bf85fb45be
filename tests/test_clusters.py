"""The same config under torchrun, SLURM and Kubernetes, by the environment variables that each of them sets."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmaml_pl.errors import ConfigError
from dmaml_pl.launching.clusters import Launch
from tests import forked
from tests.trainings import SETTINGS, Training, environment, flags, lay_store, of, same_weights
from tests.workers import free_port

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NAME": "dmaml",
    "SLURM_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_CPUS_PER_TASK": "1",
}


def slurm(rank: int, port: int) -> dict[str, str]:
    """Two machines with a task each."""
    own = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1"}
    return SLURM | own | {"MASTER_PORT": str(port)}


def pytorchjob(rank: int, port: int) -> dict[str, str]:
    """Master and worker without torchrun."""
    return {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}


def trainjob(rank: int, port: int) -> dict[str, str]:
    """torchrun with what the runtime `torch-distributed` tells it."""
    return {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "1",
        "PET_NODE_RANK": str(rank),
        "PET_MASTER_ADDR": "localhost",
        "PET_MASTER_PORT": str(port),
    }


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        (slurm, []),
        pytest.param(pytorchjob, [], marks=pytest.mark.slow),
        pytest.param(trainjob, ["-m", "torch.distributed.run"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_that_a_cluster_starts_train_together(
    variables: Any, launcher: list[str], undisturbed: Training, tmp_path: Path, sinusoid: str
) -> None:
    port = free_port()
    words = ["fit", "--config", sinusoid, *flags(SETTINGS)]  # two devices on one machine
    lay_store(tmp_path)
    processes = [
        start(launcher, words, tmp_path, environment() | {"OMP_NUM_THREADS": "1"} | variables(rank, port))
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    training = of(tmp_path)
    assert same_weights(training.checkpoint("last"), undisturbed.checkpoint("last"))
    assert training.run.info.status == "FINISHED"
    assert training.run.data.params["trainer.num_nodes"] == "2"
    assert training.run.data.params["trainer.devices"] == "1"
    assert "of 2 workers" in errors[0]


def start(launcher: list[str], words: list[str], folder: Path, told: dict[str, str]) -> Any:
    """A process that has what `subprocess.Popen` has."""
    if not launcher:
        return forked.Command(words, folder, told)
    command = [sys.executable, *launcher, "-m", "dmaml_pl", *words]
    return subprocess.Popen(command, cwd=folder, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_"))]:
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_process_that_nobody_has_started_as_a_worker_starts_its_own(bare: pytest.MonkeyPatch) -> None:
    assert Launch.detect() is None


def test_a_worker_that_our_own_launcher_has_started_is_left_to_it(bare: pytest.MonkeyPatch) -> None:
    for name, value in pytorchjob(0, 1).items() | {("LOCAL_RANK", "1")}:
        bare.setenv(name, value)
    assert Launch.detect() is None


def test_slurm_must_say_how_many_tasks_a_machine_has(bare: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        bare.setenv(name, value)
    with pytest.raises(ConfigError, match="give sbatch --ntasks-per-node"):
        Launch.detect()


def test_slurm_is_not_to_requeue_from_within_a_signal_handler(bare: pytest.MonkeyPatch) -> None:
    for name, value in slurm(0, 1).items():
        bare.setenv(name, value)
    launch = Launch.detect()
    assert launch is not None
    assert not launch.environment.auto_requeue  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("devices", "expected"), [(4, 2), ("auto", 2), ([2, 3], [2, 3]), ("2,3", "2,3"), ([1], 2), ("0,", 2)]
)
def test_the_launchers_numbers_stand_but_chosen_devices_stay(devices: Any, expected: Any) -> None:
    trainer = {"devices": devices, "num_nodes": 1}
    Launch(machines=3, workers=2).apply(trainer)
    assert trainer == {"devices": expected, "num_nodes": 3}


def test_a_launcher_that_has_started_fewer_workers_than_were_asked_for_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Launch(machines=1, workers=1).apply({"devices": 4})
    assert capsys.readouterr().err.startswith("trainer.devices is 4, but there is 1 worker: this command is the 1 task")
    for trainer, launch in (({"devices": 1}, Launch(1, 1)), ({"devices": 4}, Launch(2, 2))):
        launch.apply(trainer)
    assert capsys.readouterr().err == ""


def test_torchrun_without_arguments_tells_its_usage(repository: Path) -> None:
    done = subprocess.run([repository / "deploy" / "torchrun.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: deploy/torchrun.sh MACHINES WORKERS_PER_MACHINE FIRST_MACHINE[:PORT]")


# -- the files in deploy/ ------------------------------------------------------------------------------------------


def command_of(file: Path) -> list[str]:
    """What follows `-m dmaml_pl` in a file of deploy/."""
    if file.suffix == ".yaml":
        *_, job = yaml.safe_load_all(file.read_text())
        spec = job["spec"]
        if "trainer" in spec:
            words = spec["trainer"]["command"]
        else:
            pods = spec["template"] if "template" in spec else spec["pytorchReplicaSpecs"]["Worker"]["template"]
            (container,) = pods["spec"]["containers"]
            words = container["command"]
        return list(words[words.index("dmaml_pl") + 1 :])
    text = file.read_text().replace("\\\n", " ")
    (line,) = re.findall(r"-m dmaml_pl (.*)", text)
    return shlex.split(line.replace("${CONFIG:-configs/sinusoid.yaml}", "configs/sinusoid.yaml").replace(' "$@"', ""))


FILES = ["torchrun.sh", "slurm.sbatch", "pytorchjob.yaml", "trainjob.yaml", "elastic.yaml"]


@pytest.mark.parametrize("name", FILES)
def test_the_command_in_every_file_goes_on_with_its_own_training(name: str, repository: Path) -> None:
    words = " ".join(command_of(repository / "deploy" / name)).replace("=", " ")
    assert words.startswith("fit --config configs/sinusoid.yaml --")
    assert "--checkpoint.dirpath " in words
    assert words.endswith("--ckpt_path auto")


def test_our_parser_takes_what_the_files_contain(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dmaml_pl.cli.run import run

    os.chdir(repository)
    for name in FILES:
        with pytest.raises(SystemExit) as stop:
            run([*command_of(repository / "deploy" / name), "--print_config"])
        assert stop.value.code == 0
        assert yaml.safe_load(capsys.readouterr().out)["checkpoint"]["dirpath"]


def test_our_parser_takes_the_commands_of_the_compose_file(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dmaml_pl.cli.run import run

    os.chdir(repository)
    services = yaml.safe_load((repository / "compose.yaml").read_text())["services"]
    for name in ("trainer", "elastic-0", "elastic-1", "gpu"):
        words = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in services[name]["command"]]
        assert words[0] == "fit"
        with pytest.raises(SystemExit) as stop:
            run([*words, "--print_config"])
        assert stop.value.code == 0
        found = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]["init_args"]
        assert found["elastic"] is name.startswith("elastic")


def test_the_manifests_have_the_fields_that_their_operators_ask_for(repository: Path) -> None:
    job = yaml.safe_load((repository / "deploy" / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert job["spec"]["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    assert worker["template"]["spec"]["containers"][0]["name"] == "pytorch"
    job = yaml.safe_load((repository / "deploy" / "trainjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"]["runtimeRef"]["name"] == "torch-distributed"
    service, lighthouse, job = yaml.safe_load_all((repository / "deploy" / "elastic.yaml").read_text())
    assert [each["kind"] for each in (service, lighthouse, job)] == ["Service", "Deployment", "Job"]
    assert service["spec"]["selector"] == lighthouse["spec"]["template"]["metadata"]["labels"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    told = {entry["name"]: entry.get("value") for entry in container["env"]}
    address = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert told["TORCHFT_LIGHTHOUSE"] == address
    assert f"--trainer.num_nodes={job['spec']['parallelism']}" in container["command"]
    job = yaml.safe_load((repository / "deploy" / "trainjob.yaml").read_text())
    reserved = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
    assert not reserved & {entry["name"] for entry in job["spec"]["trainer"]["env"]}


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_the_scripts_are_valid_bash(name: str, repository: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    assert subprocess.run([bash, "-n", repository / "deploy" / name], check=False).returncode == 0
