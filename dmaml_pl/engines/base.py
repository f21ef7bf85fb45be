"""What an engine is: the execution of a meta-batch by an algorithm, for any network.

Legend: T tasks, Q query samples, I adaptation steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from dmaml_pl.algorithms.base import Learner
from dmaml_pl.tasks import TaskBatch

EngineName = Literal["auto", "learn2learn", "per_task", "vectorized"]

Backward = Callable[[Tensor], object]
"""Differentiates a loss, as `Tensor.backward` and `LightningModule.manual_backward` do."""


class MetaOutcome(NamedTuple):
    """What a meta-iteration saw of its tasks after adaptation: mean query loss and metric over the T tasks, scalars."""

    loss: Tensor
    metric: Tensor


class AdaptationCurve(NamedTuple):
    """Query loss and metric of each task after 0 .. I adaptation steps, both (T, I + 1)."""

    loss: Tensor
    metric: Tensor


class Engine(Protocol):
    """Executes meta-batches. All engines compute the same; they differ in how fast, and for which networks.

    An engine is made for an algorithm, the inner loop, and an objective, by which tasks are adapted to and judged.
    """

    def name(self, learner: Learner) -> str:
        """Name of the engine that a learner's meta-batches are executed by, where the learner's weights are now."""
        ...

    def check(self, learner: Learner, batch: TaskBatch) -> None:
        """Try what could fail for a network, on one task of `batch`.

        Raises:
            ConfigError: this engine cannot execute this network; names `model.engine`.
        """
        ...

    def meta_gradient(self, learner: Learner, batch: TaskBatch, backward: Backward = Tensor.backward) -> MetaOutcome:
        """Add the meta-gradient, the gradient of the mean query loss after adaptation, to the parameters' `.grad`.

        Args:
            learner: the wrapped network.
            batch: the meta-batch.
            backward: differentiates the loss.
        """
        ...

    def threads(self, learner: Learner, batch: TaskBatch) -> int | None:
        """Threads with which meta-gradients of such a batch, and all that surrounds them, are fastest; None: all.

        Compiles what is to be compiled.
        """
        ...

    def adaptation_curve(self, learner: Learner, batch: TaskBatch, steps: int) -> AdaptationCurve:
        """Judge every task before adaptation and after each step of it; leaves no gradients behind."""
        ...

    def predict(self, learner: Learner, batch: TaskBatch, steps: int) -> Tensor:
        """Query predictions before adaptation and after each step of it, (T, I + 1, Q, ...)."""
        ...
