"""Trainings of a study on clusters: SLURM's commands stand in for SLURM, a cluster of Ray's own for Ray."""

from __future__ import annotations

import os
import stat
import sys
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dmaml_pl.__main__ import main
from dmaml_pl.errors import ConfigError, DmamlError
from dmaml_pl.studies import cluster
from dmaml_pl.studies.cluster import Ray, Slurm, check_launcher, choose, read_resources, train
from dmaml_pl.studies.plan import Point, Training
from dmaml_pl.studies.runner import Ended, Job, Launcher, make

needs_submitit = pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed: dmaml_pl[slurm]")
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: dmaml_pl[ray]")

STANDS_IN = '''\
"""Stands in for `python -m dmaml_pl`: says where and as what it is, and ends as it is told."""
import os, sys, time
here = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "SLURM_NTASKS", "OMP_NUM_THREADS", "OURS")}
print(os.getcwd(), sys.argv[1:], here, flush=True)
open("begun-" + sys.argv[1], "a").write(f"{os.getpid()}\\n")
while sys.argv[2:] == ["waits"] and not os.path.exists("go"):
    time.sleep(0.05)
sys.exit(int(sys.argv[2]) if sys.argv[2:] and sys.argv[2].isdigit() else 0)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a study, in which another program is taken for this package."""
    there = tmp_path / "study"
    there.mkdir()
    (there / "dmaml_pl").mkdir()
    (there / "dmaml_pl" / "__main__.py").write_text(STANDS_IN)
    (there / "dmaml_pl" / "__init__.py").write_text(f"__path__.append({str(Path(cluster.__file__).parents[1])!r})")
    monkeypatch.chdir(there)
    return there


def job(folder: Path, name: str, *words: str, workers: int = 1) -> Job:
    return Job(Training(Point(name, workers), 0), (name, *words), folder / "logs" / f"{name}.log", None, workers, name)


def ended(jobs: list[Job], launcher: Launcher) -> dict[str, Ended]:
    return {each.job.key.point.label: each for each in make(jobs, len(jobs), launcher)}


# -- what is missing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_package_that_is_missing_is_told_with_the_extra_that_has_it(
    name: str, package: str, repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda _: None)
    config = ["--config", str(repository / "configs/sinusoid.yaml")]
    assert main(["study", "workers", *config, "--launcher", name]) == 1
    said = f"dmaml: error: --launcher {name} needs {package}: pip install 'dmaml_pl[{name}]'.\n"
    assert capsys.readouterr().err == said


def test_a_machine_without_slurm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="--launcher is slurm, but there is no sbatch on the PATH"):
        check_launcher("slurm")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "host:port"])
def test_a_ray_cluster_that_does_not_answer_is_told(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: name)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS is {address}, where no Ray cluster answers") as caught:
        check_launcher("ray")
    assert "\n" not in str(caught.value)


def test_resources_are_numbers_and_texts() -> None:
    words = ["time=120", "partition=long", "exclusive=true", 'additional_parameters={"licenses": "a"}', "mem=4GB"]
    assert read_resources(words, "slurm") == {
        "time": 120,
        "partition": "long",
        "exclusive": True,
        "additional_parameters": {"licenses": "a"},
        "mem": "4GB",
    }


# -- one training, wherever it is ----------------------------------------------------------------------------------


def test_a_training_on_another_machine_is_in_the_studys_folder_and_a_worker_of_nobody(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"SLURM_NTASKS": "1", "CUDA_VISIBLE_DEVICES": "3"}.items():
        monkeypatch.setenv(name, value)
    study = {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "0,1", "OURS": "kept"}
    code, said = train(["fit", "7"], folder, tmp_path / "logs" / "log", study)
    assert code == 7
    here = {"CUDA_VISIBLE_DEVICES": "3", "SLURM_NTASKS": None, "OMP_NUM_THREADS": "2", "OURS": "kept"}
    assert said == (tmp_path / "logs" / "log").read_text() == f"{folder} ['fit', '7'] {here}\n"


def test_a_machine_without_the_studys_folder_says_so(tmp_path: Path) -> None:
    code, said = train(["fit"], tmp_path / "none", tmp_path / "log", {})
    assert code == 1
    assert "the machines of a study share a disk" in said


# -- SLURM ---------------------------------------------------------------------------------------------------------

COMMANDS = {
    # A job is a process; its number is that, and its state by whether there is one.
    "sbatch": """\
        import subprocess, sys, re, os
        script = open(sys.argv[-1]).read()
        if "--partition=none" in script:
            sys.exit("sbatch: error: invalid partition specified: none")
        os.makedirs("scripts", exist_ok=True)
        own = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
        job = subprocess.Popen(
            ["bash", "-c", f'export SLURM_JOB_ID=$$; exec bash {sys.argv[-1]}'], env={**os.environ, **own},
            start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        open(f"scripts/{job.pid}", "w").write(script)
        print("Submitted batch job", job.pid)
    """,
    "srun": """\
        import os, sys
        words = sys.argv[1:]
        outputs = {}
        while words[0].startswith("--"):
            name = words.pop(0)
            if name in ("--output", "--error"):
                outputs[name] = words.pop(0).replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", "0")
        for name, number in (("--output", 1), ("--error", 2)):
            os.dup2(os.open(outputs[name], os.O_WRONLY | os.O_CREAT), number)
        os.execvp(words[0], words)
    """,
    "sacct": """\
        import os, sys
        print("JobID|State|NodeList")
        for job in [after for before, after in zip(sys.argv, sys.argv[1:]) if before == "-j"]:
            try:
                running = open(f"/proc/{job}/stat").read().rpartition(")")[2].split()[0] != "Z"
            except FileNotFoundError:
                running = False
            print(f"{job}|{'RUNNING' if running else 'FAILED'}|here")
    """,
    "scancel": """\
        import os, signal, sys
        os.killpg(int(sys.argv[1]), signal.SIGTERM)
    """,
}


@pytest.fixture
def slurm(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH on which there is something like SLURM."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in COMMANDS.items():
        file = commands / name
        file.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
        file.chmod(file.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    return folder


def of_slurm(folder: Path, **resources: Any) -> Launcher:
    check_launcher("slurm")
    return choose("slurm", resources, folder, "gpu")


@needs_submitit
def test_each_training_is_a_job_with_its_resources_and_its_exit_code_is_known(slurm: Path) -> None:
    jobs = [job(slurm, "a", workers=2), job(slurm, "b", "3")]
    codes = ended(jobs, of_slurm(slurm, partition="long", time=30))
    assert {name: each.code for name, each in codes.items()} == {"a": 0, "b": 3}
    assert codes["b"].last_words().startswith(f"{slurm} ['b', '3']")
    assert "'SLURM_NTASKS': None" in codes["b"].last_words()
    scripts = sorted((each.read_text() for each in (slurm / "scripts").iterdir()), key=lambda text: "=2" not in text)
    for script, workers in zip(scripts, (2, 1), strict=True):
        wanted = {"partition=long", "time=30", f"cpus-per-task={workers}", f"gpus-per-node={workers}", "nodes=1"}
        assert {f"#SBATCH --{each}" for each in wanted} <= set(script.splitlines())
    assert stat.S_IMODE((slurm / "slurm").stat().st_mode) == 0o700  # command lines may hold a password


@needs_submitit
def test_a_study_that_was_killed_takes_over_its_jobs(slurm: Path) -> None:
    waits = job(slurm, "waits", "waits")
    of_slurm(slurm).start(waits)  # and no more is heard of who did that
    second = of_slurm(slurm)
    assert second.goes_on(waits)
    made = make([waits], 1, second, on_wait=lambda _: (slurm / "go").touch())
    assert [each.code for each in made] == [0]
    assert len((slurm / "begun-waits").read_text().splitlines()) == 1
    assert not second.goes_on(waits)


@needs_submitit
def test_leaving_a_study_cancels_its_jobs(slurm: Path) -> None:
    waits = job(slurm, "waits", "waits")

    def leave(_: list[Job]) -> None:
        if (slurm / "begun-waits").exists():
            raise KeyboardInterrupt

    launcher = of_slurm(slurm)
    with pytest.raises(KeyboardInterrupt):
        list(make([waits], 1, launcher, on_wait=leave))
    assert not launcher.goes_on(waits)


@needs_submitit
def test_what_slurm_refuses_is_told_in_one_line(slurm: Path) -> None:
    with pytest.raises(ConfigError, match=r"--resources: Unavailable parameter\(s\): \['partitoin'\].*SLURM's are acc"):
        of_slurm(slurm, partitoin="long")
    with pytest.raises(DmamlError, match=r"SLURM takes no job: .*invalid partition specified: none") as caught:
        ended([job(slurm, "a")], of_slurm(slurm, partition="none"))
    assert "\n" not in str(caught.value)


@needs_submitit
def test_submitits_executor_for_this_machine_makes_trainings_too(folder: Path) -> None:
    import submitit

    launcher = Slurm(submitit.LocalExecutor(folder / "slurm"), {}, "cpu")
    assert ended([job(folder, "a", "3")], launcher)["a"].code == 3


# -- Ray -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of two nodes with a CPU each, of which the second has two GPUs that are none."""
    pytest.importorskip("ray", reason="Ray is not installed: dmaml_pl[ray]")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
    made.add_node(num_cpus=2, num_gpus=2)
    yield made
    import ray

    ray.shutdown()
    made.shutdown()


@pytest.fixture
def of_ray(nodes: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    monkeypatch.setenv("OURS", "kept")
    check_launcher("ray")
    return choose("ray", {}, folder, "auto")


@needs_ray
def test_each_training_is_a_task_of_ray_with_a_gpu_of_its_own_and_its_log_is_there(
    of_ray: Launcher, folder: Path
) -> None:
    jobs = [job(folder, "a", "waits"), job(folder, "b", "waits"), job(folder, "c", "3")]

    def go(_: list[Job]) -> None:
        if all((folder / f"begun-{name}").exists() for name in "ab"):
            (folder / "go").touch()

    codes = {each.job.key.point.label: each for each in make(jobs, 3, of_ray, on_wait=go)}
    assert {name: each.code for name, each in codes.items()} == {"a": 0, "b": 0, "c": 3}
    assert codes["c"].last_words().startswith(f"{folder} ['c', '3']")
    assert "'OURS': 'kept'" in codes["c"].last_words()
    seen = {codes[name].last_words().partition("'CUDA_VISIBLE_DEVICES': ")[2][:3] for name in "ab"}
    assert seen == {"'0'", "'1'"}  # at the same time


@needs_ray
def test_leaving_a_study_ends_its_tasks(of_ray: Launcher, folder: Path) -> None:
    def leave(_: list[Job]) -> None:
        if (folder / "begun-a").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(make([job(folder, "a", "waits")], 1, of_ray, on_wait=leave))
    process = int((folder / "begun-a").read_text())
    assert not Path(f"/proc/{process}").exists()


@needs_ray
def test_what_ray_does_not_know_is_told_in_one_line(of_ray: Launcher) -> None:
    with pytest.raises(ConfigError, match=r"Ray cannot be used \(RAY_ADDRESS, --resources\): .*gpus") as caught:
        Ray({"gpus": 1}, "auto")
    assert "\n" not in str(caught.value)
