"""Whatever the engine: what the strategy promises, exact resuming, and what a logged step means."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dmaml_pl.engines import EngineName
from tests.recipes import same, small_maml, state_of, straight_and_resumed, train_with_two
from tests.workers import in_workers

ENGINES: list[EngineName] = ["learn2learn", "native", "per_task", "vectorized"]


@pytest.fixture(scope="module", params=ENGINES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What two workers saw: of a training that goes through, and of one that is stopped and resumed."""
    return in_workers(_train_twice, 2, request.param, tmp_path_factory.mktemp("trained"))


def _train_twice(engine: EngineName, folder: Path) -> dict[str, Any]:
    straight, resumed = straight_and_resumed(partial(_train, engine), folder)
    return {"straight": straight, "resumed": resumed}


def _train(engine: EngineName, folder: Path, steps: int, ckpt: Path | None) -> dict[str, Any]:
    module = small_maml(
        engine=engine,
        inner_lr=0.05,
        inner_steps=2,
        meta_optimizer=lambda params: torch.optim.Adam(params, lr=1e-2),
    )
    trainer, recorder = train_with_two(module, folder, steps, ckpt)
    return {
        "engine": module.engine_in_use,
        "states": recorder.states,
        "losses": [report["series"]["loss"] for report in recorder.reports],
        "both": [report["workers"]["loss"] for report in recorder.reports],
        "step": trainer.global_step,
        "final": state_of(module),
    }


def test_the_engine_that_was_asked_for_is_the_one_that_trains(trained: list[Any], request: Any) -> None:
    assert trained[0]["straight"]["engine"] == request.node.callspec.params["trained"]


def test_workers_hold_bit_identical_weights_after_every_merge(trained: list[Any]) -> None:
    first, second = (worker["straight"] for worker in trained)
    assert len(first["states"]) == 3
    assert all(same(mine, others) for mine, others in zip(first["states"], second["states"], strict=True))
    assert not same(first["states"][0], first["states"][1])
    assert not torch.equal(first["both"][0][0], first["both"][0][1])


def test_a_step_that_is_logged_is_a_meta_iteration(trained: list[Any]) -> None:
    for worker in trained:
        assert [len(run) for run in worker["straight"]["losses"]] == [4, 4, 4]
        assert worker["straight"]["step"] == 12


def test_a_resumed_training_ends_with_the_same_bits(trained: list[Any]) -> None:
    for worker in trained:
        assert worker["resumed"]["step"] == 12
        assert torch.equal(worker["resumed"]["losses"][-1], worker["straight"]["losses"][-1])
        assert same(worker["resumed"]["final"], worker["straight"]["final"])
