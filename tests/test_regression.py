"""Numbers that must not change: real trainings of two workers, in float64, against stored ones.

`DMAML_REWRITE_FIXTURES=1 pytest tests/test_regression.py` stores what they give now; the difference then shows in git.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from data_modules import Sinusoid
from dmaml_pl import (
    DMAMLStrategy,
    MergedAverage,
    OuterOptimizerMerge,
    TaskParallelStrategy,
    TaskWeightedMerge,
    ValidationWeightedMerge,
)
from dmaml_pl.tasks import Act, TaskBatch
from tests.recipes import Recorder, small_maml, small_trainer
from tests.workers import in_workers

REWRITE = "DMAML_REWRITE_FIXTURES"
FIXTURES = Path(__file__).parent / "fixtures" / "regression.json"

STRATEGIES: dict[str, Callable[[], Any]] = {
    "mean": lambda: DMAMLStrategy(run_length=3, moments="keep"),
    "weighted by tasks": lambda: DMAMLStrategy(run_length=3, moments="keep", merge=TaskWeightedMerge()),
    "weighted by validation": lambda: DMAMLStrategy(
        run_length=3, moments="keep", merge=ValidationWeightedMerge(tasks=3)
    ),
    "nesterov": lambda: DMAMLStrategy(run_length=3, moments="keep", merge=OuterOptimizerMerge()),
    "outer adam": lambda: DMAMLStrategy(run_length=3, moments="keep", merge=OuterOptimizerMerge(torch.optim.Adam)),
    "moments averaged": lambda: DMAMLStrategy(run_length=3, moments="average"),
    "moments reset": lambda: DMAMLStrategy(run_length=3, moments="reset"),
    "overlap": lambda: DMAMLStrategy(run_length=3, moments="keep", overlap=True),
    "bfloat16": lambda: DMAMLStrategy(run_length=3, moments="keep", transfer_dtype="bfloat16"),
    "task_parallel": lambda: TaskParallelStrategy(run_length=3),
}


class InFloat64(Sinusoid):
    """The same tasks with more digits, so that another processor gives the same numbers."""

    def sample(self, *, worker: int, run: int, iteration: int, act: Act | None = None) -> TaskBatch:
        return super().sample(worker=worker, run=run, iteration=iteration).map(_double)

    def evaluation_tasks(self, split: Any, indices: Sequence[int]) -> TaskBatch:
        return super().evaluation_tasks(split, indices).map(_double)


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _figures(strategy: Callable[[], Any]) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    recorder = Recorder()
    module = small_maml(meta_optimizer=lambda params: torch.optim.Adam(params, lr=1e-2)).double()
    trainer = small_trainer(
        devices=2,
        strategy=strategy(),
        max_steps=11,
        callbacks=[recorder, MergedAverage(0.5)],
        limit_val_batches=1,
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, InFloat64(meta_batch=4, val_tasks=8, seed=0))
    return {
        "losses": [float(report["loss"]) for report in recorder.reports],
        "validations": [float(trainer.callback_metrics["val/loss"])],
        "weights": [float(value.square().sum()) for value in recorder.states[-1].values()],
        "average": [float(parameter.detach().square().sum()) for parameter in module.parameters()],
    }


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_training_gives_the_stored_numbers(name: str) -> None:
    figures, _ = in_workers(_figures, 2, STRATEGIES[name])
    stored: dict[str, Any] = json.loads(FIXTURES.read_text()) if FIXTURES.exists() else {}
    if os.environ.get(REWRITE) == "1":
        FIXTURES.write_text(json.dumps(stored | {name: figures}, indent=1, sort_keys=True) + "\n")
        pytest.skip(f"{REWRITE} is 1: the numbers were stored, not compared")
    assert stored[name].keys() == figures.keys()
    for kind, values in figures.items():
        assert values == pytest.approx(stored[name][kind], rel=1e-9), kind


def test_every_stored_training_is_still_made() -> None:
    assert json.loads(FIXTURES.read_text()).keys() == STRATEGIES.keys()
