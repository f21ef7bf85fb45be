"""Inner optimizers with a state: PyTorch's own are the reference, and every engine differentiates through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dmaml_pl import MAML, InnerAdam, InnerMomentum
from dmaml_pl.algorithms import InnerOptimizer, Weights
from dmaml_pl.engines import VectorizedEngine
from dmaml_pl.engines.per_task import adapted_weights
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.tasks import TaskBatch
from tests.algorithm_promises import TIGHT, AlgorithmPromises


class TestMAMLWithMomentum(AlgorithmPromises):
    """v = 0.8 v + g; w' = w - inner_lr * v."""

    def algorithm(self, *, first_order: bool = False) -> MAML:
        return MAML(inner_lr=0.02, inner_steps=3, first_order=first_order, inner_optimizer=InnerMomentum(0.8))

    def task_loss(
        self, learner: MetaLearner, meta: Weights, task: TaskBatch, loss: Callable[[Weights, Tensor, Tensor], Tensor]
    ) -> Tensor:
        weights, second_order = dict(meta), not learner.algorithm.first_order
        velocity = dict.fromkeys(learner.algorithm.adapts, torch.zeros((), dtype=torch.float64))
        for _ in range(3):
            names = learner.algorithm.adapts
            support = loss(weights, task.support_x, task.support_y)
            gradients = torch.autograd.grad(support, [weights[name] for name in names], create_graph=second_order)
            velocity = {name: 0.8 * velocity[name] + g for name, g in zip(names, gradients, strict=True)}
            weights |= {name: weights[name] - 0.02 * velocity[name] for name in names}
        return loss(weights, task.query_x, task.query_y)


class TestMAMLWithAdam(AlgorithmPromises):
    """m = 0.7 m + 0.3 g; v = 0.9 v + 0.1 g^2; w' = w - inner_lr * corrected m / (sqrt(corrected v) + eps)."""

    def algorithm(self, *, first_order: bool = False) -> MAML:
        optimizer = InnerAdam(0.7, 0.9, eps=1e-3)
        return MAML(inner_lr=0.02, inner_steps=3, first_order=first_order, inner_optimizer=optimizer)

    def task_loss(
        self, learner: MetaLearner, meta: Weights, task: TaskBatch, loss: Callable[[Weights, Tensor, Tensor], Tensor]
    ) -> Tensor:
        weights, second_order = dict(meta), not learner.algorithm.first_order
        names, zero = learner.algorithm.adapts, torch.zeros((), dtype=torch.float64)
        mean, square = dict.fromkeys(names, zero), dict.fromkeys(names, zero)
        for number in (1, 2, 3):
            support = loss(weights, task.support_x, task.support_y)
            gradients = torch.autograd.grad(support, [weights[name] for name in names], create_graph=second_order)
            for name, g in zip(names, gradients, strict=True):
                mean[name] = 0.7 * mean[name] + 0.3 * g
                square[name] = 0.9 * square[name] + 0.1 * g**2
                # A root whose derivative at zero is zero: a unit that is off has no gradient.
                root = (square[name] / (1 - 0.9**number) + 1e-60).sqrt()
                weights[name] = weights[name] - 0.02 * mean[name] / (1 - 0.7**number) / (root + 1e-3)
        return loss(weights, task.query_x, task.query_y)

    def test_units_that_are_off_leave_the_meta_gradient_finite(self) -> None:
        learner = self.learner()
        with torch.no_grad():
            learner.network.layers[0].bias[:4] = -100.0  # type: ignore[union-attr, index]
        found = self.meta_gradient(learner, self.batch())
        assert all(bool(g.isfinite().all()) for g in found.values())
        assert not found["layers.0.weight"][:4].any()


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        (InnerMomentum(0.9), lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)),
        (InnerMomentum(0.9, nesterov=True), lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True)),
        (InnerAdam(), lambda p: torch.optim.Adam(p, lr=0.02)),
        (InnerAdam(beta1=0.0), lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.0, 0.999))),
    ],
)
def test_adaptation_equals_pytorchs_own_optimizer(inner: InnerOptimizer, outer: Any) -> None:
    promises = TestMAMLWithAdam()
    task = promises.batch().task(0)
    learner = MetaLearner(promises.network(), MAML(inner_lr=0.02, inner_optimizer=inner))
    found = adapted_weights(learner, promises.objective(), task.support_x, task.support_y, 5)
    network = promises.network()
    optimizer = outer(network.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(network(task.support_x), task.support_y).backward()
        optimizer.step()
    torch.testing.assert_close(found, dict(network.named_parameters()), **TIGHT)


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"inner_optimizer.beta2 is 1.5, but must be at least 0 and less than 1"):
        InnerAdam(beta2=1.5)


def test_first_order_changes_to_second_order_in_time() -> None:
    promises = TestMAMLWithMomentum()
    batch = promises.batch()

    def by(algorithm: MAML) -> Weights:
        return promises.meta_gradient(MetaLearner(promises.network(), algorithm), batch)

    changing = MAML(inner_lr=0.05, inner_steps=2, first_order_until=3)
    for number, first_order in enumerate((True, True, True, False, False)):
        changing.begin(number)
        expected = by(MAML(inner_lr=0.05, inner_steps=2, first_order=first_order))
        learner = MetaLearner(promises.network(), changing)
        found = promises.meta_gradient(learner, batch, VectorizedEngine(promises.objective()))
        torch.testing.assert_close(found, expected, **TIGHT)
