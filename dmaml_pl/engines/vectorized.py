"""The fast engine for small networks: all tasks of a meta-batch at once.

Every task gets its own copy of the weights, stacked along a leading T axis, and `torch.func.vmap` runs the network on
all of them. As no task's loss depends on another task's weights, the gradient of the summed losses by the stacked
weights is each task's own gradient. So differentiation is ordinary autograd, outside of vmap: that is faster than
nesting `torch.func.grad`, and right where `torch.func.grad(vmap(...))` is not. PyTorch 2.15 leaves out a part of batch
norm's second derivative when its backward runs under vmap.

Legend: T tasks, S support samples, Q query samples, I adaptation steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from dmaml_pl.algorithms.base import Algorithm, Learner, Weights
from dmaml_pl.engines.base import AdaptationCurve, Backward, MetaOutcome
from dmaml_pl.engines.compiled import Compiler, hand_out
from dmaml_pl.engines.loop import Judge, adapt, cut, stacked, task_metrics
from dmaml_pl.errors import ConfigError
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import TaskBatch


class VectorizedEngine:
    """Adapts the tasks of a meta-batch at once; see `Engine` for what the methods promise.

    Frozen and unused weights are left as they are, as by learn2learn.

    Args:
        algorithm: the inner loop.
        objective: the loss and the metric.
        compiled: compile the meta-gradient (`Compiler`); what cannot be compiled is executed without.
        task_chunk: tasks that are in memory at a time; the meta-gradients of chunks are added up. All by default.

    Raises:
        ConfigError: the algorithm has no functional form (`Algorithm.update`).
    """

    def __init__(
        self, algorithm: Algorithm, objective: Objective, *, compiled: bool = False, task_chunk: int | None = None
    ) -> None:
        if not algorithm.is_functional:
            raise ConfigError(
                f"model.engine is vectorized, but {type(algorithm).__name__} has no functional step (update): set "
                "model.engine to learn2learn or auto."
            )
        self.algorithm = algorithm
        self.objective = objective
        self.task_chunk = task_chunk
        self._adapt = partial(adapt, algorithm)
        self._compiler = Compiler() if compiled else None
        self._checked: WeakKeyDictionary[nn.Module, set[bool]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, also in another process, has tried no network."""
        settings: dict[str, Any] = {"compiled": self._compiler is not None, "task_chunk": self.task_chunk}
        return partial(type(self), **settings), (self.algorithm, self.objective)

    def name(self, learner: Learner) -> str:
        """Itself, and whether it compiles."""
        return "vectorized" if self._compiler is None else "compiled vectorized"

    def check(self, learner: Learner, batch: TaskBatch) -> None:
        """Try the network on one task, once in training and once in evaluation mode.

        Raises:
            ConfigError: vmap cannot run the network, or it writes its buffers, which no task has of its own.
        """
        refusal = self.refusal(learner, batch)
        if refusal is not None:
            raise ConfigError(f"model.engine is vectorized, but {refusal}: set model.engine to learn2learn or auto.")

    def refusal(self, learner: Learner, batch: TaskBatch) -> str | None:
        """Why the network cannot be run on all tasks at once; None if it can."""
        network = learner.module
        modes = self._checked.setdefault(network, set())
        if network.training not in modes:
            reason = _trial(network, batch, self.objective, self._adapt)
            if reason is not None:
                return f"{type(network).__name__} cannot be run on all tasks at once ({reason})"
            modes.add(network.training)
        return None

    def meta_gradient(self, learner: Learner, batch: TaskBatch, backward: Backward = Tensor.backward) -> MetaOutcome:
        """Add the meta-gradient of all tasks to the parameters' `.grad`, in one backward a chunk."""
        self.check(learner, batch)
        if self.task_chunk is None or batch.tasks <= self.task_chunk:
            return self._meta_gradient(learner, batch, backward)
        losses, metrics = [], []
        for chunk in batch.chunks(self.task_chunk):
            share = chunk.tasks / batch.tasks
            outcome = self._meta_gradient(learner, chunk, lambda loss, share=share: backward(loss * share))  # type: ignore[misc]
            losses.append(outcome.loss * share)
            metrics.append(outcome.metric * share)
        return MetaOutcome(torch.stack(losses).sum(), torch.stack(metrics).sum())

    def _meta_gradient(self, learner: Learner, batch: TaskBatch, backward: Backward) -> MetaOutcome:
        network = learner.module
        outcome = partial(self._outcome, network)
        if self._compiler is not None:
            found = self._compiler.meta_gradient(network, batch, outcome)
            if found is not None:
                hand_out(found, backward)
                return MetaOutcome(found.loss, found.metric)
        loss, metric = outcome(dict(network.named_parameters()), dict(network.named_buffers()), batch)
        backward(loss)
        return MetaOutcome(loss.detach(), metric)

    def _outcome(
        self, network: nn.Module, parameters: Weights, buffers: Weights, batch: TaskBatch
    ) -> tuple[Tensor, Tensor]:
        """Mean query loss after adaptation, differentiable, and mean metric."""
        judge, weights = _judge(network, self.objective, buffers), stacked(parameters, batch.tasks)
        for _ in range(self.algorithm.steps):
            weights = self._adapt(
                judge, weights, batch.support_x, batch.support_y, first_order=self.algorithm.first_order
            )
        losses, predictions = judge(weights, batch.query_x, batch.query_y)
        return losses.mean(), task_metrics(self.objective, losses, predictions, batch.query_y).mean()

    def threads(self, learner: Learner, batch: TaskBatch) -> int | None:
        """One for a small compiled graph."""
        if self._compiler is None:
            return None
        self.check(learner, batch)
        network = learner.module
        chunk = next(iter(batch.chunks(self.task_chunk)))
        return 1 if self._compiler.is_small(network, chunk, partial(self._outcome, network)) else None

    def adaptation_curve(self, learner: Learner, batch: TaskBatch, steps: int) -> AdaptationCurve:
        """Judge every task before adaptation and after each step of it; leaves no gradients behind."""
        losses, metrics = [], []
        for chunk in batch.chunks(self.task_chunk):
            judged = self._walk(learner, chunk, steps)
            losses.append(torch.stack([losses for losses, _ in judged], dim=1))
            metrics.append(torch.stack([task_metrics(self.objective, *seen, chunk.query_y) for seen in judged], dim=1))
        return AdaptationCurve(torch.cat(losses), torch.cat(metrics).to(losses[0].dtype))

    def predict(self, learner: Learner, batch: TaskBatch, steps: int) -> Tensor:
        """Query predictions before adaptation and after each step of it, (T, I + 1, Q, ...)."""
        walks = (self._walk(learner, chunk, steps) for chunk in batch.chunks(self.task_chunk))
        return torch.cat([torch.stack([predictions for _, predictions in walk], dim=1) for walk in walks])

    def _walk(self, learner: Learner, batch: TaskBatch, steps: int) -> list[tuple[Tensor, Tensor]]:
        """Query losses (T,) and predictions (T, Q, ...) after 0 .. `steps` steps; nothing is meta-learned."""
        self.check(learner, batch)
        network = learner.module
        judge = _judge(network, self.objective, dict(network.named_buffers()))
        weights = stacked(dict(network.named_parameters()), batch.tasks)
        judged = []
        for step in range(steps + 1):
            with torch.no_grad():
                judged.append(judge(weights, batch.query_x, batch.query_y))
            if step < steps:
                weights = cut(self._adapt(judge, weights, batch.support_x, batch.support_y, first_order=True))
        return judged


