"""The algorithm of CONTRIBUTING.md, in a file outside of the package: in every engine, merged, kept and resumed."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmaml_pl import MLP, MetaLearning
from dmaml_pl.algorithms import Algorithm, Weights
from dmaml_pl.engines import EngineChoice, EngineName
from dmaml_pl.engines import compiled as compiler
from dmaml_pl.errors import ConfigError
from tests.algorithm_promises import StepPromises
from tests.recipes import same, state_of, straight_and_resumed, train_with_two
from tests.workers import in_workers

ROOT = Path(__file__).parents[1]


def write_example(folder: Path) -> None:
    """The example as a user would save it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (example,) = [code for code in re.findall(r"```py\n(.*?)```", text, re.DOTALL) if "class ClippedMAML" in code]
    (folder / "clipped.py").write_text(example)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[Algorithm]]:
    folder = tmp_path_factory.mktemp("outside")
    write_example(folder)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("clipped").ClippedMAML
    sys.path.remove(str(folder))
    del sys.modules["clipped"]


class TestClippedMAML(StepPromises):
    """w' = w - inner_lr * g * c / sqrt(c^2 + |g|^2), repeated; c is learned."""

    @pytest.fixture(autouse=True)
    def _example(self, example: type[Algorithm]) -> None:
        self.kind = example

    def algorithm(self, *, first_order: bool = False) -> Algorithm:
        kind: Any = self.kind
        made: Algorithm = kind(longest=2.0, inner_lr=0.05, inner_steps=2, first_order=first_order)
        return made

    def stepped(self, meta: Weights, weights: Weights, gradients: Weights, number: int) -> Weights:
        c, norm = meta["algorithm.longest"], torch.cat([g.flatten() for g in gradients.values()]).norm()
        return {name: w - 0.05 * gradients[name] / (1 + (norm / c) ** 2) ** 0.5 for name, w in weights.items()}

    def test_far_longer_gradients_are_shortened_to_the_length_and_far_shorter_ones_kept(self) -> None:
        learner = self.learner()
        gradients = {"w": torch.tensor([[3e6, 4e6], [3e-6, 4e-6]], dtype=torch.float64)}
        found = learner.algorithm.step(learner.meta(), {"w": torch.zeros(2, 2).double()}, gradients, 0)["w"]
        torch.testing.assert_close(found / -0.05, torch.tensor([[1.2, 1.6], [3e-6, 4e-6]], dtype=torch.float64))

    def test_learn2learn_has_it_not_which_is_told_in_one_line(self) -> None:
        choice = EngineChoice("learn2learn", self.objective())
        with pytest.raises(ConfigError) as caught:
            choice.for_training(self.learner(), self.batch())
        told = "model.engine is learn2learn, but learn2learn has no ClippedMAML with these settings: "
        assert str(caught.value) == f"{told}set model.engine to auto."


@pytest.mark.parametrize("engine", ["per_task", "vectorized", "compiled"])
def test_two_workers_learn_merge_and_resume_the_length_to_the_bit(
    engine: str, example: type[Algorithm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "machine_code", lambda graph, examples: graph)
    first, second = in_workers(_train_and_resume, 2, example, engine, tmp_path)
    assert [same(mine, others) for mine, others in zip(first["merged"], second["merged"], strict=True)] == [True] * 3
    assert same(first["straight"], first["resumed"])
    assert same(second["straight"], second["resumed"])
    longest = float(first["straight"]["learner.algorithm.longest"])
    assert math.isfinite(longest)
    assert longest != 2.0


def _train_and_resume(example: Any, engine: str, folder: Path) -> dict[str, Any]:
    (straight, merged), (resumed, _) = straight_and_resumed(partial(_train, example, engine), folder)
    return {"straight": straight, "merged": merged, "resumed": resumed}


def _train(
    example: Any, engine: str, folder: Path, steps: int, ckpt: Path | None
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    name: EngineName = "vectorized" if engine == "compiled" else engine  # type: ignore[assignment]
    algorithm = example(longest=2.0, inner_lr=0.05, inner_steps=2)
    module = MetaLearning(MLP(hidden=[8]), algorithm, engine=name, compile=engine == "compiled", evaluation_steps=2)
    _, recorder = train_with_two(module, folder, steps, ckpt)
    return state_of(module), recorder.states
