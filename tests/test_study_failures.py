"""Studies whose trainings fail, are stopped or killed, and how a study's trainings are started and ended."""

from __future__ import annotations

import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dmaml_pl.__main__ import main
from dmaml_pl.studies import local
from dmaml_pl.studies.local import Gpus, Local, server
from dmaml_pl.studies.runner import Job, Launcher, make
from tests.studied import Studied, study, words_of
from tests.trainings import lay_store
from tests.workers import ends

FRAGILE = '''\
"""A network that misbehaves in the training (not in the checks before it) as the environment says."""
import os, signal, torch
from pathlib import Path
from dmaml_pl import MLP

class Fragile(MLP):
    def forward(self, x):
        if torch.distributed.is_initialized() and torch.is_grad_enabled() and not Path("mended").exists():
            Path(f"worker-{os.getpid()}").touch()
            exec(os.environ.get("DO", ""))
        return super().forward(x)
'''


@pytest.fixture
def fragile(tmp_path: Path) -> Path:
    """The current folder, where a network may misbehave."""
    (tmp_path / "fragile_network.py").write_text(FRAGILE)
    lay_store(tmp_path)
    return tmp_path


NETWORK = "--model.network=fragile_network.Fragile"


# -- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failed_training_is_told_and_made_again_by_the_same_command(
    repository: Path, fragile: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DO", "if os.environ['PL_GLOBAL_SEED'] == '1': os.kill(os.getpid(), signal.SIGKILL)")
    first = study(repository, fragile, capsys, "workers", "--workers", "1", "--seeds", "2", NETWORK)
    assert first.code == 1
    assert re.search(r"1 worker, seed 1: failed", first.printed)
    assert "dmaml: error: 1 training failed: 1 worker, seed 1" in first.printed
    assert first.parent.info.status == "FAILED"
    assert sorted(run.info.status for run in first.children) == ["FAILED", "FINISHED"]
    assert [row["seeds"] for row in first.table()] == ["1"]

    (fragile / "mended").touch()
    assert main(first.words) == 0
    assert sorted(run.info.status for run in first.children) == ["FAILED", "FINISHED", "FINISHED"]
    assert first.parent.info.status == "FINISHED"
    assert [row["seeds"] for row in first.table()] == ["2"]


def workers_of(folder: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in folder.glob("worker-*")]


