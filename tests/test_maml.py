"""MAML, second and first order: what every algorithm promises, and its meta-gradient against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dmaml_pl import MAML
from dmaml_pl.algorithms import Weights
from dmaml_pl.engines import VectorizedEngine
from dmaml_pl.learner import MetaLearner
from dmaml_pl.tasks import TaskBatch
from tests.algorithm_promises import AlgorithmPromises


class TestMAML(AlgorithmPromises):
    """w' = w - inner_lr * dL(support; w)/dw, repeated."""

    def algorithm(self, *, first_order: bool = False) -> MAML:
        return MAML(inner_lr=0.05, inner_steps=2, first_order=first_order)

    def task_loss(
        self, learner: MetaLearner, meta: Weights, task: TaskBatch, loss: Callable[[Weights, Tensor, Tensor], Tensor]
    ) -> Tensor:
        weights, second_order = dict(meta), not learner.algorithm.first_order
        for _ in range(2):
            names = [name for name, w in weights.items() if w.requires_grad]
            support = loss(weights, task.support_x, task.support_y)
            gradients = torch.autograd.grad(support, [weights[name] for name in names], create_graph=second_order)
            weights |= {name: weights[name] - 0.05 * g for name, g in zip(names, gradients, strict=True)}
        return loss(weights, task.query_x, task.query_y)

    def test_first_order_differs_from_second_order(self) -> None:
        batch = self.batch()
        first, second = (self.meta_gradient(self.learner(first_order=given), batch) for given in (True, False))
        assert all(not torch.allclose(first[name], second[name], rtol=1e-4) for name in first)

    def test_the_meta_gradient_is_that_of_finite_differences(self) -> None:
        """Steps of 1e-7 and less: the meta-loss jumps where a ReLU of the inner loop switches."""
        learner, batch, engine = self.learner(), self.batch(), VectorizedEngine(self.objective())
        gradient = self.meta_gradient(learner, batch)

        def loss_at(shift: float, along: Weights) -> float:
            with torch.no_grad():
                for name, weight in learner.meta().items():
                    weight.add_(along[name], alpha=shift)
                loss = float(_mean_query_loss(engine, learner, batch))
                for name, weight in learner.meta().items():
                    weight.sub_(along[name], alpha=shift)
            return loss

        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            along = {
                name: torch.randn(w.shape, generator=generator, dtype=w.dtype) for name, w in learner.meta().items()
            }
            expected = sum(float((gradient[name] * along[name]).sum()) for name in gradient)
            found = (loss_at(1e-7, along) - loss_at(-1e-7, along)) / 2e-7
            assert abs(found - expected) < 1e-5 * max(abs(expected), 1.0)


def _mean_query_loss(engine: VectorizedEngine, learner: MetaLearner, batch: TaskBatch) -> Tensor:
    with torch.enable_grad():
        return engine.adaptation_curve(learner, batch, learner.algorithm.steps).loss[:, -1].mean()
