"""What adapts by pattern of names: ANIL, BOIL, biases only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dmaml_pl import ANIL, BOIL, MAML, MLP
from dmaml_pl.algorithms import Algorithm, Weights
from dmaml_pl.engines import Learn2LearnEngine
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.tasks import TaskBatch
from tests.algorithm_promises import AlgorithmPromises


class OfAPart(AlgorithmPromises):
    """w' = w - inner_lr * dL(support; w)/dw, repeated, for some of the weights."""

    adapting: tuple[str, ...]
    learning_steps = 200
    __test__ = False

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return MLP(hidden=[20, 20]).double()

    def task_loss(
        self, learner: MetaLearner, meta: Weights, task: TaskBatch, loss: Callable[[Weights, Tensor, Tensor], Tensor]
    ) -> Tensor:
        weights, second_order = dict(meta), not learner.algorithm.first_order
        fixed = meta if second_order else {name: w.detach() for name, w in meta.items()}
        for _ in range(2):
            at = {name: weights[name] for name in self.adapting}
            support = loss(fixed | at, task.support_x, task.support_y)
            gradients = torch.autograd.grad(support, list(at.values()), create_graph=second_order)
            weights |= {name: at[name] - 0.05 * g for name, g in zip(at, gradients, strict=True)}
        return loss(weights, task.query_x, task.query_y)

    def test_what_does_not_adapt_is_the_same_for_all_tasks_and_learned(self) -> None:
        learner, batch = self.learner(), self.batch()
        assert learner.algorithm.adapts == list(self.adapting)
        assert self.meta_gradient(learner, batch).keys() == learner.meta().keys()


class TestANIL(OfAPart):
    __test__ = True
    adapting = ("layers.4.weight", "layers.4.bias")

    def algorithm(self, *, first_order: bool = False) -> Algorithm:
        return ANIL(inner_lr=0.05, inner_steps=2, first_order=first_order)

    def test_learn2learn_has_it(self) -> None:
        assert Learn2LearnEngine(self.objective()).refusal(self.learner(), self.batch()) is None


class TestBOIL(OfAPart):
    __test__ = True
    adapting = ("layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias")

    def algorithm(self, *, first_order: bool = False) -> Algorithm:
        return BOIL(inner_lr=0.05, inner_steps=2, first_order=first_order)


class TestBiasesOnly(OfAPart):
    __test__ = True
    adapting = ("layers.0.bias", "layers.2.bias", "layers.4.bias")

    def algorithm(self, *, first_order: bool = False) -> Algorithm:
        return MAML(inner_lr=0.05, inner_steps=2, first_order=first_order, adapts=["*.bias"])


def test_patterns_add_and_take_out_again() -> None:
    algorithm = MAML(adapts=["layers.[24].*", "!*.weight"])
    algorithm.attach(MLP())
    assert algorithm.adapts == ["layers.2.bias", "layers.4.bias"]


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match=r"model.algorithm.adapts has the pattern 'layer.4.bias', .*layers.4.bias"):
        MAML(adapts=["layer.4.bias"]).attach(MLP())


def test_patterns_that_leave_nothing_are_refused() -> None:
    network = MLP().requires_grad_(False)
    network.layers[0].requires_grad_(True)
    with pytest.raises(
        ConfigError, match=r"leaves nothing that adapts: the network has layers.0.weight, layers.0.bias"
    ):
        MAML(adapts=["layers.4.*"]).attach(network)
