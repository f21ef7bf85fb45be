"""Workers on one machine share its cores, unless the user says how many threads each takes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.distributed import _suggested_max_num_threads
from torch import Tensor

from dmaml_pl import MLP, DMAMLStrategy
from dmaml_pl.engines import EngineChoice, EngineName, PerTaskEngine, work
from tests.recipes import small_data, small_maml, small_trainer
from tests.workers import in_workers

VARIABLE = "OMP_NUM_THREADS"


class Threads(pl.Callback):
    """Notes with how many threads a worker trains."""

    def __init__(self) -> None:
        self.seen = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.seen = torch.get_num_threads()
        torch.set_num_threads(1)  # what is forked from a process that had several waits for them for ever


def _threads_of_training(own: str | None) -> int:
    os.environ.pop(VARIABLE, None)
    if own is not None:
        os.environ[VARIABLE] = own  # which PyTorch reads as it is loaded
    torch.set_num_threads(3)
    watch = Threads()
    trainer = small_trainer(devices=2, strategy=DMAMLStrategy(run_length=2), max_steps=2, callbacks=[watch])
    trainer.fit(small_maml(), small_data())
    return watch.seen


@pytest.mark.parametrize("own", [None, "3"])
def test_two_workers_take_half_the_cores_each_unless_the_user_sets_their_threads(own: str | None) -> None:
    half = _suggested_max_num_threads(2)
    assert half <= max(1, (os.cpu_count() or 1) // 2)
    assert in_workers(_threads_of_training, 2, own) == [half if own is None else 3] * 2


class Watched(MLP):
    """Notes with how many threads it is run."""

    def __init__(self, width: int) -> None:
        super().__init__(hidden=[width, width])
        self.seen = set[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(torch.get_num_threads())
        return super().forward(x)


@pytest.mark.parametrize(("width", "expected"), [(8, 1), (700, 2)])
@pytest.mark.parametrize("engine", ["learn2learn", "vectorized"])
@pytest.mark.usefixtures("two_threads")
def test_a_small_network_is_trained_and_evaluated_in_one_thread_and_a_large_one_in_all(
    engine: EngineName, width: int, expected: int
) -> None:
    network = Watched(width)
    module = small_maml(network, engine=engine, evaluation_steps=1, run_length=2)
    data = small_data(meta_batch=1, val_tasks=1)
    for training in (True, False):  # which takes all threads
        module.engine.for_training(module.train(training).learner, data.sample(worker=0, run=0, iteration=0))
    forget = pl.callbacks.LambdaCallback(on_train_start=lambda trainer, module: network.seen.clear())
    trainer = small_trainer(max_steps=2, limit_val_batches=1.0, val_check_interval=1, callbacks=[forget])
    trainer.fit(module.train(), data)
    assert max(network.seen) == expected
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("width", "expected"), [(8, 1), (2000, None)])
def test_tasks_one_by_one_are_spread_over_threads_where_these_have_more_to_do_than_to_wait(
    width: int, expected: int | None
) -> None:
    module, batch = small_maml(MLP(hidden=[width, width])), small_data().sample(worker=0, run=0, iteration=0)
    engine = PerTaskEngine(module.objective)
    assert engine.threads(module.learner, batch) == expected


def test_threads_are_counted_on_one_task_once_for_all_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    counted = work._count

    def watched(*given: Any) -> Any:
        calls.append(given)
        return counted(*given)

    monkeypatch.setattr(work, "_count", watched)
    module, data = small_maml(), small_data()
    for iteration in range(2):
        batch = data.sample(worker=0, run=0, iteration=iteration)
        for name in ("learn2learn", "per_task", "vectorized"):
            EngineChoice(name, module.objective).for_training(module.learner, batch).threads(module.learner, batch)
    assert len(calls) == 1
