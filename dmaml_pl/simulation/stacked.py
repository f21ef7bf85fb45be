"""The meta-weights of all workers, stacked, and their meta-gradients at once, as the vectorized engine computes one's.

What a task's network runs with is its worker's weights: W workers with T tasks each are W T tasks, whose meta-weights
have an axis, too.

Legend: W workers, T tasks of each, P values of the meta-weights that are learned.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmaml_pl.algorithms.base import OWN, Weights
from dmaml_pl.engines import loop
from dmaml_pl.errors import ConfigError, reason_of
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import Samples, TaskBatch

AS_LEAST, AS_MUCH = 1e-5, 1e-3
"""Up to which absolute and relative error two ways to compute the same meta-gradient or step in float32 agree."""


class _StackedTasks(loop.NetworkTasks):
    """Tasks of several workers: every meta-weight has the tasks' axis already, (W T, ...)."""

    def expand(self, w: Tensor) -> Tensor:
        """Its worker's weight is each task's own; a tensor of its own, by which alone can be differentiated."""
        return w.view_as(w)

    def run(self, meta: Weights, fast: Weights, x: Tensor, part: str | None = None) -> Any:
        """As of one worker."""
        return super().run({}, _of_network(meta) | fast, x, part)

    def _losses(
        self, loss: Callable[..., Tensor], meta: Weights, fast: Weights, samples: Samples
    ) -> tuple[Tensor, Any]:
        return super()._losses(loss, {}, _of_network(meta) | fast, samples)


def _of_network(meta: Weights) -> Weights:
    return {name: weight for name, weight in meta.items() if not name.startswith(OWN)}


