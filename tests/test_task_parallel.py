"""Parallel tasks between real processes: the same weights throughout, the steps of one big meta-batch."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException

from dmaml_pl import TaskParallelStrategy
from dmaml_pl.data import TrainingRuns
from dmaml_pl.errors import NonFiniteError
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
from tests.test_dmaml import PoisonedData, WithBuffers
from tests.workers import in_workers


def _optimizer(params: Any) -> Any:
    return torch.optim.Adam(params, lr=1e-2)


def _train(stop: int = 10, buffers: bool = False, folder: Path | None = None, ckpt: Path | None = None) -> Any:
    torch.set_num_threads(1)
    recorder = Recorder()
    module = small_maml(WithBuffers() if buffers else None, meta_optimizer=_optimizer)
    trainer = small_trainer(
        devices=2, strategy=TaskParallelStrategy(run_length=4), max_steps=stop, callbacks=[recorder]
    )
    trainer.fit(module, small_data(), ckpt_path=ckpt)
    if folder is not None:
        trainer.save_checkpoint(folder / "kept.ckpt")
    return recorder.states, recorder.reports


def test_the_workers_hold_bit_identical_weights_and_buffers_after_every_run() -> None:
    (first, reports), (second, _) = in_workers(_train, 2, 10, True)
    assert len(first) == 3
    for mine, others in zip(first, second, strict=True):
        assert same(mine, others)
    assert reports[0]["workers"]["loss"].shape == (2, 4)
    assert not torch.equal(reports[0]["workers"]["loss"][0], reports[0]["workers"]["loss"][1])


def _said() -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pytorch_lightning").addHandler(handler)
    _train(4)
    return lines


def test_it_says_of_how_many_tasks_each_meta_gradient_is() -> None:
    mine, others = in_workers(_said, 2)
    wanted = "Each meta-gradient is of 8 tasks: data.meta_batch, 4, of each of 2 workers."
    assert wanted in mine
    assert wanted not in others


def test_two_workers_take_the_steps_of_one_with_both_meta_batches() -> None:
    (states, _), _ = in_workers(_train, 2, 8)
    module, data = small_maml(meta_optimizer=_optimizer), small_data()
    optimizer = _optimizer(module.parameters())
    for step in range(8):
        shares = [data.sample(worker=rank, run=step // 4, iteration=step % 4) for rank in range(2)]
        optimizer.zero_grad()
        columns = zip(*(share.tensors() for share in shares), strict=True)
        meta_gradient(module, shares[0].with_tensors([torch.cat(column) for column in columns]))
        optimizer.step()
    for name, value in state_of(module).items():
        assert torch.allclose(states[-1][name], value, atol=1e-5), name


def _search_along_lines(params: Any) -> Any:
    return torch.optim.LBFGS(params, lr=0.1, max_iter=4, line_search_fn="strong_wolfe")


def _train_by_lines() -> list[Any]:
    torch.set_num_threads(1)
    recorder = Recorder()
    trainer = small_trainer(devices=2, strategy=TaskParallelStrategy(run_length=2), max_steps=2, callbacks=[recorder])
    trainer.fit(small_maml(meta_optimizer=_search_along_lines), small_data())
    return recorder.states


def test_an_optimizer_that_decides_by_the_loss_takes_the_steps_of_one_worker_with_both_meta_batches() -> None:
    states, others = in_workers(_train_by_lines, 2)
    for mine, other in zip(states, others, strict=True):
        assert same(mine, other)
    module, data = small_maml(meta_optimizer=_search_along_lines), small_data()
    optimizer = _search_along_lines(module.parameters())
    for step in range(2):  # further ones make of rounding another step, on some processors
        shares = [data.sample(worker=rank, run=step // 2, iteration=step % 2) for rank in range(2)]
        columns = zip(*(share.tensors() for share in shares), strict=True)
        batch = shares[0].with_tensors([torch.cat(column) for column in columns])

        def closure(batch: Any = batch) -> Any:
            optimizer.zero_grad()
            return meta_gradient(module, batch).loss

        optimizer.step(closure)
    for name, value in state_of(module).items():
        assert torch.allclose(states[-1][name], value, atol=1e-4), name


def test_the_same_training_gives_the_same_bits_and_resuming_goes_on_to_the_bit(tmp_path: Path) -> None:
    (straight, _), _ = in_workers(_train, 2, 20)
    (again, _), _ = in_workers(_train, 2, 20)
    assert same(straight[-1], again[-1])
    in_workers(_train, 2, 8, False, tmp_path)
    (resumed, _), _ = in_workers(_train, 2, 20, False, None, tmp_path / "kept.ckpt")
    assert same(resumed[-1], straight[-1])


def test_the_training_loss_falls() -> None:
    (_, reports), _ = in_workers(_train, 2, 400)
    losses = torch.cat([report["series"]["loss"] for report in reports])
    assert float(losses[-100:].mean()) < 0.8 * float(losses[:50].mean())


def test_one_worker_is_bit_identical_to_no_strategy_at_all() -> None:
    states = []
    for strategy in ("auto", "task_parallel"):
        module = small_maml(run_length=4, meta_optimizer=_optimizer)
        small_trainer(strategy=strategy).fit(module, small_data())
        states.append(state_of(module))
    assert same(states[0], states[1])


def _train_poisoned() -> tuple[int, int, int]:
    with pytest.raises(NonFiniteError) as caught:
        small_trainer(devices=2, strategy=TaskParallelStrategy(run_length=4), max_steps=20).fit(
            small_maml(), TrainingRuns(PoisonedData(1, 1, 2), 5), small_data().val_dataloader()
        )
    return caught.value.worker, caught.value.run, caught.value.iteration


def test_a_loss_that_is_not_finite_stops_every_worker_at_that_meta_iteration() -> None:
    assert in_workers(_train_poisoned, 2) == [(1, 1, 2), (1, 1, 2)]


class AskedToEnd(pl.Callback):
    """SIGTERM comes to worker 1 in the midst of a run."""

    def on_meta_iteration_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)


def _train_until_asked_to_end() -> tuple[int, bool, Any]:
    module, strategy = small_maml(), TaskParallelStrategy(run_length=4)
    trainer = small_trainer(devices=2, strategy=strategy, max_steps=20, callbacks=[AskedToEnd()])
    with pytest.raises(SIGTERMException):
        trainer.fit(module, small_data())
    return trainer.global_step, strategy.stopped_together, state_of(module)


def test_a_signal_to_one_worker_ends_the_training_of_all_at_that_meta_iteration() -> None:
    (steps, together, state), (others_steps, others_together, others) = in_workers(_train_until_asked_to_end, 2)
    assert steps == others_steps == 5
    assert together
    assert others_together
    assert same(state, others)


def _train_with_a_frozen_worker(released: Any) -> str:
    strategy = TaskParallelStrategy(run_length=4, timeout=4)
    return train_with_a_frozen_worker(strategy, FreezingData(released, 1, 0, 1))


def test_a_frozen_worker_ends_the_training_of_the_others_within_the_timeout() -> None:
    released = multiprocessing.get_context("fork").Event()
    waiting, _ = in_workers(_train_with_a_frozen_worker, 2, released)
    assert "worker 0 lost contact with another worker in run 0" in waiting
