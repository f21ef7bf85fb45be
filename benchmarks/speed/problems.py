"""The meta-gradients that are measured: networks and tasks, the same for every peer.

Legend: T tasks, S support samples and Q query samples of a task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from data_modules import Sinusoid
from dmaml_pl.algorithms import MAML
from dmaml_pl.networks import MLP, Conv4
from dmaml_pl.objectives import Objective, ObjectiveName, objective_of
from dmaml_pl.tasks import TaskBatch


@dataclass(frozen=True)
class Problem:
    """One meta-gradient.

    Attributes:
        name: short, for the command line and the CSV file.
        title: as a heading.
        network: makes the network.
        tasks_of: makes a meta-batch of so many tasks.
        objective_name: "regression" or "classification".
        inner_lr: step size of the inner loop.
        steps: steps of the inner loop.
        tasks: T.
        dtype: of weights and samples.
        device: where they are.
    """

    name: str
    title: str
    network: Callable[[], nn.Module]
    tasks_of: Callable[[int], TaskBatch]
    objective_name: ObjectiveName
    inner_lr: float
    steps: int
    tasks: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def objective(self) -> Objective:
        """The loss and the metric."""
        return objective_of(self.objective_name)

    @property
    def rule(self) -> MAML:
        """The inner loop."""
        return MAML(inner_lr=self.inner_lr, inner_steps=self.steps)

    @property
    def has_batch_norm(self) -> bool:
        """Whether samples see each other."""
        return any(isinstance(layer, nn.BatchNorm2d) for layer in self.network().modules())

    @property
    def has_convolutions(self) -> bool:
        """Whether it is about images."""
        return any(isinstance(layer, nn.Conv2d) for layer in self.network().modules())

    def made(self) -> nn.Module:
        """The network, with the same weights at every call."""
        torch.manual_seed(0)
        return self.network().to(self.device, self.dtype)

    def batch(self) -> TaskBatch:
        """The meta-batch, the same at every call."""
        return self.tasks_of(self.tasks).map(
            lambda tensor: tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)
        )

    def samples(self) -> int:
        """How many samples a meta-gradient puts forward and backward."""
        batch = self.batch()
        return self.tasks * (self.steps * batch.support_x.shape[1] + batch.query_x.shape[1])

    def smaller(self, tasks: int, dtype: torch.dtype) -> Problem:
        """The same with other tasks, in another precision."""
        return replace(self, tasks=min(tasks, self.tasks), dtype=dtype)


def sinusoid(steps: int, tasks: int = 25) -> Problem:
    """The MAML paper's regression: an MLP of two hidden layers of 40, 10 support and 10 query points."""
    return Problem(
        name=f"sinusoid-{steps}",
        title=f"Sinusoid, MLP [40, 40], {tasks} tasks of 10+10 points, {_steps(steps)}",
        network=lambda: MLP(1, [40, 40], 1),
        tasks_of=lambda count: Sinusoid(shots=10, queries=10, meta_batch=count, seed=0).sample(
            worker=0, run=0, iteration=0
        ),
        objective_name="regression",
        inner_lr=0.01,
        steps=steps,
        tasks=tasks,
    )


def conv(steps: int, tasks: int = 16, ways: int = 5, queries: int = 15) -> Problem:
    """Images of Omniglot's size, and the network that few-shot papers adapt to them."""
    return Problem(
        name=f"conv4-{steps}",
        title=f"Conv4, 64 filters, batch norm, 28x28, {ways}-way 1-shot, {tasks} tasks, {queries} queries, "
        f"{_steps(steps)}",
        network=lambda: Conv4(ways=ways),
        tasks_of=partial(_images, ways=ways, queries=queries),
        objective_name="classification",
        inner_lr=0.1,
        steps=steps,
        tasks=tasks,
    )


def omniglot(ways: int, tasks: int, steps: int) -> Problem:
    """The MAML paper's own training on Omniglot: convolutions of stride 2, no pooling, as many queries as shots."""
    return Problem(
        name=f"omniglot-{ways}",
        title=f"The MAML paper's Omniglot: Conv4, stride 2, {ways}-way 1-shot, {tasks} tasks, 1 query, {_steps(steps)}",
        network=lambda: Conv4(ways=ways, pooling="stride"),
        tasks_of=partial(_images, ways=ways, queries=1),
        objective_name="classification",
        inner_lr=0.1,
        steps=steps,
        tasks=tasks,
    )


def mini_imagenet() -> Problem:
    """The MAML paper's training on mini-ImageNet, 5-way 1-shot."""
    return Problem(
        name="mini-imagenet",
        title=f"mini-ImageNet: Conv4, 32 filters, 84x84, 5-way 1-shot, 4 tasks, 15 queries, {_steps(5)}",
        network=lambda: Conv4(channels=3, image_size=84, filters=32),
        tasks_of=partial(_images, ways=5, queries=15, size=84, channels=3),
        objective_name="classification",
        inner_lr=0.01,
        steps=5,
        tasks=4,
    )


def _images(count: int, ways: int, queries: int, size: int = 28, channels: int = 1) -> TaskBatch:
    generator = torch.Generator().manual_seed(0)

    def drawn(samples: int) -> Tensor:
        return torch.rand(count, ways * samples, channels, size, size, generator=generator)

    labels = torch.arange(ways).repeat(count, 1)
    return TaskBatch.of(drawn(1), labels, drawn(queries), labels.repeat(1, queries))


def _steps(steps: int) -> str:
    return f"{steps} inner step{'s' if steps > 1 else ''}"
