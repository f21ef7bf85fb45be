"""ALFA: rates and decays chosen at every step by a small network."""

from __future__ import annotations

import pytest
import torch

from dmaml_pl import ALFA, MAML
from dmaml_pl.algorithms import Weights
from dmaml_pl.engines import VectorizedEngine
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from tests.algorithm_promises import TIGHT, StepPromises, check_with_convolutions


class TestALFA(StepPromises):
    """w' = (1 - b * decay) w - a * rate * dL(support; w)/dw, repeated; (a, b) of the means of weights and gradients."""

    learning_steps = 130

    def algorithm(self, *, first_order: bool = False) -> ALFA:
        torch.manual_seed(1)
        return ALFA(weight_decay=0.5, inner_lr=0.05, inner_steps=2, first_order=first_order)

    def stepped(self, meta: Weights, weights: Weights, gradients: Weights, number: int) -> Weights:
        seen = [w.mean() for w in weights.values()] + [g.detach().mean() for g in gradients.values()]
        own = {name.removeprefix("algorithm."): w for name, w in meta.items() if name.startswith("algorithm.")}
        hidden = torch.relu(own["generator.0.weight"] @ torch.stack(seen) + own["generator.0.bias"])
        chosen = own["generator.2.weight"] @ hidden + own["generator.2.bias"]
        stepped = {}
        for place, (name, w) in enumerate(weights.items()):
            a, b = chosen[place], chosen[len(weights) + place]
            kept = 1 - b * own["decays"][place, number]
            stepped[name] = kept * w - a * own["rates"][place, number] * gradients[name]
        return stepped

    def test_a_generator_of_ones_and_zeros_makes_it_maml(self) -> None:
        learner, batch = self.learner(), self.batch()
        last = learner.algorithm.generator[2]  # type: ignore[index]
        with torch.no_grad():
            last.weight.zero_()  # type: ignore[union-attr]
            last.bias.copy_(torch.tensor([1.0] * 6 + [0.0] * 6))  # type: ignore[union-attr]
        maml = self.meta_gradient(MetaLearner(self.network(), MAML(inner_lr=0.05, inner_steps=2)), batch)
        own = self.meta_gradient(learner, batch)
        torch.testing.assert_close({name: own[name] for name in maml}, maml, **TIGHT)

    def test_rates_and_decays_start_as_in_the_papers_code(self) -> None:
        own = dict(self.learner().algorithm.named_parameters())
        assert bool((own["rates"] == 0.05).all())
        torch.testing.assert_close(own["decays"], torch.full((6, 2), 0.025, dtype=torch.float64))
        assert own["generator.0.weight"].shape == own["generator.2.weight"].shape == (12, 12)

    def test_steps_beyond_training_take_the_last_rates_and_decays(self) -> None:
        learner, batch = self.learner(), self.batch()
        engine = VectorizedEngine(self.objective())
        before = engine.adaptation_curve(learner, batch, 4).loss
        with torch.no_grad():
            learner.algorithm.rates[:, 1] = 0.0  # type: ignore[operator]
            learner.algorithm.decays[:, 1] = 0.0  # type: ignore[operator]
        after = engine.adaptation_curve(learner, batch, 4).loss
        assert torch.equal(before[:, :2], after[:, :2])
        assert torch.equal(after[:, 1:], after[:, 1:2].expand(-1, 4))


def test_with_convolutions_every_engine_equals_the_formula() -> None:
    check_with_convolutions(TestALFA)


def test_a_weight_that_is_not_used_does_not_matter() -> None:
    promises = TestALFA()
    network = promises.network()
    network.unused = torch.nn.Parameter(torch.ones(3).double())
    learner = MetaLearner(network, promises.algorithm())
    found = promises.meta_gradient(learner, promises.batch())
    assert "unused" not in found
    assert all(bool(g.isfinite().all()) for g in found.values())


def test_a_negative_decay_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.algorithm.weight_decay is -1.0, but must be 0 or greater"):
        ALFA(weight_decay=-1.0)
