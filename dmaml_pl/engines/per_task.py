"""The fast engine for convolutions on CPUs: tasks one by one, as functions, as many at a time as there are threads.

On CPUs a convolution with other weights for every task gains nothing from being done at once. What gains:

- Tasks are spread over threads, each of which computes with one thread: PyTorch releases Python's lock, and nothing
  waits at the end of every small operation until all threads have finished their share of it. What a thread adds up is
  added in the order of the tasks, so that the bits do not depend on which thread was faster.
- Images go through the network with their channels last in memory, where PyTorch's batch norm and max-pooling are
  several times faster.
- Second derivatives of batch norm take fewer operations (`layers.py`); with PyTorch's own, channels last would be
  slower for the support set.

Legend: T tasks, Q query samples, I adaptation steps.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from dmaml_pl.algorithms.base import Algorithm, Learner, Weights
from dmaml_pl.engines.base import AdaptationCurve, Backward, MetaOutcome
from dmaml_pl.engines.compiled import MetaGradient, hand_out
from dmaml_pl.engines.layers import use_faster_layers
from dmaml_pl.engines.loop import Judge, adapt, cut, stacked, task_metrics
from dmaml_pl.errors import ConfigError
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import TaskBatch

Found = TypeVar("Found")


class _Traits(NamedTuple):
    """What was found out of a network by trying it.

    Attributes:
        refusal: why it cannot be run as a function; None if it can.
        copies: it can be copied, and its copies run on a CPU in its place.
        threads: also in several threads, with the same bits at every time.
        channels_last: it takes images whose channels are last in memory.
        widest: elements of the largest output of a convolution, for one sample.
    """

    refusal: str | None
    copies: bool = False
    threads: bool = False
    channels_last: bool = False
    widest: int = 0


class _Judged(NamedTuple):
    """What became of one task: query loss and metric, (1,), and the gradients of that loss by the meta-weights."""

    loss: Tensor
    metric: Tensor
    gradients: Weights


class PerTaskEngine:
    """Adapts the tasks of a meta-batch one by one, on all threads; see `Engine` for what the methods promise.

    Frozen and unused weights are left as they are. Networks that draw randomly (dropout) are run in one thread, in
    which the draws follow from the seed.

    Args:
        algorithm: the inner loop.
        objective: the loss and the metric.
        task_chunk: tasks that are in memory at a time, at most; by default as many as PyTorch has threads.

    Raises:
        ConfigError: the algorithm has no functional form (`Algorithm.update`).
    """

    def __init__(self, algorithm: Algorithm, objective: Objective, *, task_chunk: int | None = None) -> None:
        if not algorithm.is_functional:
            raise ConfigError(
                f"model.engine is per_task, but {type(algorithm).__name__} has no functional step (update): set "
                "model.engine to learn2learn or auto."
            )
        self.algorithm = algorithm
        self.objective = objective
        self.task_chunk = task_chunk
        self._traits: WeakKeyDictionary[nn.Module, dict[bool, _Traits]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, also in another process, has tried no network."""
        return partial(type(self), task_chunk=self.task_chunk), (self.algorithm, self.objective)

    def name(self, learner: Learner) -> str:
        """Always itself."""
        return "per_task"

    def check(self, learner: Learner, batch: TaskBatch) -> None:
        """Try the network on one task, once in training and once in evaluation mode.

        Raises:
            ConfigError: the network writes its buffers, which no task has of its own.
        """
        refusal = self.refusal(learner, batch)
        if refusal is not None:
            raise ConfigError(f"model.engine is per_task, but {refusal}: set model.engine to learn2learn or auto.")

    def refusal(self, learner: Learner, batch: TaskBatch) -> str | None:
        """Why the network cannot be run as a function; None if it can."""
        return self._traits_of(learner.module, batch).refusal

    def widest(self, learner: Learner, batch: TaskBatch) -> int:
        """Elements of the largest output of a convolution for the query set of one task."""
        return self._traits_of(learner.module, batch).widest * batch.query_x.shape[1]

    def meta_gradient(self, learner: Learner, batch: TaskBatch, backward: Backward = Tensor.backward) -> MetaOutcome:
        """Add the meta-gradient of all tasks to the parameters' `.grad`, in one backward."""
        self.check(learner, batch)
        losses, metrics, total = [], [], dict[str, Tensor]()
        for judged in self._each(learner, batch, self._differentiate):
            losses.append(judged.loss)
            metrics.append(judged.metric)
            for name, gradient in judged.gradients.items():
                # Not in place: weights that are only ever used as a sum have one gradient, in one piece of memory.
                total[name] = total[name] + gradient if name in total else gradient
        loss, metric = torch.cat(losses).mean(), torch.cat(metrics).mean()
        parameters = dict(learner.module.named_parameters())
        # In the order in memory that the parameters have, which optimizers expect.
        gradients = [(gradient / batch.tasks).contiguous() for gradient in total.values()]
        hand_out(MetaGradient(loss, metric, [parameters[name] for name in total], gradients, apart=True), backward)
        return MetaOutcome(loss, metric)

    def threads(self, learner: Learner, batch: TaskBatch) -> None:
        """All."""

    def adaptation_curve(self, learner: Learner, batch: TaskBatch, steps: int) -> AdaptationCurve:
        """Judge every task before adaptation and after each step of it; leaves no gradients behind."""
        self.check(learner, batch)

        def curve(judge: Judge, weights: Weights, task: TaskBatch) -> tuple[Tensor, Tensor]:
            judged = self._walk(judge, weights, task, steps)
            metrics = [task_metrics(self.objective, *seen, task.query_y) for seen in judged]
            return torch.stack([loss for loss, _ in judged], dim=1), torch.stack(metrics, dim=1)

        losses, metrics = zip(*self._each(learner, batch, curve), strict=True)
        return AdaptationCurve(torch.cat(losses), torch.cat(metrics).to(losses[0].dtype))

    def predict(self, learner: Learner, batch: TaskBatch, steps: int) -> Tensor:
        """Query predictions before adaptation and after each step of it, (T, I + 1, Q, ...)."""
        self.check(learner, batch)

        def predictions(judge: Judge, weights: Weights, task: TaskBatch) -> Tensor:
            return torch.stack([found for _, found in self._walk(judge, weights, task, steps)], dim=1)

        return torch.cat(list(self._each(learner, batch, predictions)))

    def _differentiate(self, judge: Judge, meta: Weights, task: TaskBatch) -> _Judged:
        """One task's part of the meta-gradient."""
        weights = meta
        for _ in range(self.algorithm.steps):
            weights = adapt(
                self.algorithm, judge, weights, task.support_x, task.support_y, first_order=self.algorithm.first_order
            )
        loss, prediction = judge(weights, task.query_x, task.query_y)
        metric = task_metrics(self.objective, loss, prediction, task.query_y)
        names = [name for name, w in meta.items() if w.requires_grad]
        found = torch.autograd.grad(loss.sum(), [meta[name] for name in names], allow_unused=True)
        gradients = {name: g.squeeze(0) for name, g in zip(names, found, strict=True) if g is not None}
        return _Judged(loss.detach(), metric, gradients)

    def _walk(self, judge: Judge, weights: Weights, task: TaskBatch, steps: int) -> list[tuple[Tensor, Tensor]]:
        """Query loss (1,) and predictions (1, Q, ...) after 0 .. `steps` steps; nothing is meta-learned."""
        judged = []
        for step in range(steps + 1):
            with torch.no_grad():
                judged.append(judge(weights, task.query_x, task.query_y))
            if step < steps:
                adapted = adapt(self.algorithm, judge, weights, task.support_x, task.support_y, first_order=True)
                weights = cut(adapted)
        return judged

    def _each(
        self, learner: Learner, batch: TaskBatch, work: Callable[[Judge, Weights, TaskBatch], Found]
    ) -> Iterator[Found]:
        """What `work` gives of each task, in the order of the tasks."""
        network = learner.module
        traits = self._traits_of(network, batch)
        parameters: Weights = dict(network.named_parameters())
        if traits.channels_last:
            parameters = {name: _like_channels_last(p) for name, p in parameters.items()}
        buffers: Weights = dict(network.named_buffers())
        threads, at_once = torch.get_num_threads(), min(batch.tasks, self.task_chunk or batch.tasks)
        workers = min(threads, at_once) if traits.threads else 1
        settings = _settings_of_thread()

        def one(number: int, network: nn.Module) -> Found:
            task = batch.map(lambda tensor: tensor[number : number + 1])
            if traits.channels_last:
                task = task._replace(support_x=_channels_last(task.support_x), query_x=_channels_last(task.query_x))
            return work(_judge_of_one(network, self.objective, buffers), cut(stacked(parameters, 1)), task)

        # A network is run as a function by putting the weights in its place, which two threads cannot do in one.
        copies = [_structure_of(network) for _ in range(workers)] if traits.copies else [network]
        if workers == 1:
            for number in range(batch.tasks):
                yield one(number, copies[0])
            return
        each = max(1, threads // workers)

        def one_in_a_thread(number: int) -> Found:
            own = copies.pop()
            try:
                with settings():
                    return one(number, own)
            finally:
                copies.append(own)

        torch.set_num_threads(each)
        try:
            with ThreadPoolExecutor(workers, "task", initializer=torch.set_num_threads, initargs=(each,)) as pool:
                futures = deque(pool.submit(one_in_a_thread, number) for number in range(batch.tasks))
                try:
                    while futures:
                        yield futures.popleft().result()
                finally:
                    pool.shutdown(cancel_futures=True)
        finally:
            torch.set_num_threads(threads)

    def _traits_of(self, network: nn.Module, batch: TaskBatch) -> _Traits:
        modes = self._traits.setdefault(network, {})
        if network.training not in modes:
            modes[network.training] = _try(network, batch, self.objective)
        return modes[network.training]


def _judge_of_one(network: nn.Module, objective: Objective, buffers: Weights) -> Judge:
    def judge(weights: Weights, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        own = {name: w.squeeze(0) for name, w in weights.items()}
        prediction = functional_call(network, own | buffers, (x.squeeze(0),))
        return objective.loss(prediction, y.squeeze(0)).unsqueeze(0), prediction.unsqueeze(0)

    return judge


def _channels_last(x: Tensor) -> Tensor:
    """Samples (1, B, C, H, W) whose channels are last in memory, also where strides do not tell as there is but one."""
    _, _, channels, height, width = x.shape
    x = x.squeeze(0).contiguous(memory_format=torch.channels_last)
    strides = (channels * height * width, 1, width * channels, channels)
    return x.as_strided(x.shape, strides).unsqueeze(0)


def _like_channels_last(p: Tensor) -> Tensor:
    """A weight in the order in memory that convolutions would bring it to each time."""
    if p.ndim != 4:
        return p
    return p.detach().contiguous(memory_format=torch.channels_last).requires_grad_(p.requires_grad)


def _structure_of(network: nn.Module) -> nn.Module:
    """A copy of the modules, which holds the same tensors, and whose layers are faster."""
    tensors = [*network.parameters(), *network.buffers()]
    copied = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    use_faster_layers(copied)
    return copied


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


def _try(network: nn.Module, batch: TaskBatch, objective: Objective) -> _Traits:
    """Run the network on one task. Leaves random generators as they were."""
    parameters: Weights = dict(network.named_parameters())
    buffers: Weights = dict(network.named_buffers())
    devices = {p.device for p in parameters.values()}
    on_cpu = all(device.type == "cpu" for device in devices)
    accelerators = [device for device in devices if device.type != "cpu"]
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(accelerators):
        task = batch.map(lambda tensor: tensor[:1].clone())
        after = {name: buffer.clone() for name, buffer in buffers.items()}
        drawn = torch.get_rng_state()
        functional_call(network, after, (task.support_x[0],))
        for name, buffer in buffers.items():
            if not torch.equal(after[name], buffer):
                return _Traits(f"{type(network).__name__} writes its buffer {name}, which tasks would share")
        if not on_cpu:
            return _Traits(None)
        draws = not torch.equal(torch.get_rng_state(), drawn)
        try:
            copied = _structure_of(network)
        except Exception:  # whatever the network holds: it is run itself, in this thread
            return _Traits(None)
        widths = [0]
        for layer in copied.modules():
            if isinstance(layer, _ConvNd):
                layer.register_forward_hook(lambda layer, given, out: widths.append(out[0].numel()))
        judge, weights = _judge_of_one(copied, objective, buffers), cut(stacked(parameters, 1))
        judge(weights, task.support_x, task.support_y)
        channels_last = task.support_x.ndim == 5
        if channels_last:
            try:
                loss, _ = judge(weights, _channels_last(task.support_x), task.support_y)
                loss.sum().backward()
            except RuntimeError:  # such as `view` of what is not in one piece
                channels_last = False
        return _Traits(None, copies=True, threads=not draws, channels_last=channels_last, widest=max(widths))
