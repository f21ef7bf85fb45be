"""The algorithm of CONTRIBUTING.md, in a file outside of the package: in every engine, merged, kept and resumed."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmaml_pl import MLP, MetaLearning
from dmaml_pl.algorithms import Algorithm, Weights
from dmaml_pl.engines import EngineName
from dmaml_pl.engines import compiled as compiler
from dmaml_pl.learner import MetaLearner
from dmaml_pl.tasks import TaskBatch
from tests.algorithm_promises import AlgorithmPromises
from tests.recipes import same, state_of, straight_and_resumed, train_with_two
from tests.trainings import SETTINGS, dmaml, flags
from tests.workers import in_workers

ROOT = Path(__file__).parents[1]


def write_example(folder: Path) -> None:
    """The example as a user would save it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (example,) = [code for code in re.findall(r"```py\n(.*?)```", text, re.DOTALL) if "class MetaSGD" in code]
    (folder / "meta_sgd.py").write_text(example)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[Algorithm]]:
    folder = tmp_path_factory.mktemp("outside")
    write_example(folder)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("meta_sgd").MetaSGD
    sys.path.remove(str(folder))
    del sys.modules["meta_sgd"]


class TestMetaSGD(AlgorithmPromises):
    """w' = w - rate * dL(support; w)/dw, repeated; the rates are learned."""

    @pytest.fixture(autouse=True)
    def _example(self, example: type[Algorithm]) -> None:
        self.kind = example

    def algorithm(self, *, first_order: bool = False) -> Algorithm:
        kind: Any = self.kind
        made: Algorithm = kind(inner_lr=0.05, inner_steps=2, first_order=first_order)
        return made

    def task_loss(
        self, learner: MetaLearner, meta: Weights, task: TaskBatch, loss: Callable[[Weights, Tensor, Tensor], Tensor]
    ) -> Tensor:
        names = learner.algorithm.adapts
        weights, second_order = dict(meta), not learner.algorithm.first_order
        for _ in range(2):
            support = loss(weights, task.support_x, task.support_y)
            gradients = torch.autograd.grad(support, [weights[name] for name in names], create_graph=second_order)
            weights |= {
                name: weights[name] - meta[f"algorithm.rates.{number}"] * gradient
                for number, (name, gradient) in enumerate(zip(names, gradients, strict=True))
            }
        return loss(weights, task.query_x, task.query_y)


@pytest.mark.parametrize("engine", ["learn2learn", "per_task", "vectorized", "compiled"])
def test_two_workers_learn_merge_and_resume_the_rates_to_the_bit(
    engine: str, example: type[Algorithm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "machine_code", lambda graph, examples: graph)
    first, second = in_workers(_train_and_resume, 2, example, engine, tmp_path)
    assert [same(mine, others) for mine, others in zip(first["merged"], second["merged"], strict=True)] == [True] * 3
    assert same(first["straight"], first["resumed"])
    assert same(second["straight"], second["resumed"])
    rates = [value for name, value in first["straight"].items() if ".rates." in name]
    assert len(rates) == 4
    assert all(not torch.equal(rate, torch.full_like(rate, 0.05)) for rate in rates)


def _train_and_resume(example: Any, engine: str, folder: Path) -> dict[str, Any]:
    (straight, merged), (resumed, _) = straight_and_resumed(partial(_train, example, engine), folder)
    return {"straight": straight, "merged": merged, "resumed": resumed}


def _train(
    example: Any, engine: str, folder: Path, steps: int, ckpt: Path | None
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    name: EngineName = "vectorized" if engine == "compiled" else engine  # type: ignore[assignment]
    algorithm = example(inner_lr=0.05, inner_steps=2)
    module = MetaLearning(MLP(hidden=[8]), algorithm, engine=name, compile=engine == "compiled", evaluation_steps=2)
    _, recorder = train_with_two(module, folder, steps, ckpt)
    return state_of(module), recorder.states


def test_the_command_line_trains_it_by_its_class_path_and_adapts_with_what_it_learned(tmp_path: Path) -> None:
    write_example(tmp_path)
    settings = SETTINGS | {"model.algorithm": "meta_sgd.MetaSGD", "model.algorithm.inner_lr": "0.02"}
    ended = dmaml(tmp_path, "fit", "--config", str(ROOT / "configs" / "sinusoid.yaml"), *flags(settings))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    kept = next(tmp_path.rglob("last.ckpt"))
    state = torch.load(kept, weights_only=True)["state_dict"]
    assert "learner.algorithm.rates.0" in state
    table = "x,y\n" + "\n".join(f"{x},{x * 0.5}" for x in range(-5, 6)) + "\n"
    (tmp_path / "points.csv").write_text(table)
    words = ("--ckpt", str(kept), "--support", "points.csv", "--query", "points.csv", "--trust", "meta_sgd")
    adapted = dmaml(tmp_path, "adapt", *words)
    assert adapted.returncode == 0, adapted.stdout + adapted.stderr
    assert (tmp_path / "predictions.csv").is_file()
