"""The reference engine: learn2learn's own wrappers around the network, one task after another.

Legend: T tasks, Q query samples, I adaptation steps.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from dmaml_pl import _learn2learn
from dmaml_pl.engines import trial
from dmaml_pl.engines.base import AdaptationCurve, Backward, Engine, MetaOutcome, Of
from dmaml_pl.engines.loop import one_by_one
from dmaml_pl.engines.work import threads_for
from dmaml_pl.errors import reason_of
from dmaml_pl.learner import MetaLearner
from dmaml_pl.tasks import Samples, TaskBatch


class Learn2LearnEngine(Engine):
    """Adapts the tasks of a meta-batch one by one; see `Engine` for what the methods promise."""

    name = "learn2learn"

    def refusal(self, learner: MetaLearner, batch: TaskBatch) -> str | None:
        """Any network will do that does not go round its weights, and any algorithm that learn2learn has."""
        if not _learn2learn.installed():
            return _learn2learn.MISSING
        if self._wrapped(learner) is None:
            return f"learn2learn has no {type(learner.algorithm).__name__} with these settings"
        if len(batch.support) > 1 or any(isinstance(samples.y, dict) for samples in (*batch.support, batch.query)):
            return "learn2learn takes one support set, whose targets are one tensor"
        try:
            with trial.trial(learner.network, batch) as task:
                self._try(learner, task.task(0))
        except RuntimeError as error:
            return f"learn2learn cannot adapt {type(learner.network).__name__} ({reason_of(error)})"
        lost = None
        with suppress(RuntimeError), trial.trial(learner.network, batch) as task:
            lost = trial.lost_curvature(learner, self.objective, task)
            # A ScriptModule, of which learn2learn makes copies, is no function of its weights, and raises here.
            if lost is None and trial.written_buffer(learner.network, task) is None:
                return trial.strangeness(learner.network, self.objective, task, one_by_one)
        return lost and f"{type(learner.network).__name__} cannot be adapted ({lost})"

    def meta_gradient(
        self, learner: MetaLearner, batch: TaskBatch, backward: Backward = Tensor.backward, of: Of = "loss"
    ) -> MetaOutcome:
        """Add the meta-gradient to the parameters' `.grad`.

        Each task is differentiated as soon as it is adapted, so that one task's graph is in memory at a time.
        """
        losses, metrics, objective = [], [], self.objective
        wrapper = self._wrapped(learner)
        for number in range(batch.tasks):
            task = batch.task(number)
            adapted = wrapper.clone()
            for _ in range(learner.algorithm.steps):
                adapted.adapt(objective.support_loss(adapted(task.support_x), task.support_y))
            output = adapted(task.query_x)
            wanted = objective.query_loss if of == "loss" else objective.constraint
            loss = wanted(output, task.query_y)
            backward(loss / batch.tasks)
            losses.append(loss.detach())
            metrics.append(objective.measure(output.detach(), task.query_y))
        return MetaOutcome(torch.stack(losses).mean(), torch.stack(metrics).mean())

    def threads(self, learner: MetaLearner, batch: TaskBatch) -> int | None:
        """One for small networks."""
        return threads_for(learner, self.objective, batch)

    def adaptation_curve(self, learner: MetaLearner, batch: TaskBatch, steps: int) -> AdaptationCurve:
        """Evaluate every task before adaptation and after each step of it."""
        curves, objective = [], self.objective
        for number in range(batch.tasks):
            y = batch.task(number).query_y
            outputs = self._outputs(learner, batch.task(number), steps)
            curves.append(
                [torch.stack([objective.query_loss(output, y), objective.measure(output, y)]) for output in outputs]
            )
        values = torch.stack([torch.stack(curve) for curve in curves])
        return AdaptationCurve(values[..., 0], values[..., 1])

    def predict(self, learner: MetaLearner, batch: TaskBatch, steps: int) -> Tensor:
        """Query predictions before adaptation and after each step of it."""
        return torch.stack(
            [torch.stack(self._outputs(learner, batch.task(number), steps)) for number in range(batch.tasks)]
        )

    def act(self, learner: MetaLearner, supports: tuple[Samples, ...]) -> Callable[[Tensor], Any]:
        """The networks adapted to support sets, one a step."""
        wrapper, adapted = self._wrapped(learner), list[Any]()

        def outputs(x: Tensor) -> Tensor:
            for number in range(len(x) if not adapted else 0):
                own = wrapper.clone()
                for support in supports:
                    task = support.map(lambda tensor, number=number: tensor[number])  # type: ignore[misc]
                    own.adapt(self.objective.support_loss(own(task.x), task.y), first_order=True)
                adapted.append(own)
            with torch.no_grad():
                return torch.stack([own(samples) for own, samples in zip(adapted, x, strict=True)])

        return outputs

    def _outputs(self, learner: MetaLearner, task: TaskBatch, steps: int) -> list[Tensor]:
        """Query predictions of one task after 0 .. `steps` steps; nothing is meta-learned: first order is enough."""
        adapted, found = self._wrapped(learner).clone(), []
        for step in range(steps + 1):
            with torch.no_grad():
                found.append(adapted(task.query_x))
            if step < steps:
                loss = self.objective.support_loss(adapted(task.support_x), task.support_y)
                adapted.adapt(loss, first_order=True)
        return found

    def _try(self, learner: MetaLearner, task: TaskBatch) -> None:
        """One step; in training mode its derivative, too."""
        if not learner.network.training:
            self._outputs(learner, task, steps=1)
            return
        adapted = self._wrapped(learner).clone()
        adapted.adapt(self.objective.support_loss(adapted(task.support_x), task.support_y))
        loss = self.objective.query_loss(adapted(task.query_x), task.query_y)
        torch.autograd.grad(loss, [p for p in learner.parameters() if p.requires_grad], allow_unused=True)

    def _wrapped(self, learner: MetaLearner) -> Any:
        return learner.algorithm.learn2learn(_learn2learn.load(), learner.network)
