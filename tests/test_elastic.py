"""Workers that come and go on torchft: real `dmaml fit` trainings in which processes are killed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dmaml_pl.cli.fitting import fit
from dmaml_pl.errors import ConfigError
from dmaml_pl.strategies import DMAMLStrategy
from dmaml_pl.tracking.relay import Relay
from tests.recipes import small_data, small_maml
from tests.trainings import SMALL, Training, dmaml, flags, same_weights

needs_torchft = pytest.mark.skipif(find_spec("torchft") is None, reason="torchft is missing: dmaml_pl[elastic]")

MORTAL = '''
"""Sinusoid tasks that kill a worker, once, in a run of it or in the validation after one."""

import os, signal

from data_modules import Sinusoid


class Mortal(Sinusoid):
    def sample(self, *, worker, run, iteration, act=None):
        self.perish(f"{worker} {run} {iteration}")
        return super().sample(worker=worker, run=run, iteration=iteration)

    def sample_tasks(self, split, seeds):
        trainer = self.trainer
        if split == "val" and trainer is not None and trainer.lightning_module is not None:
            self.perish(f"{trainer.global_rank} {trainer.lightning_module.runs_done} validation")
        return super().sample_tasks(split, seeds)

    def perish(self, place):
        if place in os.environ.get("PERILS", "").split(",") and "DMAML_STARTED_AGAIN" not in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
'''


def train(folder: Path, config: str, **settings: Any) -> Training:
    folder.mkdir(exist_ok=True)
    (folder / "mortal.py").write_text(MORTAL)
    kept: dict[str, Any] = {
        "trainer.devices": 3,
        "trainer.strategy.run_length": 5,
        "trainer.max_steps": 60,
        "trainer.val_check_interval": 3,
        "trainer.strategy.elastic": "true",
        "meta_test": "false",
    }
    words = ["fit", "--config", config, "--data.class_path=mortal.Mortal", *flags(SMALL | kept | settings)]
    return Training(folder, words, dmaml(folder, *words))


@pytest.fixture
def config(repository: Path) -> str:
    return str(repository / "configs" / "sinusoid.yaml")


@pytest.mark.slow
@needs_torchft
def test_worker_0_and_another_are_killed_and_come_again_and_no_merge_is_lost_or_logged_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    monkeypatch.setenv("PERILS", "0 2 3,1 6 validation")
    training = train(tmp_path, config)
    assert training.result.returncode == 0, training.result.stderr
    assert training.result.stderr.count("was killed by SIGKILL, and is started again.") == 2
    assert training.run.info.status == "FINISHED"
    points = training.client.get_metric_history(training.run.info.run_id, "train/run")
    assert [(point.step, point.value) for point in points] == [(5 * run, run) for run in range(1, 13)]
    workers = list(training.history("merge/workers").values())
    assert workers[:2] == [3, 3]
    assert workers[2] == 2, "the run in which worker 0 was killed is merged without it"
    assert workers.count(3) > 4, "whoever was started again takes part"
    assert list(training.history("val/loss")) == [15, 30, 45, 60]
    assert training.checkpoint("last")["runs"]["done"] == 12


@needs_torchft
def test_without_faults_weights_are_those_of_the_plain_strategy_to_the_bit(tmp_path: Path, config: str) -> None:
    settings: dict[str, Any] = {"trainer.devices": 2, "trainer.max_steps": 20}
    elastic = train(tmp_path / "elastic", config, **settings)
    plain = train(tmp_path / "plain", config, **settings, **{"trainer.strategy.elastic": "false"})
    assert elastic.result.returncode == plain.result.returncode == 0, elastic.result.stderr
    assert same_weights(elastic.checkpoint("last"), plain.checkpoint("last"))
    assert elastic.history("val/loss") == plain.history("val/loss")


@needs_torchft
def test_a_lighthouse_that_does_not_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://127.0.0.1:9")
    training = train(tmp_path, config, **{"trainer.devices": 1})
    assert training.result.returncode == 1
    (line,) = training.result.stderr.splitlines()
    assert line.startswith("dmaml: error: TORCHFT_LIGHTHOUSE is http://127.0.0.1:9, where no lighthouse answers")


@pytest.mark.skipif(find_spec("torchft") is not None, reason="torchft is there")
def test_torchft_missing_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"pip install dmaml_pl\[elastic\]"):
        DMAMLStrategy(elastic=True)


@needs_torchft
@pytest.mark.parametrize(
    ("settings", "named"),
    [({"overlap": True, "moments": "keep"}, "overlap"), ({"on_worker_failure": "continue"}, "on_worker_failure")],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"elastic is true and trainer.strategy.{named}"):
        DMAMLStrategy(elastic=True, **settings)


@needs_torchft
def test_from_python_it_is_refused() -> None:
    settings: dict[str, Any] = {"accelerator": "cpu", "max_steps": 8, "logger": False}
    with pytest.raises(ConfigError, match="train by the command dmaml fit"):
        fit(small_maml(run_length=4), small_data(), strategy=DMAMLStrategy(elastic=True), **settings)


class Meetings:
    def __init__(self, rank: int) -> None:
        self.rank, self.step, self.time_ms, self.kept = rank, 0, 0, 0


class Sender:
    """One whose store takes all at once."""

    def __init__(self) -> None:
        self.outbox, self.waits, self.sent = self, False, list[dict[str, Any]]()
        self.put = self.sent.append


def test_whoever_takes_worker_0s_place_sends_what_the_store_may_not_have() -> None:
    first, second = Meetings(0), Meetings(1)
    leads, follows = Relay(first), Relay(second)
    sender: Any = Sender()
    for step in range(1, 6):
        first.step = second.step = step
        second.kept = first.kept  # told at each meeting
        for relay in (leads, follows):
            relay.add({"step": step})
        leads.hand_to(sender)
    assert [one["step"] for one in sender.sent] == [1, 2, 3, 4], "the last is sent when the others have met again"
    second.rank, second.step = 0, 6
    again: Any = Sender()
    follows.hand_to(again)
    assert again.sent[-1] == {"step": 5}
    assert {one["step"] for one in sender.sent + again.sent} == {1, 2, 3, 4, 5}
    assert len(again.sent) < 5, "what is known to be in the store is forgotten"
