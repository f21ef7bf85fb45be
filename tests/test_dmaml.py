"""The DMAML strategy between real processes: what DESIGN calls its promises."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dmaml_pl import MLP, DMAMLStrategy
from dmaml_pl.data import TrainingRuns
from dmaml_pl.errors import ConfigError, NonFiniteError
from dmaml_pl.strategies.dmaml import spread
from dmaml_pl.tasks import Act
from tests.recipes import (
    FreezingData,
    Recorder,
    meta_gradient,
    same,
    small_data,
    small_maml,
    small_trainer,
    state_of,
    train_with_a_frozen_worker,
)
from tests.workers import in_workers

SGD = torch.optim.SGD


class WithBuffers(nn.Module):
    """A network whose buffers change as it runs, each worker's in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP(hidden=[8, 8])
        self.register_buffer("level", torch.zeros(3))
        self.register_buffer("calls", torch.tensor(0))
        self.level: Tensor
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.level += x.detach().mean()
        self.calls += 1
        out: Tensor = self.inner(x)
        return out


class TaskDigest(pl.Callback):
    """Keeps a digest of the tasks that this worker drew."""

    def __init__(self) -> None:
        self.digests: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        draw = batch.sample(worker=trainer.global_rank, run=pl_module.runs_done, iteration=0)
        self.digests.append(float(draw.support_x.double().sum()))


def _train(run_length: int, max_steps: int, optimizer: Any, buffers: bool) -> Any:
    torch.set_num_threads(1)
    recorder, digest = Recorder(), TaskDigest()
    network = WithBuffers() if buffers else None
    module = small_maml(network, meta_optimizer=optimizer)
    initial = state_of(module)
    trainer = small_trainer(
        devices=2, strategy=DMAMLStrategy(run_length=run_length), max_steps=max_steps, callbacks=[recorder, digest]
    )
    trainer.fit(module, small_data())
    return {
        "initial": initial,
        "states": recorder.states,
        "reports": recorder.reports,
        "digests": digest.digests,
        "steps": trainer.global_step,
    }


@pytest.fixture(scope="module")
def two_workers() -> list[Any]:
    return in_workers(_train, 2, 4, 10, lambda params: torch.optim.Adam(params, lr=1e-2), True)


def test_after_every_merge_the_workers_hold_bit_identical_weights_and_buffers(two_workers: list[Any]) -> None:
    first, second = two_workers
    assert len(first["states"]) == 3
    for mine, others in zip(first["states"], second["states"], strict=True):
        assert same(mine, others)
    assert not same(first["states"][0], first["states"][1])
    assert any(name.endswith("calls") for name in first["states"][0])


def test_the_workers_draw_different_tasks_in_every_run(two_workers: list[Any]) -> None:
    digests = [digest for worker in two_workers for digest in worker["digests"]]
    assert len(set(digests)) == len(digests) == 6


def test_a_short_last_run_merges_like_any_other(two_workers: list[Any]) -> None:
    reports = two_workers[0]["reports"]
    assert [len(report["series"]["loss"]) for report in reports] == [4, 4, 2]
    assert two_workers[0]["steps"] == 10
    assert "merge/seconds" in reports[-1]["merge"]


def test_reports_tell_of_both_workers_and_are_the_same_on_both(two_workers: list[Any]) -> None:
    for mine, others in zip(two_workers[0]["reports"], two_workers[1]["reports"], strict=True):
        assert torch.equal(mine["workers"]["loss"], others["workers"]["loss"])
        assert mine["workers"]["loss"].shape[0] == 2
        assert torch.allclose(mine["series"]["loss"], mine["workers"]["loss"].mean(dim=0))
        assert mine["tasks"] == 2 * 4 * len(mine["series"]["loss"])
        assert mine["merge"]["merge/drift"] > 0


@pytest.mark.parametrize(
    ("ways", "drift", "agreement"),
    [
        ([[3.0, 0.0], [3.0, 0.0]], 0.0, 1.0),
        ([[3.0, 0.0], [0.0, 3.0]], math.sqrt(4.5), 0.5),
        ([[3.0, 0.0], [-3.0, 0.0]], 3.0, 0.0),
        ([[0.0, 0.0], [0.0, 0.0]], 0.0, 1.0),
    ],
)
def test_agreement_is_one_where_all_go_the_same_way_and_one_over_the_workers_where_they_have_nothing_in_common(
    ways: list[list[float]], drift: float, agreement: float
) -> None:
    moved = torch.tensor(ways)
    found = spread({"weight": torch.ones(2), "squared_displacement": moved.square().sum(1)}, moved.mean(0))
    assert found == {"merge/drift": pytest.approx(drift), "merge/agreement": pytest.approx(agreement)}


def test_with_sgd_and_runs_of_one_the_merge_equals_averaging_the_meta_gradients() -> None:
    def optimizer(params: Any) -> Any:
        return SGD(params, lr=0.1)

    worker, _ = in_workers(_train, 2, 1, 5, optimizer, False)
    module, data = small_maml(), small_data()
    stepper = optimizer(module.parameters())
    for run in range(5):
        stepper.zero_grad()
        for rank in range(2):
            batch = data.sample(worker=rank, run=run, iteration=0)
            meta_gradient(module, batch, lambda loss: (loss / 2).backward())
        stepper.step()
    for name, value in state_of(module).items():
        assert torch.allclose(worker["states"][-1][name], value, rtol=0, atol=1e-6), name


def test_one_worker_is_bit_identical_to_no_strategy_at_all() -> None:
    states = []
    for strategy in ("auto", "dmaml", DMAMLStrategy(run_length=4)):
        module = small_maml(run_length=4, meta_optimizer=lambda params: torch.optim.Adam(params, lr=1e-2))
        small_trainer(strategy=strategy, max_steps=10).fit(module, small_data())
        states.append(state_of(module))
    assert same(states[0], states[1])
    assert same(states[0], states[2])


