"""MAML++: losses after every step, rates per weight and step, norm weights per step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmaml_pl import LSLR, MAML, MAMLPlusPlus
from dmaml_pl.algorithms import Weights
from dmaml_pl.engines import VectorizedEngine
from dmaml_pl.engines import compiled as compiler
from dmaml_pl.errors import ConfigError
from dmaml_pl.evaluation.facts import settings_of
from dmaml_pl.learner import MetaLearner
from tests.algorithm_promises import TIGHT, Images, StepPromises


class TestMAMLPlusPlus(StepPromises):
    """In the middle of the annealing, with a norm layer whose weights are not those that they start as."""

    learning_steps = 120
    norms: tuple[str, ...] = ("1.weight", "1.bias")

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)).double()

    def algorithm(self, *, first_order: bool = False) -> MAMLPlusPlus:
        return MAMLPlusPlus(multi_step_until=10, inner_lr=0.05, inner_steps=2, first_order=first_order)

    def learner(self, *, first_order: bool = False) -> MetaLearner:
        learner, generator = super().learner(first_order=first_order), torch.Generator().manual_seed(0)
        learner.algorithm.begin(5)
        with torch.no_grad():
            for tensor in learner.algorithm.parameters():
                tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype), alpha=0.02)
        return learner

    def stepped(self, meta: Weights, weights: Weights, gradients: Weights, number: int) -> Weights:
        rates = meta["algorithm.rates"]
        return {name: w - rates[place, number] * gradients[name] for place, (name, w) in enumerate(weights.items())}

    def placed(self, meta: Weights, weights: Weights, number: int) -> Weights:
        own = {name: meta[f"algorithm.norms.{place}"] for place, name in enumerate(self.norms)}
        return weights | ({name: sets[number - 1] for name, sets in own.items()} if number else {})

    def outcome(self, losses: list[Tensor]) -> Tensor:
        return 0.25 * losses[0] + 0.75 * losses[1]

    def test_norm_layers_do_not_adapt_and_each_step_has_weights_of_its_own(self) -> None:
        learner = self.learner()
        assert learner.algorithm.adapts == ["0.weight", "0.bias", "3.weight", "3.bias"]
        gradient = self.meta_gradient(learner, self.batch())
        for place, name in enumerate(self.norms):
            sets = torch.cat([gradient[name].unsqueeze(0), gradient[f"algorithm.norms.{place}"]])
            assert sets.shape == (3, 8)
            assert len(sets.unique(dim=0)) == 3
            assert bool(sets.abs().sum(1).all())

    def test_steps_beyond_training_take_the_last_norm_weights(self) -> None:
        learner, batch = self.learner(), self.batch()
        with torch.no_grad():
            learner.algorithm.norms[0][1] = learner.algorithm.norms[1][1] = 0.0  # type: ignore[index]
        outputs = VectorizedEngine(self.objective()).predict(learner, batch, 4)  # (T, I + 1, Q, D)
        varies = (outputs - outputs[:, :, :1]).abs().amax((0, 2, 3)) > 0
        assert varies.tolist() == [True, True, False, False, False]


class OnImages(Images, TestMAMLPlusPlus):
    """With batch norms."""

    __test__ = False
    norms = tuple(f"features.{layer}.{kind}" for layer in (1, 5, 9, 13) for kind in ("weight", "bias"))


def test_with_convolutions_every_engine_equals_the_formula() -> None:
    OnImages().test_the_meta_gradient_of_every_engine_equals_the_formula()


def _gradient(learner: MetaLearner, **settings: Any) -> Weights:
    promises = TestMAMLPlusPlus()
    return promises.meta_gradient(learner, promises.batch(), VectorizedEngine(promises.objective(), **settings))


def _learner(kind: type[MAML], **settings: Any) -> MetaLearner:
    return MetaLearner(TestMAMLPlusPlus().network(), kind(inner_lr=0.05, inner_steps=2, **settings))


@pytest.mark.parametrize("steps", [1, 5])
def test_the_importance_is_that_of_the_papers_code(steps: int) -> None:
    algorithm = MAMLPlusPlus(multi_step_until=100, inner_steps=steps)
    for number in range(0, 130, 7):
        weights = algorithm.importance_at(number)
        assert sum(weights) == pytest.approx(1.0)
        others = max(1 / steps - number / (steps * 100), 0.03 / steps)
        last = min(1 / steps + number * (steps - 1) / (steps * 100), 1 - (steps - 1) * 0.03 / steps)
        expected = [others] * (steps - 1) + [last] if number < 100 else [0.0] * (steps - 1) + [1.0]
        assert weights == pytest.approx(expected)


def test_once_annealed_the_meta_gradient_is_that_of_learned_rates_alone() -> None:
    annealed = _learner(MAMLPlusPlus, multi_step_until=3, per_step_norms=False)
    annealed.algorithm.begin(3)
    torch.testing.assert_close(_gradient(annealed), _gradient(_learner(LSLR)), **TIGHT)
    before = _learner(MAMLPlusPlus, multi_step_until=3, per_step_norms=False)
    before.algorithm.begin(2)
    assert not torch.allclose(_gradient(before)["0.weight"], _gradient(annealed)["0.weight"])


def test_with_all_parts_off_it_is_maml() -> None:
    learner = _learner(MAMLPlusPlus, multi_step_until=0, learned_rates=False, per_step_norms=False)
    torch.testing.assert_close(_gradient(learner), _gradient(_learner(MAML)), **TIGHT)


def test_a_compiled_meta_gradient_follows_the_annealing_and_then_evaluates_the_last_step_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []

    def keep(graph: Any, examples: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph

    monkeypatch.setattr(compiler, "machine_code", keep)
    learner = _learner(MAMLPlusPlus, multi_step_until=3)
    promises = TestMAMLPlusPlus()
    engine = VectorizedEngine(promises.objective(), compiled=True)
    for number in range(5):
        learner.algorithm.begin(number)
        found = promises.meta_gradient(learner, promises.batch(), engine)
        torch.testing.assert_close(found, _gradient(learner), **TIGHT)
    assert len(sizes) == 2
    assert sizes[1] < sizes[0]


def test_a_pattern_says_which_norm_weights_are_per_step() -> None:
    learner = _learner(MAMLPlusPlus, adapts=["*", "!1.bias"])
    assert [p.shape for p in learner.algorithm.norms] == [(2, 8)]  # type: ignore[union-attr]


def test_its_report_tells_the_settings_of_all_its_parts() -> None:
    settings = settings_of(MAMLPlusPlus(multi_step_until=3, learned_rates=False, meta_lr=0.5, inner_lr=0.2))
    told = {"multi_step_until": 3, "learned_rates": False, "meta_lr": 0.5, "inner_lr": 0.2, "first_order": False}
    assert told.items() <= settings.items()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"multi_step_until is -1, but must be 0 or greater"):
        MAMLPlusPlus(multi_step_until=-1)
    with pytest.raises(ConfigError, match=r"adapts chooses weights of norm layers only, .*per_step_norms"):
        _learner(MAMLPlusPlus, adapts=["1.*"])