class StackedWeights:
    """What W workers learn, in place of the one network's.

    Args:
        learner: network and algorithm; where all workers start.
        objective: losses and metric.
        workers: W.
        at_once: tasks that are in memory at a time, at most, but for at least one worker's; None: all.

    Attributes:
        weights: (W, ...) each, by the names of the meta-weights that are learned.
    """

    def __init__(self, learner: MetaLearner, objective: Objective, workers: int, at_once: int | None = None) -> None:
        self.workers = workers
        self._learner = learner
        self._objective = objective
        self._at_once = at_once
        meta = learner.meta()
        self.weights = {
            name: nn.Parameter(meta[name].detach().expand(workers, *meta[name].shape).clone())
            for name in loop.learned(meta)
        }

    def take_place(self, optimizer: torch.optim.Optimizer) -> None:
        """Have a new optimizer step these, in place of the learner's; they have the same learning rates and order."""
        names = {id(weight): name for name, weight in self._learner.meta().items()}
        for group in optimizer.param_groups:
            group["params"] = [self.weights[names[id(weight)]] for weight in group["params"]]

    def rows(self) -> Tensor:
        """Each worker's weights as one vector, (W, P)."""
        return torch.cat([weight.detach().flatten(1) for weight in self.weights.values()], dim=1)

    @torch.no_grad()
    def fill(self, row: Tensor) -> None:
        """Give all workers the same weights, (P,)."""
        weights = [*self.weights.values()]
        for weight, values in zip(weights, row.split([weight[0].numel() for weight in weights]), strict=True):
            weight.copy_(values.view(weight.shape[1:]))

    def meta_gradients(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Put each worker's meta-gradient into `.grad`; returns each one's mean loss and metric, (W,).

        Args:
            batch: W T tasks, the first worker's first.
        """
        tasks = batch.tasks // self.workers
        workers = self.workers if self._at_once is None else max(self._at_once // tasks, 1)
        found = [self._of_some(first, chunk, tasks) for first, chunk in _chunks(batch, workers, tasks)]
        losses, metrics, gradients = zip(*found, strict=True)
        for weight, parts in zip(self.weights.values(), zip(*gradients, strict=True), strict=True):
            weight.grad = None if parts[0] is None else torch.cat(parts)
        return torch.cat(losses), torch.cat(metrics)

    def _of_some(self, first: int, batch: TaskBatch, tasks: int) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Losses, metrics and meta-gradients of some workers, from the `first` on."""
        count = batch.tasks // tasks
        own = {name: w[first : first + count].detach().requires_grad_() for name, w in self.weights.items()}
        meta = {name: weight.expand(batch.tasks, *weight.shape) for name, weight in self._learner.meta().items()}
        meta |= {name: weight.repeat_interleave(tasks, 0) for name, weight in own.items()}
        network = self._learner.network
        each = loop.one_by_one if batch.tasks == 1 else loop.at_once
        stacked = _StackedTasks(network, dict(network.named_buffers()), self._objective, batch, each)
        outcome = loop.evaluate(self._learner, meta, stacked)
        total = outcome.differentiate.view(count, tasks).mean(1).sum()
        gradients = torch.autograd.grad(total, list(own.values()), allow_unused=True)
        losses, metrics = (of.detach().view(count, tasks).mean(1) for of in (outcome.loss, outcome.metric))
        return losses, metrics, gradients

    @torch.no_grad()
    def clip(self, longest: float) -> None:
        """Shorten each worker's meta-gradient that is longer, as `torch.nn.utils.clip_grad_norm_` does one's."""
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        shares = (longest / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(shares.view(-1, *[1] * (gradient.ndim - 1)))


def _chunks(batch: TaskBatch, workers: int, tasks: int) -> Iterator[tuple[int, TaskBatch]]:
    """The tasks of so many workers at a time, and the number of the first of them."""
    for number, chunk in enumerate(batch.chunks(workers * tasks)):
        yield number * workers, chunk


def check_gradients(
    learner: MetaLearner, objective: Objective, batch: TaskBatch, reference: Callable[..., Any]
) -> None:
    """Check that two workers at different weights have the meta-gradients at once that each has alone.

    Args:
        learner: network and algorithm.
        objective: losses and metric.
        batch: tasks.
        reference: an engine's `meta_gradient`.

    Raises:
        ConfigError: names the algorithm.
    """
    name = type(learner.algorithm).__name__
    refused = f"model.algorithm is {name}, which cannot be run for several workers at once"
    stacked = StackedWeights(learner, objective, 2)
    kept = stacked.rows()[0]
    parameters = [weight for weight in learner.meta().values() if weight.requires_grad]
    with torch.no_grad():
        for weight in stacked.weights.values():
            weight[1].mul_(0.9)
    rows = stacked.rows()
    agree = True
    try:
        stacked.meta_gradients(batch.map(lambda tensor: torch.cat([tensor, tensor])))
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise ConfigError(
            f"{refused} ({reason_of(error)}): take another, such as dmaml_pl.MAML, to simulate workers."
        ) from error
    for worker, row in enumerate(rows):
        _write(parameters, row)
        learner.zero_grad()
        reference(learner, batch)
        found = [None if weight.grad is None else weight.grad[worker] for weight in stacked.weights.values()]
        agree = agree and _agree(found, [weight.grad for weight in parameters])
    _write(parameters, kept)
    learner.zero_grad()
    if not agree:
        raise ConfigError(f"{refused} (its meta-gradients differ): take another, such as dmaml_pl.MAML, to simulate.")


def check_steps(make: Callable[[list[Any]], torch.optim.Optimizer], name: str) -> None:
    """Check that a meta-optimizer steps stacked weights as it steps each worker's alone.

    Args:
        make: the optimizer of parameters.
        name: of the optimizer.

    Raises:
        ConfigError: names it.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 3, 4, generator=generator)
    gradients = torch.randn(3, *start.shape, generator=generator) * torch.tensor([1.0, 10.0]).view(2, 1, 1)
    ends = []
    for values, steps in [(start, gradients), *((start[worker], gradients[:, worker]) for worker in range(2))]:
        parameter = nn.Parameter(values.clone())
        optimizer = make([{"params": [parameter]}])
        for gradient in steps:
            parameter.grad = gradient.clone()
            optimizer.step(lambda: 0.0)
        ends.append(parameter.detach())
    if not _agree([*ends[0]], ends[1:]):
        raise ConfigError(
            f"model.meta_optimizer is {name}, whose step of one weight depends on the others, so that not all workers "
            "can make theirs at once: take another, such as torch.optim.Adam, to simulate workers."
        )


@torch.no_grad()
def _write(weights: Sequence[Tensor], row: Tensor) -> None:
    for weight, values in zip(weights, row.split([weight.numel() for weight in weights]), strict=True):
        weight.copy_(values.view_as(weight))


def _agree(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    def alike(one: Tensor | None, other: Tensor | None) -> bool:
        if one is None or other is None:
            return one is other
        return bool((one - other).norm() <= AS_LEAST + AS_MUCH * other.norm())

    return all(alike(one, other) for one, other in zip(some, others, strict=True))
