"""The fast engine for convolutions on CPUs: tasks one by one, as functions, as many at a time as there are threads.

On CPUs a convolution with other weights for every task gains nothing from being done at once. What gains:

- Tasks are spread over threads, each of which computes with one thread: PyTorch releases Python's lock, and nothing
  waits at the end of every small operation until all threads have finished their share of it. What a thread adds up is
  added in the order of the tasks, so that the bits do not depend on which thread was faster.
- Images go through the network with their channels last in memory, where PyTorch's batch norm and max-pooling are
  several times faster.
- Second derivatives of batch norm take fewer operations (`layers/`); with PyTorch's own, channels last would be
  slower for the support set.

Legend: T tasks, Q query samples, I adaptation steps.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dmaml_pl.algorithms.base import Weights
from dmaml_pl.engines import loop, trial
from dmaml_pl.engines.base import Backward, MetaOutcome, Of, Tried
from dmaml_pl.engines.compiled import MetaGradient, hand_out
from dmaml_pl.engines.functional import FunctionalEngine
from dmaml_pl.engines.layers import use_faster_layers
from dmaml_pl.engines.loop import Found, one_by_one
from dmaml_pl.engines.work import threads_for
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import Samples, TaskBatch


class _Traits(NamedTuple):
    """What was found out of a network by trying it.

    Attributes:
        refusal: why it cannot be run as a function; None if it can.
        copies: it can be copied, and its copies run on a CPU in its place.
        faster: copies have faster layers.
        threads: they run in several threads, too, with the same bits at every time.
        channels_last: it takes images whose channels are last in memory.
    """

    refusal: str | None
    copies: bool = False
    faster: bool = False
    threads: bool = False
    channels_last: bool = False


class PerTaskEngine(FunctionalEngine):
    """Adapts the tasks of a meta-batch one by one, on all threads.

    Networks that draw randomly (dropout) are run in one thread, in which the draws follow from the seed.

    Args:
        objective: the losses and the metric.
        task_chunk: tasks that are in memory at a time, at most; by default as many as PyTorch has threads.
    """

    name = "per_task"

    def __init__(self, objective: Objective, *, task_chunk: int | None = None) -> None:
        super().__init__(objective)
        self.task_chunk = task_chunk
        self._traits: Tried[dict[bool, _Traits]] = Tried()

    def refusal(self, learner: MetaLearner, batch: TaskBatch) -> str | None:
        """Why the network cannot be run so: tried once in training and once in evaluation mode."""
        return self._traits_of(learner, batch).refusal

    def meta_gradient(
        self, learner: MetaLearner, batch: TaskBatch, backward: Backward = Tensor.backward, of: Of = "loss"
    ) -> MetaOutcome:
        """Add the meta-gradient of all tasks to the parameters' `.grad`."""
        losses, metrics, total = [], [], dict[str, Tensor]()
        for task_loss, task_metric, found in self.each(learner, batch, partial(_differentiate, of=of)):
            losses.append(task_loss)
            metrics.append(task_metric)
            for name, gradient in found.items():
                # Into memory of its own: weights that are only ever used as a sum have one gradient, in one piece.
                total[name] = total[name].add_(gradient) if name in total else gradient.clone()
        loss, metric = torch.cat(losses).mean(), torch.cat(metrics).mean()
        meta = learner.meta()
        # In the order in memory that the parameters have, which optimizers expect.
        gradients = [(gradient / batch.tasks).contiguous() for gradient in total.values()]
        hand_out(MetaGradient(loss, metric, [meta[name] for name in total], gradients, apart=True), backward)
        return MetaOutcome(loss, metric)

    def threads(self, learner: MetaLearner, batch: TaskBatch) -> int | None:
        """One, where threads would wait for Python's lock longer than they compute."""
        return threads_for(learner, self.objective, batch)

    def with_weights(self, learner: MetaLearner, meta: Weights, fast: Weights) -> Callable[[Tensor], Any]:
        """The networks with each task's own weights, run one after another."""
        buffers = dict(learner.network.named_buffers())

        def outputs(x: Tensor) -> Any:
            found = []
            for number, task in enumerate(TaskBatch((), Samples(x, x)).chunks(1)):
                own = {name: weight[number : number + 1] for name, weight in fast.items()}
                tasks = loop.NetworkTasks(learner.network, buffers, self.objective, task, one_by_one)
                with torch.no_grad():
                    found.append(tasks.run(meta, own, task.query.x))
            return tree_map(lambda *parts: torch.cat(parts), *found)

        return outputs

    def each(self, learner: MetaLearner, batch: TaskBatch, work: loop.Work[Found]) -> Iterator[Found]:
        """A task at a time, in as many threads as there are."""
        network = learner.network
        traits = self._traits_of(learner, batch)
        meta: Weights = learner.meta()
        if traits.channels_last:
            meta = {name: _like_channels_last(p) for name, p in meta.items()}
            batch = batch.map_inputs(_channels_last)
        buffers: Weights = dict(network.named_buffers())
        threads, at_once = torch.get_num_threads(), min(batch.tasks, self.task_chunk or batch.tasks)
        workers = min(threads, at_once) if traits.threads else 1
        settings = _settings_of_thread()

        def one(task: TaskBatch, network: nn.Module) -> Found:
            own = {name: weight.detach().requires_grad_(weight.requires_grad) for name, weight in meta.items()}
            return work(learner, own, loop.NetworkTasks(network, buffers, self.objective, task, one_by_one))

        # A network is run as a function by putting the weights in its place, which two threads cannot do in one.
        copied = traits.copies and (workers > 1 or traits.faster)
        copies = [_structure_of(network)[0] for _ in range(workers)] if copied else [network]
        if workers == 1:
            for task in batch.chunks(1):
                yield one(task, copies[0])
            return
        each = max(1, threads // workers)

        def one_in_a_thread(task: TaskBatch) -> Found:
            own = copies.pop()
            try:
                with settings():
                    return one(task, own)
            finally:
                copies.append(own)

        torch.set_num_threads(each)
        try:
            with ThreadPoolExecutor(workers, "task", initializer=torch.set_num_threads, initargs=(each,)) as pool:
                futures = deque(pool.submit(one_in_a_thread, task) for task in batch.chunks(1))
                try:
                    while futures:
                        yield futures.popleft().result()
                finally:
                    pool.shutdown(cancel_futures=True)
        finally:
            torch.set_num_threads(threads)

    def _traits_of(self, learner: MetaLearner, batch: TaskBatch) -> _Traits:
        modes = self._traits.setdefault(learner, {})
        if learner.network.training not in modes:
            modes[learner.network.training] = self._try(learner, batch)
        return modes[learner.network.training]

    def _try(self, learner: MetaLearner, batch: TaskBatch) -> _Traits:
        """Run the network on one task."""
        network = learner.network
        with trial.trial(network, batch) as task:
            written = trial.written_buffer(network, task)
            if written is not None:
                return _Traits(f"{type(network).__name__} writes its buffer {written}, which tasks would share")
            reason = trial.failure(learner, self.objective, task, one_by_one)
            if reason is not None:
                return _Traits(f"{type(network).__name__} cannot be adapted ({reason})")
            strange = trial.strangeness(network, self.objective, task, one_by_one)
            if strange is not None:
                return _Traits(strange)
            if any(p.device.type != "cpu" for p in network.parameters()):
                return _Traits(None)
            draws = trial.draws_at_random(network, task)
            try:
                copied, faster = _structure_of(network)
            except Exception:  # whatever the network holds: it is run itself, in this thread
                return _Traits(None)
            channels_last = self._takes_channels_last(learner, copied, task)
            return _Traits(None, copies=True, faster=faster, threads=not draws, channels_last=channels_last)

    def _takes_channels_last(self, learner: MetaLearner, copied: nn.Module, task: TaskBatch) -> bool:
        """Whether a copy of the network takes images in another order in memory."""
        meta, buffers = learner.meta(), dict(learner.network.named_buffers())
        fast = {name: weight.detach().unsqueeze(0) for name, weight in learner.network.named_parameters()}
        task = trial.of_one_class(task)
        if task.support_x.ndim != 5:
            return False
        at = {name: weight.detach().requires_grad_(meta[name].requires_grad) for name, weight in fast.items()}
        turned = task.map_inputs(_channels_last)
        try:
            loss = loop.NetworkTasks(copied, buffers, self.objective, turned, one_by_one).support_loss(meta, at, 0)
            loss.sum().backward()
        except RuntimeError:  # such as `view` of what is not in one piece
            return False
        return True


def adapted_weights(learner: MetaLearner, objective: Objective, x: Tensor, y: Tensor, steps: int) -> Weights:
    """The weights that a network runs with after adaptation to one support set; nothing is meta-learned.

    Args:
        learner: network and algorithm.
        objective: the losses.
        x: support samples (S, ...).
        y: their targets (S, ...).
        steps: steps of the inner loop.
    """
    x, y = x.unsqueeze(0), y.unsqueeze(0)
    return weights_adapted_to(learner, objective, TaskBatch.of(x, y, x, y), steps)


def weights_adapted_to(learner: MetaLearner, objective: Objective, batch: TaskBatch, steps: int) -> Weights:
    """As `adapted_weights`, to one task with a T axis, which may have a support set for each step."""
    buffers = dict(learner.network.named_buffers())
    tasks = loop.NetworkTasks(learner.network, buffers, objective, batch, one_by_one)
    weights = loop.steps_of(learner, learner.meta(), tasks, steps)[-1]
    return {name: weight.detach().squeeze(0) for name, weight in weights.items()}


def _differentiate(
    learner: MetaLearner, meta: Weights, tasks: loop.NetworkTasks, of: Of
) -> tuple[Tensor, Tensor, Weights]:
    """One task's query loss and metric, (1,), and its part of the meta-gradient."""
    outcome = loop.evaluate(learner, meta, tasks, of)
    names = loop.learned(meta)
    found = torch.autograd.grad(outcome.differentiate.sum(), [meta[name] for name in names], allow_unused=True)
    gradients = {name: g for name, g in zip(names, found, strict=True) if g is not None}
    return outcome.loss.detach(), outcome.metric, gradients


def _channels_last(x: Tensor) -> Tensor:
    """Samples (T, B, C, H, W) whose channels are last in memory, also where strides do not tell as there is but one."""
    tasks, samples, channels, height, width = x.shape
    x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    image = channels * height * width
    return x.as_strided((tasks, samples, *x.shape[1:]), (samples * image, image, 1, width * channels, channels))


def _like_channels_last(p: Tensor) -> Tensor:
    """A weight in the order in memory that convolutions would bring it to each time."""
    if p.ndim != 4:
        return p
    return p.detach().contiguous(memory_format=torch.channels_last).requires_grad_(p.requires_grad)


def _structure_of(network: nn.Module) -> tuple[nn.Module, bool]:
    """A copy of the modules, which holds the same tensors, with faster layers; whether there are any of these."""
    tensors = [*network.parameters(), *network.buffers()]
    copied = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    return copied, use_faster_layers(copied)


def _settings_of_thread() -> Callable[[], AbstractContextManager[None]]:
    """What PyTorch keeps for each thread, as it is in this one: to be entered in another."""
    gradients, precision = torch.is_grad_enabled(), torch.get_autocast_dtype("cpu")
    lower, cache = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()

    @contextmanager
    def settings() -> Iterator[None]:
        autocast = torch.autocast("cpu", precision, enabled=lower, cache_enabled=cache)
        with torch.set_grad_enabled(gradients), autocast:
            yield

    return settings
