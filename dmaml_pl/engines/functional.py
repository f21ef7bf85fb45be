"""Base of the engines that run a network as a function of weights: what they do with the one loop.

Legend: T tasks, B samples, Q query samples, I adaptation steps.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmaml_pl.algorithms.base import Weights
from dmaml_pl.engines import curvature, loop
from dmaml_pl.engines.base import AdaptationCurve, Engine, Product
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import Samples, TaskBatch


class FunctionalEngine(Engine):
    """Base of the engines that run a network as a function of weights; see `Engine` for what the methods promise.

    Frozen and unused weights are left as they are, as by learn2learn.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self._curvatures = curvature.Curvatures()

    @abstractmethod
    def each(self, learner: MetaLearner, batch: TaskBatch, work: loop.Work[loop.Found]) -> Iterator[loop.Found]:
        """What `work` gives of each part of a batch that is in memory at a time, in the order of the tasks."""

    def adaptation_curve(self, learner: MetaLearner, batch: TaskBatch, steps: int) -> AdaptationCurve:
        """Evaluate every task before adaptation and after each step of it."""
        losses, metrics = zip(*self.each(learner, batch, partial(loop.curve, steps=steps)), strict=True)
        return AdaptationCurve(torch.cat(losses), torch.cat(metrics))

    def predict(self, learner: MetaLearner, batch: TaskBatch, steps: int) -> Tensor:
        """Query predictions before adaptation and after each step of it."""
        return torch.cat(list(self.each(learner, batch, partial(loop.predictions, steps=steps))))

    def evaluate_only(self, learner: MetaLearner, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """The mean loss after adaptation, and the mean constraint, scalars; no gradient is computed."""
        losses, constraints = zip(*self.each(learner, batch, curvature.evaluate_only), strict=True)
        return torch.cat(losses).mean(), torch.cat(constraints).mean()

    def curvature(self, learner: MetaLearner, batch: TaskBatch, *, exact: bool, every: int) -> Product:
        """The curvature of the mean constraint; see `engines/curvature.py`."""
        products = list(self.each(learner, batch, partial(self._curvatures.linearize, exact=exact, every=every)))

        def mean(vector: Weights) -> Weights:
            parts = [product(vector) for product in products]
            return {name: sum((part[name] for part in parts[1:]), parts[0][name]) / batch.tasks for name in vector}

        return mean

    def act(self, learner: MetaLearner, supports: tuple[Samples, ...]) -> Callable[[Tensor], Any]:
        """The networks adapted to support sets, one a step; they are adapted when they are first asked."""
        meta, ready = loop.detached(learner.meta()), list[Callable[[Tensor], Any]]()

        def outputs(x: Tensor) -> Any:
            if not ready:
                batch = TaskBatch(
                    supports, supports[-1] if supports else Samples(x, x)
                )  # on which nothing is evaluated
                ready.append(self.with_weights(learner, meta, self._adapted(learner, batch)))
            return ready[0](x)

        return outputs

    def _adapted(self, learner: MetaLearner, batch: TaskBatch) -> Weights:
        """Each task's own weights, (T, ...), after a step for each support set there is."""
        steps = len(batch.support)
        if not steps:  # nothing to try an engine on
            buffers = dict(learner.network.named_buffers())
            tasks = loop.NetworkTasks(learner.network, buffers, self.objective, batch, loop.at_once)
            return _adapted(learner, learner.meta(), tasks, 0)
        with torch.enable_grad():
            parts = list(self.each(learner, batch, partial(_adapted, steps=steps)))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def with_weights(self, learner: MetaLearner, meta: Weights, fast: Weights) -> Callable[[Tensor], Any]:
        """The networks with each task's own weights: from inputs (T, B, ...) to outputs, without gradients."""
        buffers = dict(learner.network.named_buffers())

        def outputs(x: Tensor) -> Any:
            batch = TaskBatch((), Samples(x, x))
            tasks = loop.NetworkTasks(learner.network, buffers, self.objective, batch, loop.at_once)
            with torch.no_grad():
                return tasks.run(meta, fast, x)

        return outputs


def _adapted(learner: MetaLearner, meta: Weights, tasks: loop.NetworkTasks, steps: int) -> Weights:
    return loop.detached(loop.steps_of(learner, meta, tasks, steps)[-1])
