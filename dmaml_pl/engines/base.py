"""What an engine is: the execution of a meta-batch by an algorithm, for any network.

Legend: T tasks, Q query samples, I adaptation steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import Samples, TaskBatch

Kept = TypeVar("Kept")

EngineName = Literal["auto", "learn2learn", "native", "per_task", "vectorized"]

Backward = Callable[[Tensor], object]
"""Differentiates a loss, as `Tensor.backward` and `LightningModule.manual_backward` do."""

Product = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""The curvature times a vector, both by the names of the meta-weights that are learned."""

Of = Literal["loss", "constraint"]
"""What a meta-gradient is of: the algorithm's outcome, or the objective's constraint on the query sets."""


class MetaOutcome(NamedTuple):
    """What a meta-iteration saw of its tasks after adaptation: mean query loss and metric over the T tasks, scalars.

    The `loss` is the mean constraint instead where the meta-gradient is of that.
    """

    loss: Tensor
    metric: Tensor


class AdaptationCurve(NamedTuple):
    """Query loss and metric of each task after 0 .. I adaptation steps, both (T, I + 1)."""

    loss: Tensor
    metric: Tensor


class Tried(WeakKeyDictionary[nn.Module, Kept]):
    """What was found out of networks by trying them; a copy, also in another process, has tried none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Tried, ()

    def __deepcopy__(self, memo: Any) -> Tried[Kept]:
        return Tried()


class PlainSettings:
    """Numbers, words and switches that modules hold, on which what is decided in Python may depend.

    Which of them there are is looked up once for a module, as that takes longer than small meta-gradients may.
    """

    def __init__(self) -> None:
        self._held: Tried[list[tuple[dict[str, Any], str]]] = Tried()

    def of(self, module: nn.Module) -> list[bool | int | float | str | None]:
        """As they are now, of a module and all below it; without whether it trains."""
        if module not in self._held:
            self._held[module] = [
                (vars(each), name)
                for each in module.modules()
                for name, value in vars(each).items()
                if isinstance(value, bool | int | float | str) and name != "training"
            ]
        return [held.get(name) for held, name in self._held[module]]


def _asks_for_more(engine: str) -> ConfigError:
    return ConfigError(
        f"model.engine is {engine}, but model.meta_optimizer asks for more than gradients: set model.engine to auto."
    )


class Engine(ABC):
    """Executes meta-batches. All engines compute the same; they differ in how fast, and for which networks.

    Args:
        objective: the losses and the metric.

    Attributes:
        name: as shown.
    """

    name: str

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    @abstractmethod
    def refusal(self, learner: MetaLearner, batch: TaskBatch) -> str | None:
        """Why this engine cannot execute a learner, found by trying one task of `batch`; None if it can.

        A network is tried once in training and once in evaluation mode.
        """

    @abstractmethod
    def meta_gradient(
        self, learner: MetaLearner, batch: TaskBatch, backward: Backward = Tensor.backward, of: Of = "loss"
    ) -> MetaOutcome:
        """Add the meta-gradient to the parameters' `.grad`; it is that of the mean over the tasks.

        Args:
            learner: network and algorithm.
            batch: the meta-batch.
            backward: differentiates the loss.
            of: what is differentiated.
        """

    def evaluate_only(self, learner: MetaLearner, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """The mean loss after adaptation, and the mean constraint, scalars; no gradient is computed.

        Raises:
            ConfigError: this engine cannot, as by default.
        """
        raise _asks_for_more(self.name)

    def curvature(self, learner: MetaLearner, batch: TaskBatch, *, exact: bool, every: int) -> Product:
        """The curvature of the mean constraint; see `engines/curvature.py`.

        Raises:
            ConfigError: this engine cannot, as by default.
        """
        raise _asks_for_more(self.name)

    @abstractmethod
    def threads(self, learner: MetaLearner, batch: TaskBatch) -> int | None:
        """Threads with which meta-gradients of such a batch, and all that surrounds them, are fastest; None: all.

        By the work in a task alone, so that it is the same at every start. Compiles what is to be compiled.
        """

    @abstractmethod
    def adaptation_curve(self, learner: MetaLearner, batch: TaskBatch, steps: int) -> AdaptationCurve:
        """Evaluate every task before adaptation and after each step of it; leaves no gradients behind."""

    @abstractmethod
    def predict(self, learner: MetaLearner, batch: TaskBatch, steps: int) -> Tensor:
        """Query predictions before adaptation and after each step of it, (T, I + 1, Q, ...)."""

    @abstractmethod
    def act(self, learner: MetaLearner, supports: tuple[Samples, ...]) -> Callable[[Tensor], Any]:
        """The networks adapted to support sets, one a step: from inputs (T, B, ...) to outputs; see `Act`."""