def test_ctrl_c_ends_the_trainings_and_says_that_the_same_command_goes_on(
    repository: Path, fragile: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDY", str(os.getpid()))
    again = "Path('told').exists() or (Path('told').touch(), os.kill(int(os.environ['STUDY']), signal.SIGINT))"
    monkeypatch.setenv("DO", again)
    endless = ("--trainer.max_steps", "1000000", "--model.compile", "false")
    done = study(repository, fragile, capsys, "workers", "--workers", "2", "--seeds", "1", NETWORK, *endless)
    assert done.code == 130
    assert "The same command goes on" in done.printed
    assert [run.info.status for run in done.children] == ["KILLED"]
    assert done.parent.info.status == "KILLED"
    assert len(workers_of(fragile)) in (1, 2)
    assert all(ends(worker, within_s=0) for worker in workers_of(fragile))


@pytest.mark.slow  # test_fork_server has what becomes of what a killed process had forked
def test_trainings_do_not_outlive_a_study_that_is_killed(repository: Path, fragile: Path) -> None:
    words = words_of(repository, fragile, "workers", "--workers", "1", "--seeds", "1", NETWORK)
    words += ["--model.compile=false"]  # which a loaded machine does not finish within its patience
    doing = "Path('told').exists() or (Path('told').touch(), os.kill(int(os.environ['STUDY']), signal.SIGKILL))"
    code = (
        f"import os; os.environ.update(STUDY=str(os.getpid()), DO={doing!r});"
        f"from dmaml_pl.__main__ import main; main({[*words, '--trainer.max_steps=1000000']!r})"
    )
    process = server().fork(dict(os.environ), partial(exec, code))
    assert process.wait(200) == -signal.SIGKILL
    (worker,) = workers_of(fragile)
    assert ends(worker, within_s=60)
    assert [run.info.status for run in Studied(fragile, "workers", words, 0, "").children] == ["KILLED"]


def test_a_study_whose_processes_are_all_killed_repeats_nothing_that_was_finished(
    repository: Path, fragile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # benchmarks/kill_study.py does it at random moments, and often
    words = words_of(repository, fragile, "workers", "--workers", "1", "--seeds", "2", NETWORK)
    second = "os.environ['PL_GLOBAL_SEED'] == '1' and not Path('told').exists()"
    doing = f"{second} and (Path('told').touch(), os.killpg(int(os.environ['STUDY']), signal.SIGKILL))"
    code = (
        f"import os; os.setsid(); os.environ.update(STUDY=str(os.getpid()), DO={doing!r});"
        f"from dmaml_pl.__main__ import main; main({words!r})"
    )
    assert server().fork(dict(os.environ), partial(exec, code)).wait(200) == -signal.SIGKILL
    done = Studied(fragile, "workers", words, main(words), "".join(capsys.readouterr()))
    assert done.code == 0
    assert "1 of 2 trainings are known already" in done.printed
    made = sorted((run.data.params["seed_everything"], run.info.status) for run in done.children)
    assert made == [("0", "FINISHED"), ("1", "FINISHED"), ("1", "KILLED")]


# -- jobs ----------------------------------------------------------------------------------------------------------


def test_a_job_that_is_hopeless_is_ended_and_one_that_waits_is_not_begun(tmp_path: Path) -> None:
    asked: list[str] = []

    class Told(Launcher):
        def start(self, job: Job) -> list[int]:
            asked.append(f"start {job.key}")
            return []

        def code(self, started: list[int]) -> int | None:
            return started[0] if started else None

        def end(self, started: list[int], *, kill: bool = False) -> None:
            asked.append("end")
            started.append(143)

        def wait(self, started: Any) -> None:
            pass

    jobs = [Job(number, ("fit",), tmp_path / "log") for number in range(2)]
    ended = list(make(jobs, 1, Told(), hopeless=lambda job: "start 0" in asked))
    assert [each.code for each in ended] == [143, None]
    assert asked == ["start 0", "end"]


# -- GPUs ----------------------------------------------------------------------------------------------------------


def test_gpus_are_shared_out_evenly_each_training_having_as_many_as_workers() -> None:
    gpus = Gpus({"CUDA_VISIBLE_DEVICES": "0,1,2,GPU-d"})
    assert gpus.take(2) == ("0", "1")
    assert gpus.take(1) == ("2",)
    assert gpus.take(1) == ("GPU-d",)
    gpus.give_back(("2",))
    assert gpus.take(3) == ("2", "0", "1")  # first that which nobody has
    assert set(gpus.take(9)) == {"GPU-d", "0", "1", "2"}  # all that there are
    assert gpus.take(0) == ()  # a check
    assert Gpus({"CUDA_VISIBLE_DEVICES": ""}).take(1) == Gpus({"CUDA_VISIBLE_DEVICES": "-1"}).take(1) == ()


def test_trainings_at_the_same_time_are_never_all_on_the_first_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []

    class Process:
        sentinel = -1

        def __init__(self) -> None:
            self.looked = 0

        def poll(self) -> int | None:
            self.looked += 1
            return 0 if self.looked > 1 else None

    class Watching:
        def fork(self, environment: dict[str, str], _: Any) -> Process:
            given.append(environment["CUDA_VISIBLE_DEVICES"])
            return Process()

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    monkeypatch.setattr(local, "server", Watching)
    monkeypatch.setattr("multiprocessing.connection.wait", lambda *_: None)
    jobs = [Job(number, ("fit",), tmp_path / f"{number}.log", workers=1) for number in range(6)]
    assert len(list(make(jobs, 3, Local()))) == 6
    assert given == ["5", "6", "7", "5", "6", "7"]
