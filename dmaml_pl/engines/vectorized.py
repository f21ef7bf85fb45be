"""The fast engine for small networks: all tasks of a meta-batch at once.

Every task gets its own copy of the weights, stacked along a leading T axis, and `torch.func.vmap` runs the network on
all of them. As no task's loss depends on another task's weights, the gradient of the summed losses by the stacked
weights is each task's own gradient. So differentiation is ordinary autograd, outside of vmap: that is faster than
nesting `torch.func.grad`, and right where `torch.func.grad(vmap(...))` is not. PyTorch 2.15 leaves out a part of batch
norm's second derivative when its backward runs under vmap.

Legend: T tasks, Q query samples, I adaptation steps.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dmaml_pl.algorithms.base import Weights
from dmaml_pl.engines import loop, trial
from dmaml_pl.engines.acting import Acting
from dmaml_pl.engines.base import Backward, MetaOutcome, Of, Tried
from dmaml_pl.engines.compiled import Compiler, hand_out
from dmaml_pl.engines.functional import FunctionalEngine
from dmaml_pl.engines.work import threads_for
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import TaskBatch


class VectorizedEngine(FunctionalEngine):
    """Adapts the tasks of a meta-batch at once.

    Args:
        objective: the losses and the metric.
        compiled: compile the meta-gradient (`Compiler`); what cannot be compiled is executed without.
        task_chunk: tasks that are in memory at a time; the meta-gradients of chunks are added up. All by default.
    """

    def __init__(self, objective: Objective, *, compiled: bool = False, task_chunk: int | None = None) -> None:
        super().__init__(objective)
        self.name = "compiled vectorized" if compiled else "vectorized"
        self.task_chunk = task_chunk
        self._compiler = Compiler() if compiled else None
        self._refusals: Tried[dict[bool, str | None]] = Tried()
        self._acting = Acting(objective)

    def refusal(self, learner: MetaLearner, batch: TaskBatch) -> str | None:
        """Why the network cannot be run so: tried once in training and once in evaluation mode."""
        modes = self._refusals.setdefault(learner, {})
        if learner.network.training not in modes:
            modes[learner.network.training] = self._try(learner, batch)
        return modes[learner.network.training]

    def meta_gradient(
        self, learner: MetaLearner, batch: TaskBatch, backward: Backward = Tensor.backward, of: Of = "loss"
    ) -> MetaOutcome:
        """Add the meta-gradient of all tasks to the parameters' `.grad`."""
        if self.task_chunk is None or batch.tasks <= self.task_chunk:
            return self._of_chunk(learner, batch, backward, of)
        losses, metrics = [], []
        for chunk in batch.chunks(self.task_chunk):
            share = chunk.tasks / batch.tasks
            outcome = self._of_chunk(learner, chunk, lambda loss, share=share: backward(loss * share), of)  # type: ignore[misc]
            losses.append(outcome.loss * share)
            metrics.append(outcome.metric * share)
        return MetaOutcome(torch.stack(losses).sum(), torch.stack(metrics).sum())

    def _of_chunk(self, learner: MetaLearner, batch: TaskBatch, backward: Backward, of: Of) -> MetaOutcome:
        if self._compiler is not None and of == "loss":
            found = self._compiler.meta_gradient(learner, batch, self._evaluate)
            if found is not None:
                hand_out(found, backward)
                return MetaOutcome(found.loss, found.metric)
        tasks = self._tasks(learner, dict(learner.network.named_buffers()), batch)
        outcome = loop.evaluate(learner, learner.meta(), tasks, of)
        backward(outcome.differentiate.mean())
        return MetaOutcome(outcome.loss.mean().detach(), outcome.metric.mean())

    def _evaluate(self, learner: MetaLearner, meta: Weights, buffers: Weights, batch: TaskBatch) -> loop.Evaluated:
        """What a compiled meta-gradient is traced from: products of all tasks at once, also of one (`products.py`)."""
        tasks = loop.NetworkTasks(learner.network, buffers, self.objective, batch, loop.at_once)
        return loop.evaluate(learner, meta, tasks)

    def _tasks(self, learner: MetaLearner, buffers: Weights, batch: TaskBatch) -> loop.NetworkTasks:
        each = loop.one_by_one if batch.tasks == 1 else loop.at_once  # vmap takes longer than what it saves
        return loop.NetworkTasks(learner.network, buffers, self.objective, batch, each)

    def threads(self, learner: MetaLearner, batch: TaskBatch) -> int | None:
        """One for small networks, and as the graph wants it where one is compiled."""
        chunk = next(iter(batch.chunks(self.task_chunk)))
        if self._compiler is not None and self._compiler.is_small(learner, chunk, self._evaluate):
            return 1
        return threads_for(learner, self.objective, batch, at_once=chunk.tasks)

    def each(self, learner: MetaLearner, batch: TaskBatch, work: loop.Work[loop.Found]) -> Iterator[loop.Found]:
        """A chunk of tasks at a time."""
        buffers = dict(learner.network.named_buffers())
        for chunk in batch.chunks(self.task_chunk):
            yield work(learner, learner.meta(), self._tasks(learner, buffers, chunk))

    def with_weights(self, learner: MetaLearner, meta: Weights, fast: Weights) -> Callable[[Tensor], Any]:
        """The networks with each task's own weights, as a graph in which what no input changes is computed once."""
        return self._acting.with_weights(learner, meta, fast)

    def _try(self, learner: MetaLearner, batch: TaskBatch) -> str | None:
        network = learner.network
        kind = type(network).__name__
        padded = [
            name
            for name, layer in network.named_modules()
            if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.padding_idx is not None
        ]
        if padded:
            # PyTorch's batching rule of embeddings drops it: the padding would learn.
            return f"{kind} cannot be run on all tasks at once (its embedding {padded[0]} has a padding_idx)"
        with trial.trial(network, batch, tasks=2) as task:
            written = trial.written_buffer(network, task)
            if written is not None:
                return f"{kind} cannot be run on all tasks at once (it writes its buffer {written})"
            reason = trial.failure(learner, self.objective, task, loop.at_once)
            if reason is not None:
                return f"{kind} cannot be run on all tasks at once ({reason})"
            return trial.strangeness(network, self.objective, task, loop.at_once)
