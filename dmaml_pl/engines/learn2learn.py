"""The reference engine: learn2learn's own wrappers, one task after another. Works for any network.

Legend: T tasks, Q query samples, I adaptation steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmaml_pl.algorithms.base import Algorithm, Learner
from dmaml_pl.engines.base import AdaptationCurve, Backward, MetaOutcome
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import TaskBatch


class Learn2LearnEngine:
    """Adapts the tasks of a meta-batch one by one; see `Engine` for what the methods promise.

    Args:
        algorithm: the inner loop.
        objective: the loss and the metric.
    """

    def __init__(self, algorithm: Algorithm, objective: Objective) -> None:
        self.algorithm = algorithm
        self.objective = objective

    def name(self, learner: Learner) -> str:
        """Always itself."""
        return "learn2learn"

    def check(self, learner: Learner, batch: TaskBatch) -> None:
        """Nothing to try: any network will do."""

    def meta_gradient(self, learner: Learner, batch: TaskBatch, backward: Backward = Tensor.backward) -> MetaOutcome:
        """Add the meta-gradient, the gradient of the mean query loss after adaptation, to the parameters' `.grad`.

        Each task is differentiated as soon as it is adapted, so that one task's graph is in memory at a time.
        """
        losses, metrics, objective = [], [], self.objective
        for number in range(batch.tasks):
            task = batch.task(number)
            adapted = learner.clone()
            for _ in range(self.algorithm.steps):
                adapted.adapt(objective.loss(adapted(task.support_x), task.support_y))
            prediction = adapted(task.query_x)
            loss = objective.loss(prediction, task.query_y)
            backward(loss / batch.tasks)
            losses.append(loss.detach())
            metrics.append(objective.measure(prediction.detach(), task.query_y))
        return MetaOutcome(torch.stack(losses).mean(), torch.stack(metrics).mean())

    def threads(self, learner: Learner, batch: TaskBatch) -> None:
        """All."""

    def adaptation_curve(self, learner: Learner, batch: TaskBatch, steps: int) -> AdaptationCurve:
        """Judge every task before adaptation and after each step of it; leaves no gradients behind."""
        curves, objective = [], self.objective
        for number in range(batch.tasks):
            query_y = batch.task(number).query_y
            curves.append(
                [
                    torch.stack([objective.loss(prediction, query_y), objective.measure(prediction, query_y)])
                    for prediction in _predictions(learner, batch.task(number), steps, objective)
                ]
            )
        values = torch.stack([torch.stack(curve) for curve in curves])
        return AdaptationCurve(values[..., 0], values[..., 1])

    def predict(self, learner: Learner, batch: TaskBatch, steps: int) -> Tensor:
        """Query predictions before adaptation and after each step of it, (T, I + 1, Q, ...)."""
        return torch.stack(
            [
                torch.stack(_predictions(learner, batch.task(number), steps, self.objective))
                for number in range(batch.tasks)
            ]
        )


def _predictions(learner: Learner, task: TaskBatch, steps: int, objective: Objective) -> list[Tensor]:
    """Query predictions of one task after 0 .. `steps` steps; nothing is meta-learned, so first order is enough."""
    adapted = learner.clone()
    predictions = []
    for step in range(steps + 1):
        with torch.no_grad():
            predictions.append(adapted(task.query_x))
        if step < steps:
            adapted.adapt(objective.loss(adapted(task.support_x), task.support_y), first_order=True)
    return predictions
