"""What an engine is: the execution of a meta-batch by an algorithm, for any network.

Legend: T tasks, Q query samples, I adaptation steps.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from itertools import chain
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


class Held:
    """What modules hold, on which what is decided in Python may depend.

    It is asked at every meta-iteration, of which small ones take less time than PyTorch's own walk through modules.
    """

    def __init__(self) -> None:
        self._known: Tried[tuple[list[int], list[tuple[dict[str, Any], str]]]] = Tried()

    def settings(self, module: nn.Module) -> list[Hashable]:
        """Of a module and all below it the kinds, and the numbers, words and switches as they are now."""
        modules = _with_all_below(module)
        now = [id(vars(each)) for each in modules]  # modules themselves would be kept for ever
        known, places = self._known.get(module, ([], []))
        if now != known:
            places = [
                (vars(each), name)
                for each in modules
                for name, value in vars(each).items()
                if isinstance(value, bool | int | float | str)
            ]
            self._known[module] = now, places
        return [*map(type, modules), *(held.get(name) for held, name in places)]

    @staticmethod
    def tensors(learner: MetaLearner) -> list[Tensor]:
        """The values of `learner.meta()`, followed by the buffers of its network."""
        network, algorithm = _with_all_below(learner.network), _with_all_below(learner.algorithm)
        places = [
            *(vars(each)["_parameters"] for each in (*network, *algorithm)),
            *(vars(each)["_buffers"] for each in (*algorithm, *network)),
        ]
        found = {id(tensor): tensor for place in places if place for tensor in place.values() if tensor is not None}
        return [*found.values()]


class Parts:
    """Modules, parameters and buffers that a module has at one time; whether it still has them is soon found out.

    Args:
        module: the outermost.
    """

    def __init__(self, module: nn.Module) -> None:
        kinds = ("_modules", "_parameters", "_buffers")
        self._places: list[dict[str, Any]] = [vars(each)[kind] for each in _with_all_below(module) for kind in kinds]
        self._known = self._now()

    def are_as_before(self) -> bool:
        """Whether they are the very same; parameters may have other values."""
        now = self._now()
        return len(now) == len(self._known) and all(map(operator.is_, now, self._known))

    def _now(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._places))]


def _with_all_below(module: nn.Module, found: list[nn.Module] | None = None) -> list[nn.Module]:
    """As `module.modules()`, and in its order; one that has several names is there several times."""
    found = [] if found is None else found
    found.append(module)
    for child in vars(module)["_modules"].values():
        if child is not None:
            _with_all_below(child, found)
    return found


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
