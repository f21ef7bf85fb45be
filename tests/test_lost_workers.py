"""Going on without workers that are lost: real `dmaml fit` trainings in which processes are killed or frozen."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dmaml_pl.errors import ConfigError
from dmaml_pl.strategies import DMAMLStrategy
from tests.by_hand import ByHand
from tests.recipes import small_trainer
from tests.trainings import SMALL, Training, dmaml, flags
from tests.workers import in_workers

DANGEROUS = '''
"""Sinusoid tasks that end or freeze the process of a worker where PERILS says so."""

import json, os, signal

from data_modules import Sinusoid

PERILS = json.loads(os.environ["PERILS"])


class Dangerous(Sinusoid):
    def sample(self, *, worker, run, iteration, act=None):
        for kind, *place in PERILS:
            if kind in ("SIGKILL", "SIGSTOP") and place == [worker, run, iteration]:
                os.kill(os.getpid(), getattr(signal, kind))
        return super().sample(worker=worker, run=run, iteration=iteration)

    def sample_task(self, split, seed):
        # Worker 1 dies in the validation after the runs of a given number.
        trainer = self.trainer
        if trainer and trainer.global_rank == 1 and ["validation", trainer.lightning_module.runs_done] in PERILS:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample_task(split, seed)
'''


def train(folder: Path, perils: str, monkeypatch: pytest.MonkeyPatch, config: str, **settings: Any) -> Training:
    (folder / "dangerous.py").write_text(DANGEROUS)
    monkeypatch.setenv("PERILS", perils)
    words = [
        "fit",
        "--config",
        config,
        "--data.class_path=dangerous.Dangerous",
        *flags(
            SMALL
            | {
                "trainer.devices": 3,
                "trainer.max_steps": 30,
                "trainer.strategy.run_length": 5,
                "trainer.strategy.on_worker_failure": "continue",
                "trainer.strategy.moments": "keep",
                "meta_test": "false",
            }
            | settings
        ),
    ]
    return Training(folder, words, dmaml(folder, *words))


@pytest.fixture
def config(repository: Path) -> str:
    return str(repository / "configs" / "sinusoid.yaml")


def test_the_others_merge_without_a_killed_worker_and_finish_as_written_out_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    training = train(tmp_path, '[["SIGKILL", 1, 1, 3]]', monkeypatch, config)
    assert training.result.returncode == 0, training.result.stderr
    assert training.run.info.status == "FINISHED"
    assert "was killed by SIGKILL, in run 1: training goes on with 2 workers." in training.result.stderr
    assert list(training.history("merge/workers").values()) == [3, 2, 2, 2, 2, 2]
    assert list(training.history("train/tasks_seen").values()) == [25 * n for n in (3, 5, 7, 9, 11, 13)]

    from data_modules import Sinusoid
    from dmaml_pl import MLP

    data = Sinusoid(shots=10, queries=10, meta_batch=5, seed=0, val_tasks=10)
    reference = ByHand(3, lambda params: torch.optim.Adam(params, lr=0.005), data, network=MLP())
    start = training.checkpoint("last")  # its shapes; the weights are those of the config's seed
    assert start["dmaml"]["workers"] == 2
    reference.weights = _initial(config).expand(3, -1)
    for run in range(6):
        if run == 1:
            reference.without(1)
        reference.run(run, 5, streams=[0, 2] if run == 1 else None)
        reference.merge()
    trained = torch.cat([value.reshape(-1) for value in start["state_dict"].values()])
    assert torch.allclose(trained, reference.weights[0], rtol=1e-3, atol=1e-5)
    judged = sum(reference.losses(range(10))[:1])
    assert training.history("val/loss")[30] == pytest.approx(judged, rel=1e-3)


def _initial(config: str) -> torch.Tensor:
    """The weights that a training of this config starts from."""
    import yaml
    from pytorch_lightning import seed_everything

    from dmaml_pl import MLP

    seed_everything(yaml.safe_load(Path(config).read_text())["seed_everything"], verbose=False)
    return torch.cat([parameter.detach().reshape(-1) for parameter in MLP().parameters()])


@pytest.mark.slow
def test_frozen_workers_and_those_that_die_in_a_validation_are_left_behind_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    perils = '[["SIGSTOP", 2, 1, 0], ["validation", 4]]'
    training = train(tmp_path, perils, monkeypatch, config, **{"trainer.strategy.timeout": 15})
    assert training.result.returncode == 0, training.result.stderr
    assert training.run.info.status == "FINISHED"
    assert list(training.history("merge/workers").values()) == [3, 2, 2, 2]
    assert training.checkpoint("last")["dmaml"]["workers"] == 1
    assert "training goes on with 1 worker." in training.result.stderr


def test_without_worker_0_the_training_ends_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    training = train(tmp_path, '[["SIGKILL", 0, 2, 1]]', monkeypatch, config, **{"trainer.devices": 2})
    assert training.result.returncode == -signal.SIGKILL


def _refused() -> str:
    with pytest.raises(ConfigError) as caught:
        small_trainer(devices=2, strategy=DMAMLStrategy(on_worker_failure="continue"))
    return str(caught.value)


def test_to_continue_dmaml_must_have_started_the_workers() -> None:
    for message in in_workers(_refused, 2):
        assert "on_worker_failure is continue, for which dmaml itself must start all workers" in message
    assert "LOCAL_RANK" not in os.environ
