"""CAVIA: a context adapts from zero, and nothing else; all else is learned through it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dmaml_pl import CAVIA, MLP, Conv4
from dmaml_pl.algorithms import Algorithm, Weights
from dmaml_pl.engines import EngineChoice, VectorizedEngine
from dmaml_pl.engines.per_task import adapted_weights
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.networks import ContextConv4, ContextMLP
from dmaml_pl.objectives import objective_of
from dmaml_pl.tasks import Samples, TaskBatch
from tests.algorithm_promises import FAST, TIGHT, AlgorithmPromises


class TestCAVIA(AlgorithmPromises):
    """c_0 = 0; c' = c - inner_lr * dL(support; c, w)/dc."""

    learning_steps = 100

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return ContextMLP(hidden=[20, 20], context=3).double()

    def algorithm(self, *, first_order: bool = False) -> Algorithm:
        return CAVIA(inner_lr=1.0, inner_steps=2, first_order=first_order)

    def task_loss(
        self, learner: MetaLearner, meta: Weights, task: TaskBatch, loss: Callable[[Weights, Tensor, Tensor], Tensor]
    ) -> Tensor:
        second_order = not learner.algorithm.first_order
        fixed = meta if second_order else {name: w.detach() for name, w in meta.items()}
        context = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        for _ in range(2):
            support = loss(fixed | {"context": context}, task.support_x, task.support_y)
            (gradient,) = torch.autograd.grad(support, context, create_graph=second_order)
            context = context - gradient
        return loss(meta | {"context": context}, task.query_x, task.query_y)

    def test_the_context_alone_adapts_and_alone_is_not_learned(self) -> None:
        learner, batch = self.learner(), self.batch()
        assert learner.algorithm.adapts == ["context"]
        assert self.meta_gradient(learner, batch).keys() == learner.meta().keys() - {"context"}
        task = batch.task(0)
        adapted = adapted_weights(learner, self.objective(), task.support_x, task.support_y, 2)
        assert adapted.keys() == {"context"}
        assert bool(adapted["context"].abs().min() > 0)

    def test_every_task_starts_at_zero_whatever_the_network_holds(self) -> None:
        learner, batch = self.learner(), self.batch()
        expected = self.meta_gradient(learner, batch)
        learner.network.get_parameter("context").data.fill_(7.0)
        torch.testing.assert_close(self.meta_gradient(learner, batch), expected, **TIGHT)

    def test_what_is_frozen_besides_the_context_stays_frozen(self) -> None:
        network = self.network()
        network.get_parameter("layers.2.weight").requires_grad_(False)
        learner, batch = MetaLearner(network, self.algorithm()), self.batch()
        for engine in self.engines(learner, batch):
            found = self.meta_gradient(learner, batch, engine)
            assert found.keys() == learner.meta().keys() - {"context", "layers.2.weight"}


def test_a_context_scales_and_shifts_the_maps_of_a_convolutional_network_in_every_engine() -> None:
    torch.manual_seed(0)
    network = ContextConv4(context=3, ways=3, filters=4, image_size=16).double()
    learner, objective = MetaLearner(network, CAVIA(inner_lr=0.3, inner_steps=2)), objective_of("classification")
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(2, 6, 1, 16, 16, generator=generator, dtype=torch.float64), torch.arange(3).repeat(2, 2)
    batch = TaskBatch.of(x, y, x.flip(1), y.flip(1))
    assert learner.algorithm.adapts == ["features.10.context"]
    gradients = []
    for name in FAST:
        learner.zero_grad()
        EngineChoice(name, objective).for_training(learner, batch).meta_gradient(learner, batch)
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1], **TIGHT)
    assert gradients[0].keys() == learner.meta().keys() - {"features.10.context"}
    curve = VectorizedEngine(objective).adaptation_curve(learner, batch, 2).loss
    assert bool((curve[:, 2] < curve[:, 0]).all())


def test_a_network_without_a_context_is_told_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"CAVIA, but model.network, Conv4, has no parameter named context: set it"):
        CAVIA().attach(Conv4())


def test_parameters_of_another_name_may_be_the_context() -> None:
    network = MLP()
    algorithm = CAVIA(adapts=["layers.0.bias"])
    algorithm.attach(network)
    assert algorithm.adapts == ["layers.0.bias"]
    assert not network.get_parameter("layers.0.bias").requires_grad


def test_a_context_beside_the_inputs_is_one_of_them() -> None:
    network, plain = ContextMLP(inputs=2, context=3), MLP(inputs=5)
    plain.load_state_dict({name: w for name, w in network.state_dict().items() if name != "context"})
    network.context.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    samples = Samples(torch.rand(4, 2), torch.rand(4, 1))
    beside = torch.tensor([[1.0, 2.0, 3.0]]).expand(4, -1)
    torch.testing.assert_close(network(samples.x), plain(torch.cat([samples.x, beside], dim=1)))
