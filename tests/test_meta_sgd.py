"""Meta-SGD: learned rates, held to learn2learn's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmaml_pl import MAML, MLP, MetaLearning, MetaSGD
from dmaml_pl.algorithms import Weights
from dmaml_pl.engines import Learn2LearnEngine
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from tests.algorithm_promises import TIGHT, StepPromises
from tests.recipes import same, state_of, straight_and_resumed, train_with_two
from tests.workers import in_workers


class TestMetaSGD(StepPromises):
    """w' = w - rate * dL(support; w)/dw, repeated."""

    learning_steps = 170

    def algorithm(self, *, first_order: bool = False) -> MetaSGD:
        return MetaSGD(inner_lr=0.05, inner_steps=2, first_order=first_order)

    def stepped(self, meta: Weights, weights: Weights, gradients: Weights, number: int) -> Weights:
        return {
            name: w - meta[f"algorithm.rates.{place}"] * gradients[name]
            for place, (name, w) in enumerate(weights.items())
        }

    def test_learn2learn_has_it(self) -> None:
        assert Learn2LearnEngine(self.objective()).refusal(self.learner(), self.batch()) is None

    def test_rates_that_are_all_equal_make_it_maml(self) -> None:
        batch = self.batch()
        maml = self.meta_gradient(MetaLearner(self.network(), MAML(inner_lr=0.05, inner_steps=2)), batch)
        own = self.meta_gradient(self.learner(), batch)
        torch.testing.assert_close({name: own[name] for name in maml}, maml, **TIGHT)


def test_the_rates_are_learned_with_a_learning_rate_of_their_own() -> None:
    promises = TestMetaSGD()
    algorithm = MetaSGD(inner_lr=0.05, meta_lr=0.5)
    optimizer = torch.optim.SGD(MetaLearner(promises.network(), algorithm).param_groups(), lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
    assert optimizer.param_groups[1]["params"] == list(algorithm.rates)


def test_a_learning_rate_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.algorithm.meta_lr is 0.0, but must be greater than 0"):
        MetaSGD(meta_lr=0.0)


def test_only_what_adapts_has_rates() -> None:
    promises = TestMetaSGD()
    algorithm = MetaSGD(adapts=["*.bias"])
    learner = MetaLearner(promises.network(), algorithm)
    assert [rate.shape for rate in algorithm.rates] == [(8,), (8,), (1,)]
    refusal = Learn2LearnEngine(promises.objective()).refusal(learner, promises.batch())
    assert refusal == "learn2learn has no MetaSGD with these settings"


def test_by_learn2learn_two_workers_learn_merge_and_resume_the_rates_to_the_bit(tmp_path: Path) -> None:
    first, second = in_workers(_train_and_resume, 2, tmp_path)
    assert [same(mine, others) for mine, others in zip(first["merged"], second["merged"], strict=True)] == [True] * 3
    assert same(first["straight"], first["resumed"])
    assert same(second["straight"], second["resumed"])
    rates = [value for name, value in first["straight"].items() if ".rates." in name]
    assert len(rates) == 4
    assert all(not torch.equal(rate, torch.full_like(rate, 0.05)) for rate in rates)


def _train_and_resume(folder: Path) -> dict[str, Any]:
    (straight, merged), (resumed, _) = straight_and_resumed(_train, folder)
    return {"straight": straight, "merged": merged, "resumed": resumed}


def _train(folder: Path, steps: int, ckpt: Path | None) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    algorithm = MetaSGD(inner_lr=0.05, inner_steps=2)
    module = MetaLearning(MLP(hidden=[8]), algorithm, engine="learn2learn", evaluation_steps=2)
    _, recorder = train_with_two(module, folder, steps, ckpt)
    return state_of(module), recorder.states