def _judge(network: nn.Module, objective: Objective, buffers: Weights) -> Judge:
    def of_one_task(weights: Weights, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        prediction = functional_call(network, weights | buffers, (x,))
        return objective.loss(prediction, y), prediction

    judge: Judge = vmap(of_one_task, randomness="different")
    return judge


def _trial(network: nn.Module, batch: TaskBatch, objective: Objective, adapt: Callable[..., Weights]) -> str | None:
    """Why a network cannot be run on all tasks at once; None if it can. Leaves random generators as they were."""
    devices = {p.device for p in network.parameters() if p.device.type != "cpu"}
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(list(devices)):
        batch = batch.map(lambda tensor: tensor[:1].clone())
        before = {name: buffer.clone() for name, buffer in network.named_buffers()}
        after = {name: buffer.clone() for name, buffer in before.items()}
        functional_call(network, after, (batch.support_x[0],))
        for name, buffer in before.items():
            if not torch.equal(after[name], buffer):
                return f"it writes its buffer {name}"
        try:
            judge, weights = _judge(network, objective, before), stacked(dict(network.named_parameters()), 1)
            judge(
                adapt(judge, weights, batch.support_x, batch.support_y, first_order=False), batch.query_x, batch.query_y
            )
        except (RuntimeError, ValueError, TypeError) as error:
            return str(error).splitlines()[0].split(". ")[0].rstrip(".")
    return None
