"""Reptile: the way back from the adapted weights, without a second derivative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from dmaml_pl import MLP, InnerMomentum, Reptile
from dmaml_pl.algorithms import Algorithm, Weights
from dmaml_pl.engines import VectorizedEngine
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.tasks import TaskBatch
from tests.algorithm_promises import TIGHT, AlgorithmPromises


class TestReptile(AlgorithmPromises):
    """w_0 - w_K, by PyTorch's own Adam on minibatches."""

    learning_steps = 100
    first_orders = (True,)  # there is no other

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return MLP(hidden=[20, 20]).double()

    def algorithm(self, *, first_order: bool = True) -> Algorithm:
        return Reptile(inner_lr=0.03, inner_steps=3, inner_batch=8)

    def task_loss(
        self, learner: MetaLearner, meta: Weights, task: TaskBatch, loss: Callable[[Weights, Tensor, Tensor], Tensor]
    ) -> Tensor:
        network = self.network()
        optimizer = torch.optim.Adam(network.parameters(), lr=0.03, betas=(0.0, 0.999))
        x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
        for number in range(3):
            rows = learner.algorithm.minibatch(number, len(x))
            optimizer.zero_grad()
            mse_loss(network(x[rows]), y[rows]).backward()
            optimizer.step()
        way = {name: meta[name].detach() - w.detach() for name, w in network.named_parameters()}
        return torch.stack([(meta[name] * way[name]).sum() for name in way]).sum()  # its gradient is the way

    def test_no_second_derivative_is_built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[bool | None] = []
        grad = torch.autograd.grad

        def watched(*given: object, create_graph: bool | None = None, **settings: object) -> object:
            asked.append(create_graph)
            return grad(*given, create_graph=create_graph, **settings)  # type: ignore[call-overload]

        monkeypatch.setattr(torch.autograd, "grad", watched)
        learner, batch = self.learner(), self.batch()
        self.meta_gradient(learner, batch)
        assert len(asked) == 3
        assert not any(asked)

    def test_tasks_can_be_learned_from_by_their_support_sets_alone(self) -> None:
        learner, batch = MetaLearner(self.network(), Reptile(inner_steps=3, whole_tasks=False)), self.batch()
        other = batch._replace(query=batch.query.map(lambda tensor: tensor + 1))
        found, same = self.meta_gradient(learner, batch), self.meta_gradient(learner, other)
        torch.testing.assert_close(same, found, rtol=0, atol=0)
        learner = MetaLearner(self.network(), Reptile(inner_steps=3))
        found, changed = self.meta_gradient(learner, batch), self.meta_gradient(learner, other)
        assert not torch.equal(found["layers.0.weight"], changed["layers.0.weight"])

    def test_a_task_is_adapted_to_by_its_support_set_alone(self) -> None:
        learner, batch, engine = self.learner(), self.batch(), VectorizedEngine(self.objective())
        other = batch._replace(query=batch.query.map(lambda tensor: tensor.flip(1)))
        first, second = (engine.adaptation_curve(learner, each, 3).loss for each in (batch, other))
        torch.testing.assert_close(first, second, **TIGHT)

    def test_the_loss_that_is_shown_is_that_of_the_query_sets(self) -> None:
        learner, batch, engine = self.learner(), self.batch(), VectorizedEngine(self.objective())
        assert isinstance(learner.algorithm, Reptile)
        learner.algorithm.whole_tasks = False
        curve = engine.adaptation_curve(learner, batch, 3)
        torch.testing.assert_close(engine.meta_gradient(learner, batch).loss, curve.loss[:, 3].mean(), **TIGHT)

    def test_plain_gradient_descent_of_one_step_gives_the_gradient_of_the_support_sets(self) -> None:
        algorithm = Reptile(inner_lr=0.1, inner_steps=1, inner_optimizer=InnerMomentum(0.0), whole_tasks=False)
        learner, task = MetaLearner(self.network(), algorithm), self.batch(tasks=1)
        network = self.network()
        mse_loss(network(task.support_x[0]), task.support_y[0]).backward()
        expected = {name: 0.1 * w.grad for name, w in network.named_parameters() if w.grad is not None}
        torch.testing.assert_close(self.meta_gradient(learner, task), expected, **TIGHT)

    def test_sgd_with_a_learning_rate_of_one_goes_to_the_mean_of_the_adapted_weights(self) -> None:
        learner, batch = self.learner(), self.batch()
        before = {name: w.detach().clone() for name, w in learner.meta().items()}
        way = self.meta_gradient(learner, batch)
        torch.optim.SGD(learner.param_groups(), lr=1.0).step()
        for name, weight in learner.meta().items():
            torch.testing.assert_close(weight.detach(), before[name] - way[name], **TIGHT)


def test_minibatches_go_through_all_samples_before_any_comes_again() -> None:
    algorithm = Reptile(inner_batch=4)
    rows = [row for number in range(15) for row in algorithm.minibatch(number, 10) or ()]
    epochs = [rows[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert [algorithm.minibatch(number, 10) for number in (7, 0)] == [rows[28:32], rows[:4]]


def test_a_minibatch_may_be_larger_than_what_is_left_or_all() -> None:
    assert Reptile(inner_batch=10).minibatch(3, 10) is None
    assert Reptile().minibatch(3, 10) is None


def test_an_empty_minibatch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.algorithm.inner_batch is 0"):
        Reptile(inner_batch=0)
