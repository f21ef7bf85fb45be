"""Meta-Curvature and KFO, held to learn2learn's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dmaml_pl import KFO, MAML, MetaCurvature
from dmaml_pl.algorithms import GradientTransform, Weights
from dmaml_pl.engines import Learn2LearnEngine, VectorizedEngine
from dmaml_pl.learner import MetaLearner
from tests.algorithm_promises import TIGHT, Images, StepPromises, check_with_convolutions


class OfATransform(StepPromises):
    """w' = w - inner_lr * U(dL(support; w)/dw), repeated; U starts near the identity, so that mistakes would show."""

    __test__ = False
    learning_steps = 110
    kind: type[GradientTransform]

    def algorithm(self, *, first_order: bool = False) -> GradientTransform:
        return self.kind(inner_lr=0.05, inner_steps=2, first_order=first_order)

    def learner(self, *, first_order: bool = False) -> MetaLearner:
        learner, generator = super().learner(first_order=first_order), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in learner.algorithm.parameters():
                tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype), alpha=0.05)
        return learner

    def stepped(self, meta: Weights, weights: Weights, gradients: Weights, number: int) -> Weights:
        return {
            name: w - 0.05 * self.transformed(meta, f"algorithm.transforms.{place}", gradients[name])
            for place, (name, w) in enumerate(weights.items())
        }

    def transformed(self, meta: Weights, own: str, g: Tensor) -> Tensor:
        """U of one gradient, value by value."""
        raise NotImplementedError

    def test_learn2learn_has_it(self) -> None:
        assert Learn2LearnEngine(self.objective()).refusal(self.learner(), self.batch()) is None

    def test_the_identity_makes_it_maml(self) -> None:
        batch = self.batch()
        maml = self.meta_gradient(MetaLearner(self.network(), MAML(inner_lr=0.05, inner_steps=2)), batch)
        own = self.meta_gradient(MetaLearner(self.network(), self.algorithm()), batch)
        torch.testing.assert_close({name: own[name] for name in maml}, maml, **TIGHT)


class TestMetaCurvature(OfATransform):
    """U multiplies along each axis by a matrix."""

    __test__ = True
    kind = MetaCurvature

    def transformed(self, meta: Weights, own: str, g: Tensor) -> Tensor:
        if g.ndim == 1:
            return meta[f"{own}.scale"] * g
        outputs, inputs = meta[f"{own}.outputs"], meta[f"{own}.inputs"]
        if g.ndim == 2:
            return torch.einsum("op,pi,ij->oj", outputs, g, inputs)
        return torch.einsum("op,pik,ij,lk->ojl", outputs, g.flatten(2), inputs, meta[f"{own}.filter"]).view(g.shape)


class TestKFO(OfATransform):
    """U(G) = L'L G R'R."""

    __test__ = True
    kind = KFO

    def transformed(self, meta: Weights, own: str, g: Tensor) -> Tensor:
        left, right = meta[f"{own}.left"], meta[f"{own}.right"]
        matrices = g.unsqueeze(1) if g.ndim == 1 else g.flatten(2) if g.ndim == 4 else g
        return torch.einsum("pq,pr,...rs,ts,tu->...qu", left, left, matrices, right, right).reshape(g.shape)


@pytest.mark.parametrize("promises", [TestMetaCurvature, TestKFO])
def test_with_convolutions_every_engine_equals_the_formula(promises: type[StepPromises]) -> None:
    check_with_convolutions(promises, engines=3)  # learn2learn among them


class _WithAnOddWeight(nn.Module):
    """A weight of three axes, for which there is no transform."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4, 1).double())
        self.layer = nn.Linear(12, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer((x @ self.odd.view(1, 12)).tanh())
        return out


@pytest.mark.parametrize("kind", [MetaCurvature, KFO])
def test_gradients_of_other_shapes_are_left_as_they_are(kind: type[GradientTransform]) -> None:
    promises = TestKFO()
    batch, network = promises.batch(), _WithAnOddWeight()
    learner = MetaLearner(copy.deepcopy(network), kind(inner_lr=0.05, inner_steps=2))
    assert not [name for name in learner.meta() if name.startswith("algorithm.transforms.0")]
    maml = MetaLearner(network, MAML(inner_lr=0.05, inner_steps=2))
    expected = promises.meta_gradient(maml, batch)
    for engine in (VectorizedEngine(promises.objective()), Learn2LearnEngine(promises.objective())):
        assert engine.refusal(learner, batch) is None
        found = promises.meta_gradient(learner, batch, engine)
        torch.testing.assert_close({name: found[name] for name in expected}, expected, **TIGHT)


def test_the_matrices_are_where_the_network_is_and_of_its_type() -> None:
    network = Images().network().to("meta", torch.bfloat16)
    for kind in (MetaCurvature, KFO):
        algorithm = kind()
        algorithm.attach(network)
        assert {(p.dtype, p.device.type) for p in algorithm.parameters()} == {(torch.bfloat16, "meta")}
