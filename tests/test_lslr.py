"""Learned rates of each layer and step."""

from __future__ import annotations

import torch

from dmaml_pl import LSLR, MAML
from dmaml_pl.algorithms import Weights
from dmaml_pl.engines import VectorizedEngine
from dmaml_pl.learner import MetaLearner
from tests.algorithm_promises import TIGHT, StepPromises


class TestLSLR(StepPromises):
    """w' = w - rate[w, step] * dL(support; w)/dw, repeated."""

    def algorithm(self, *, first_order: bool = False) -> LSLR:
        return LSLR(inner_lr=0.05, inner_steps=2, first_order=first_order)

    def stepped(self, meta: Weights, weights: Weights, gradients: Weights, number: int) -> Weights:
        rates = meta["algorithm.rates"]
        return {name: w - rates[place, number] * gradients[name] for place, (name, w) in enumerate(weights.items())}

    def test_rates_that_are_all_equal_make_it_maml(self) -> None:
        batch = self.batch()
        maml = self.meta_gradient(MetaLearner(self.network(), MAML(inner_lr=0.05, inner_steps=2)), batch)
        own = self.meta_gradient(self.learner(), batch)
        torch.testing.assert_close({name: own[name] for name in maml}, maml, **TIGHT)

    def test_every_weight_and_step_has_a_rate_that_learns_alone(self) -> None:
        gradient = self.meta_gradient(self.learner(), self.batch())["algorithm.rates"]
        assert gradient.shape == (6, 2)
        assert gradient.unique().numel() == 12

    def test_steps_beyond_training_take_the_last_rates(self) -> None:
        learner, batch = self.learner(), self.batch()
        with torch.no_grad():
            learner.algorithm.rates[:, 0] = 0.01  # type: ignore[operator]
        engine = VectorizedEngine(self.objective())
        found = engine.adaptation_curve(learner, batch, 5)
        long = MetaLearner(self.network(), LSLR(inner_lr=0.05, inner_steps=5))
        with torch.no_grad():
            long.algorithm.rates[:, 0] = 0.01  # type: ignore[operator]
        torch.testing.assert_close(found, engine.adaptation_curve(long, batch, 5), **TIGHT)
