"""Workers that come and go on torchft: real `dmaml fit` trainings in which processes are killed."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning import seed_everything

from data_modules import Sinusoid
from dmaml_pl import MLP
from dmaml_pl.cli.fitting import fit
from dmaml_pl.errors import ConfigError, LeftBehindError
from dmaml_pl.strategies import DMAMLStrategy
from dmaml_pl.strategies.replica import address_towards
from dmaml_pl.tracking.relay import Relay, RelayedTracker
from dmaml_pl.tracking.tracker import MLflowTracker
from tests.by_hand import ByHand
from tests.recipes import small_data, small_maml, small_trainer
from tests.trainings import SMALL, Training, dmaml, flags, same_weights

needs_torchft = pytest.mark.skipif(find_spec("torchft") is None, reason="torchft is missing: dmaml_pl[elastic]")

MORTAL = '''
"""Sinusoid tasks that kill a worker, once, in a run of it or in the validation after one."""

import os, signal, sys
from pathlib import Path

from data_modules import Sinusoid


class Mortal(Sinusoid):
    def __init__(self, **settings):
        super().__init__(**settings)
        if "DMAML_STARTED_AGAIN" in os.environ and "FOR_GOOD" in os.environ:
            sys.exit(3)

    def sample(self, *, worker, run, iteration, act=None):
        self.perish(f"{worker} {run} {iteration}")
        if worker and f"{worker} {run} {iteration} SIGTERM" in os.environ.get("PERILS", "").split(","):
            os.kill(os.getpid(), signal.SIGTERM)  # in the midst of a meta-iteration
        return super().sample(worker=worker, run=run, iteration=iteration)

    def sample_tasks(self, split, seeds):
        trainer = self.trainer
        if split == "val" and trainer is not None and trainer.lightning_module is not None:
            self.perish(f"{trainer.global_rank} {trainer.lightning_module.runs_done} validation")
        return super().sample_tasks(split, seeds)

    def perish(self, place):
        if place in os.environ.get("PERILS", "").split(",") and not Path(place).exists():
            Path(place).touch()
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


@pytest.mark.slow
@needs_torchft
def test_where_all_workers_are_killed_at_once_they_go_on_from_the_last_checkpoint_in_the_same_mlflow_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    monkeypatch.setenv("PERILS", "0 8 3,1 8 3")
    training = train(tmp_path, config, **{"trainer.devices": 2, "checkpoint.every_n_runs": 1})
    assert training.result.returncode == 0, training.result.stderr
    assert training.result.stderr.count("All workers were lost: they are started again") == 1
    assert training.run.info.status == "FINISHED"
    assert training.run.data.tags["dmaml.resumed"] == "1"
    points = training.client.get_metric_history(training.run.info.run_id, "train/run")
    assert [(point.step, point.value) for point in points] == [(5 * run, run) for run in range(1, 13)]
    assert list(training.history("merge/workers").values()) == [2] * 12
    assert training.checkpoint("last")["runs"]["done"] == 12


@pytest.mark.slow
@needs_torchft
def test_whoever_joins_is_handed_the_memory_of_the_merge_rule_and_a_signal_to_one_ends_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    monkeypatch.setenv("PERILS", "1 2 3,1 9 2 SIGTERM")
    rule = '{"class_path": "dmaml_pl.OuterOptimizerMerge"}'
    training = train(tmp_path, config, **{"trainer.strategy.merge": rule, "trainer.devices": 2})
    assert training.result.returncode == 0, training.result.stderr
    assert training.run.info.status == "FINISHED"
    assert "left behind" not in training.result.stderr, "its weights would differ from the others' after a merge"
    workers = list(training.history("merge/workers").values())
    assert len(workers) == 12
    assert workers[-1] == 1
    assert workers.count(2) > 2


@pytest.mark.slow
@needs_torchft
def test_the_others_merge_without_a_killed_worker_and_finish_as_written_out_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    monkeypatch.setenv("PERILS", "1 1 3")
    monkeypatch.setenv("FOR_GOOD", "1")
    training = train(tmp_path, config, **{"trainer.max_steps": 30, "trainer.strategy.moments": "keep"})
    assert training.result.returncode == 0, training.result.stderr
    assert training.run.info.status == "FINISHED"
    assert list(training.history("merge/workers").values()) == [3, 2, 2, 2, 2, 2]
    assert list(training.history("train/tasks_seen").values()) == [25 * n for n in (3, 5, 7, 9, 11, 13)]

    data = Sinusoid(shots=10, queries=10, meta_batch=5, seed=0, val_tasks=10)
    reference = ByHand(3, lambda params: torch.optim.Adam(params, lr=0.005), data, network=MLP())
    reference.weights = initial(config).expand(3, -1)
    for run in range(6):
        if run == 1:
            reference.without(1)
        reference.run(run, 5, streams=[0, 2] if run == 1 else None)
        reference.merge()
    last = training.checkpoint("last")
    trained = torch.cat([value.reshape(-1) for value in last["state_dict"].values()])
    assert last["dmaml"]["workers"] == 2
    assert torch.allclose(trained, reference.weights[0], rtol=1e-3, atol=1e-5)
    evaluated = sum(reference.losses(range(10))[:1])
    assert training.history("val/loss")[30] == pytest.approx(evaluated, rel=1e-3)


def initial(config: str) -> torch.Tensor:
    """The weights that a training of this config starts from."""
    seed_everything(yaml.safe_load(Path(config).read_text())["seed_everything"], verbose=False)
    return torch.cat([parameter.detach().reshape(-1) for parameter in MLP().parameters()])


@needs_torchft
def test_without_faults_weights_are_those_of_the_plain_strategy_to_the_bit(tmp_path: Path, config: str) -> None:
    settings: dict[str, Any] = {"trainer.devices": 2, "trainer.max_steps": 20}
    elastic = train(tmp_path / "elastic", config, **settings)
    plain = train(tmp_path / "plain", config, **settings, **{"trainer.strategy.elastic": "false"})
    assert elastic.result.returncode == plain.result.returncode == 0, elastic.result.stderr
    assert same_weights(elastic.checkpoint("last"), plain.checkpoint("last"))
    assert elastic.history("val/loss") == plain.history("val/loss")
    assert "weights_only" not in elastic.result.stderr, "what Lightning tells of saving is not for the user"
    onwards = {"trainer.strategy.elastic": "false", "trainer.max_steps": 30, "ckpt_path": "last"}
    again = train(tmp_path / "elastic", config, **settings | onwards)
    assert again.result.returncode == 0, again.result.stderr
    assert again.checkpoint("last")["runs"]["done"] == 6


@needs_torchft
def test_a_lighthouse_that_does_not_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://me:secret@127.0.0.1:9")
    training = train(tmp_path, config, **{"trainer.devices": 1})
    assert training.result.returncode == 1
    *_, waiting, line = training.result.stderr.splitlines()  # after that of settings which the data module keeps
    assert waiting == "Waiting 10 s at most for the lighthouse at 127.0.0.1:9 ..."
    assert line.startswith("dmaml: error: TORCHFT_LIGHTHOUSE is 127.0.0.1:9, where no lighthouse answers")


@pytest.mark.parametrize("address", ["http://[::1", "http://me:secret@127.0.0.1:99999"])
def test_an_address_that_is_none_is_told_without_its_password(address: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^TORCHFT_LIGHTHOUSE must be the address of a lighthouse: http://host:port\.$"
    ):
        address_towards(address)


@pytest.mark.skipif(find_spec("torchft") is not None, reason="torchft is there")
def test_torchft_missing_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'dmaml_pl\[elastic\]'"):
        DMAMLStrategy(elastic=True)


@needs_torchft
def test_overlap_and_another_backend_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"elastic is true and trainer.strategy.overlap is true"):
        DMAMLStrategy(elastic=True, overlap=True, moments="keep")
    with pytest.raises(ConfigError, match=r"process_group_backend is nccl, but must be null where"):
        DMAMLStrategy(elastic=True, process_group_backend="nccl")


@needs_torchft
def test_from_python_it_is_refused() -> None:
    settings: dict[str, Any] = {"accelerator": "cpu", "max_steps": 8, "logger": False}
    with pytest.raises(ConfigError, match="train by the command dmaml fit"):
        fit(small_maml(run_length=4), small_data(), strategy=DMAMLStrategy(elastic=True), **settings)


@needs_torchft
@pytest.mark.parametrize("workers", [1, 2])
def test_a_trainer_of_lightnings_refuses_it_in_a_line_and_only_to_train(workers: int) -> None:
    module, trainer = (
        small_maml(),
        small_trainer(strategy=DMAMLStrategy(elastic=True, start_method="fork"), devices=workers),
    )
    with pytest.raises(ConfigError, match="train by the command dmaml fit"):
        trainer.fit(module, small_data())
    if workers == 1:
        small_trainer(strategy=DMAMLStrategy(elastic=True), limit_val_batches=1).validate(module, small_data())


class Meetings:
    def __init__(self, rank: int) -> None:
        self.rank, self.step, self.time_ms, self.kept = rank, 0, 0, 0


class Sender:
    """One whose store takes all at once."""

    def __init__(self) -> None:
        self.outbox, self.waits, self.sent = self, False, list[dict[str, Any]]()
        self.put = self.sent.append


def test_who_was_left_behind_as_worker_0_leaves_the_mlflow_run_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    meetings: Any = Meetings(0)
    tracker = RelayedTracker(MLflowTracker(), Relay(meetings), "an-id")
    opened: list[str | None] = []
    monkeypatch.setattr(tracker, "open", opened.append)
    with suppress(LeftBehindError):
        try:
            raise LeftBehindError("the others have gone on without this worker.")
        finally:
            tracker.finalize("failed")
    assert opened == []
    assert tracker.version == "an-id"
    tracker.finalize("success")
    assert opened == ["an-id"], "else it is worker 0 who ends it"


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
