"""A training that torchrun restarts goes on by itself, where it was, as what it was."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dmaml_pl.errors import CheckpointError, WorkerLostError
from dmaml_pl.launching import restarts
from tests.trainings import Training, fit, of, same_weights
from tests.workers import free_port


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store that torchrun's agent keeps, and the environment that it gives a worker."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def test_without_torchrun_there_is_nothing_to_go_on_with() -> None:
    restarts.remember(restarts.BEGUN, '"an-id"')
    assert restarts.current() is None
    assert not restarts.was_refused()


@pytest.mark.usefixtures("agent")
def test_a_first_start_is_no_restart() -> None:
    assert restarts.current() is None


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize("run_id", ["an-id", None])
def test_a_restart_knows_the_mlflow_run_and_the_last_checkpoint(run_id: str | None) -> None:
    restarts.remember(restarts.BEGUN, json.dumps(run_id))
    assert restarts.current() == restarts.Origin(None, run_id)
    Path("last.ckpt").touch()
    restarts.remember(restarts.LAST, "last.ckpt")
    assert restarts.current() == restarts.Origin(Path("last.ckpt"), run_id)


@pytest.mark.usefixtures("agent")
def test_a_machine_that_does_not_share_the_disk_is_told_what_to_set() -> None:
    restarts.remember(restarts.BEGUN, "null")
    restarts.remember(restarts.LAST, "elsewhere/last.ckpt")
    with pytest.raises(
        CheckpointError, match=r"set checkpoint\.dirpath .* to a folder on a disk that all machines share"
    ):
        restarts.current()


@pytest.mark.usefixtures("agent")
def test_a_mistake_of_the_user_is_told_once() -> None:
    assert not restarts.was_refused()
    restarts.remember(restarts.REFUSED)
    assert restarts.was_refused()


def _meet(agent: Any, workers: int) -> list[Any]:
    """What every worker of an attempt finds under a name in the fresh store, after worker 0 has written there."""
    found: list[Any] = [None] * workers

    def worker(rank: int) -> None:
        own = TCPStore("127.0.0.1", agent.port, is_master=False, wait_for_workers=False)
        store = restarts.meet(own, rank=rank, workers=workers, timeout=30, check=lambda: None)
        before = store.check(["address"])
        if rank == 0:
            store.set("address", "new")
        found[rank] = (rank != 0 or not before, store.get("address"))

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_an_attempt_sees_nothing_that_attempts_before_have_left(agent: Any) -> None:
    for workers in (3, 3, 2):
        assert _meet(agent, workers) == [(True, b"new")] * workers


def test_a_worker_that_does_not_come_is_an_error_in_time(agent: Any) -> None:
    for rank in (0, 1):
        with pytest.raises(WorkerLostError, match=r"has waited 0\.1 s for the other 1 worker"):
            restarts.meet(agent, rank=rank, workers=2, timeout=0.1, check=lambda: None)


@pytest.mark.slow
def test_torchrun_gives_the_same_bits_and_restarts_a_training_whose_worker_was_killed_in_the_same_mlflow_run(
    undisturbed: Training, tmp_path: Path, sinusoid: str
) -> None:
    launcher = ("-m", "torch.distributed.run", "--max-restarts=1", "--nproc-per-node=2", f"--master-port={free_port()}")
    disturb = {"at": [1, 6, 4], "send": "SIGKILL"}
    result = fit(tmp_path, sinusoid, "--checkpoint.every_n_runs=1", disturb=disturb, launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "disturbed").exists()
    training = of(tmp_path)
    assert training.run.info.status == "FINISHED"
    assert training.run.data.tags["dmaml.resumed"] == "1"
    assert "dmaml.error" not in training.run.data.tags
    for name in ("last", "best"):
        assert same_weights(training.checkpoint(name), undisturbed.checkpoint(name))
    assert training.history("train/loss") == undisturbed.history("train/loss")
    (line,) = [line for line in result.stderr.splitlines() if "Using checkpoint" in line]
    assert line.endswith("last.ckpt")