class PoisonedData:
    """Draws targets that are not finite for one worker, at one meta-iteration."""

    def __init__(self, worker: int, run: int, iteration: int) -> None:
        self.data = small_data()
        self.place = (worker, run, iteration)
        self.seed = 0

    def sample(self, *, worker: int, run: int, iteration: int, act: Act | None = None) -> Any:
        batch = self.data.sample(worker=worker, run=run, iteration=iteration)
        if (worker, run, iteration) == self.place:
            batch.query_y.fill_(float("nan"))
        return batch


def _train_poisoned(workers: int) -> tuple[str, int, int, int]:
    module = small_maml()
    strategy = DMAMLStrategy(run_length=4)
    with pytest.raises(NonFiniteError) as caught:
        small_trainer(devices=workers, strategy=strategy, max_steps=20).fit(
            module, TrainingRuns(PoisonedData(workers - 1, 2, 3), 5), small_data().val_dataloader()
        )
    error = caught.value
    return str(error), error.worker, error.run, error.iteration


def test_a_loss_that_is_not_finite_stops_every_worker_and_names_worker_run_and_meta_iteration() -> None:
    for message, worker, run, iteration in in_workers(_train_poisoned, 2, 2):
        assert (worker, run, iteration) == (1, 2, 3)
        assert "query loss of worker 1 is not finite in run 2, meta-iteration 3" in message


def test_a_loss_that_is_not_finite_stops_a_training_without_workers_too() -> None:
    message, worker, run, iteration = _train_poisoned(1)
    assert (worker, run, iteration) == (0, 2, 3)
    assert "gradient_clip" in message


def _train_with_a_frozen_worker(released: Any) -> str:
    strategy = DMAMLStrategy(run_length=2, timeout=4)
    return train_with_a_frozen_worker(strategy, FreezingData(released, 1, 1, 0))


def test_a_frozen_worker_ends_the_training_of_the_others_within_the_timeout() -> None:
    released = multiprocessing.get_context("fork").Event()
    waiting, frozen = in_workers(_train_with_a_frozen_worker, 2, released)
    assert "worker 0 lost contact with another worker in run 1" in waiting
    assert "trainer.strategy.timeout (4 s)" in waiting
    assert "worker 1 lost contact" in frozen


@pytest.mark.parametrize("workers", [1, 2])
def test_resuming_gives_bit_identical_weights(workers: int, tmp_path: Path) -> None:
    straight = in_workers(_train_and_keep, workers, workers, None, tmp_path / "straight")
    resumed = in_workers(_resume, workers, workers, tmp_path)
    for whole, continued in zip(straight, resumed, strict=True):
        assert same(whole, continued)


def _train_and_keep(workers: int, stop_after: int | None, folder: Path, ckpt: Path | None = None) -> Any:
    torch.set_num_threads(1)
    module = small_maml(
        nn.Sequential(MLP(hidden=[8], outputs=8), nn.Dropout(0.1), nn.Linear(8, 1)),
        meta_optimizer=lambda params: torch.optim.Adam(params, lr=1e-2),
        meta_schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.7),
    )
    trainer = small_trainer(
        devices=workers, strategy=DMAMLStrategy(run_length=4), max_steps=stop_after or 26, default_root_dir=folder
    )
    trainer.fit(module, small_data(runs_per_epoch=3), ckpt_path=ckpt)
    trainer.save_checkpoint(folder / "kept.ckpt")
    return state_of(module)


def _resume(workers: int, folder: Path) -> Any:
    _train_and_keep(workers, 16, folder / "first")
    torch.distributed.destroy_process_group()
    return _train_and_keep(workers, None, folder / "second", folder / "first" / "kept.ckpt")


def test_a_training_from_python_leaves_no_thread_that_watches_its_workers() -> None:
    small_trainer(strategy=DMAMLStrategy()).fit(small_maml(), small_data())
    for thread in threading.enumerate():
        if thread.name == "worker-watch":
            thread.join(10)
    assert "worker-watch" not in [thread.name for thread in threading.enumerate()]


def test_a_module_that_does_not_train_in_runs_is_refused() -> None:
    class Plain(pl.LightningModule):
        def configure_optimizers(self) -> Any:
            return SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

        def training_step(self, batch: Any, batch_idx: int) -> None: ...

    with pytest.raises(ConfigError, match="does not train in runs"):
        small_trainer(strategy=DMAMLStrategy()).fit(Plain(), [torch.zeros(1)])


@pytest.mark.parametrize("length", [0, -3])
def test_a_run_length_out_of_range_is_named(length: int) -> None:
    with pytest.raises(ConfigError, match=f"trainer.strategy.run_length is {length}, but must be greater than 0"):
        DMAMLStrategy(run_length=length)


def test_ctrl_c_while_python_runs_a_finalizer_which_would_drop_it_ends_the_training_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Unlucky:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    class Presses(pl.Callback):
        def on_meta_iteration_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
            if trainer.global_step == 3:
                Unlucky()

    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: dropped.append(what.exc_type))
    trainer = small_trainer(max_steps=100, strategy=DMAMLStrategy(run_length=5), callbacks=[Presses()])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stopped:
            trainer.fit(small_maml(), small_data())
    finally:
        signal.signal(signal.SIGINT, before)
    assert dropped == []
    assert isinstance(stopped.value.__context__, KeyboardInterrupt)
    assert trainer.global_step == 3
    trainer.validate(trainer.lightning_module, small_data(), verbose=False)  # the same Trainer is of use again
