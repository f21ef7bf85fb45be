"""Which engine is faster: chosen by the network, and by where its weights are."""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dmaml_pl.algorithms.base import Algorithm, Learner
from dmaml_pl.checks import require_positive
from dmaml_pl.engines.base import AdaptationCurve, Backward, Engine, EngineName, MetaOutcome
from dmaml_pl.engines.learn2learn import Learn2LearnEngine
from dmaml_pl.engines.per_task import PerTaskEngine
from dmaml_pl.engines.vectorized import VectorizedEngine
from dmaml_pl.errors import ConfigError
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import TaskBatch

MANY_TASKS, FEW_ELEMENTS = 8, 100_000
"""From so many tasks on, and up to so many elements of a task's largest feature maps, convolutions of all tasks at once
judge faster on CPUs: 1.6 times as fast with 80,000, equally with 160,000, and a third as fast with 940,000."""


def engine_named(
    name: EngineName,
    algorithm: Algorithm,
    objective: Objective,
    *,
    compiled: bool = False,
    task_chunk: int | None = None,
) -> Engine:
    """The engine of that name.

    Args:
        name: the value of `model.engine`.
        algorithm: the inner loop.
        objective: the loss and the metric.
        compiled: compile the meta-gradient where the engine is the vectorized one.
        task_chunk: tasks that are in memory at a time, at most; by default as the engine finds best.

    Raises:
        ConfigError: there is no engine of that name, or it cannot execute the algorithm, or cannot be compiled;
            `task_chunk` is not greater than zero.
    """
    if task_chunk is not None:
        require_positive(**{"model.task_chunk": task_chunk})
    if compiled and name in ("learn2learn", "per_task"):
        raise ConfigError(f"model.compile is true, but model.engine is {name}: set it to vectorized or auto.")
    if name == "learn2learn":
        return Learn2LearnEngine(algorithm, objective)
    if name == "per_task":
        return PerTaskEngine(algorithm, objective, task_chunk=task_chunk)
    if name == "vectorized":
        return VectorizedEngine(algorithm, objective, compiled=compiled, task_chunk=task_chunk)
    if name == "auto":
        if algorithm.is_functional:
            return AutoEngine(algorithm, objective, compiled=compiled, task_chunk=task_chunk)
        return Learn2LearnEngine(algorithm, objective)
    raise ConfigError(f"model.engine is {name!r}, but must be one of auto, learn2learn, per_task, vectorized.")


class AutoEngine:
    """The faster engine that can run the network where it is; see `Engine` for what the methods promise.

    On CPUs a convolution with other weights for every task is slower than one task's after another, so networks with
    convolutions are executed per task there; all others vectorized. What the engine that is chosen cannot run is left
    to learn2learn.

    Args:
        algorithm: the inner loop, which has a functional form.
        objective: the loss and the metric.
        compiled: compile the meta-gradient where the vectorized engine is chosen.
        task_chunk: tasks that are in memory at a time, at most; by default as the engine finds best.
    """

    def __init__(
        self, algorithm: Algorithm, objective: Objective, *, compiled: bool = False, task_chunk: int | None = None
    ) -> None:
        self._reference = Learn2LearnEngine(algorithm, objective)
        self._per_task = PerTaskEngine(algorithm, objective, task_chunk=task_chunk)
        self._vectorized = VectorizedEngine(algorithm, objective, compiled=compiled, task_chunk=task_chunk)
        self._settings: dict[str, Any] = {"compiled": compiled, "task_chunk": task_chunk}
        self._chosen: WeakKeyDictionary[nn.Module, dict[str, Engine]] = WeakKeyDictionary()
        self._said: set[str] = set()
        self._small: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, also in another process, chooses for itself."""
        return partial(type(self), **self._settings), (self._reference.algorithm, self._reference.objective)

    def name(self, learner: Learner) -> str:
        """The present choice."""
        return self._choice(learner).name(learner)

    def check(self, learner: Learner, batch: TaskBatch) -> None:
        """Try the network; one that the choice cannot run is left to learn2learn, which is said once."""
        choice = self._choice(learner)
        if isinstance(choice, (PerTaskEngine, VectorizedEngine)):
            refusal = choice.refusal(learner, batch)
            if refusal is not None:
                self._chosen[learner.module] = dict.fromkeys(self._chosen[learner.module], self._reference)
                if refusal not in self._said:
                    rank_zero_info(f"model.engine is learn2learn: {refusal}.")
                self._said.add(refusal)

    def meta_gradient(self, learner: Learner, batch: TaskBatch, backward: Backward = Tensor.backward) -> MetaOutcome:
        """As the engine that is chosen does."""
        return self._checked(learner, batch).meta_gradient(learner, batch, backward)

    def threads(self, learner: Learner, batch: TaskBatch) -> int | None:
        """As for the engine that is chosen."""
        return self._checked(learner, batch).threads(learner, batch)

    def adaptation_curve(self, learner: Learner, batch: TaskBatch, steps: int) -> AdaptationCurve:
        """As the engine that is chosen does."""
        return self._judge(learner, batch).adaptation_curve(learner, batch, steps)

    def predict(self, learner: Learner, batch: TaskBatch, steps: int) -> Tensor:
        """As the engine that is chosen does."""
        return self._judge(learner, batch).predict(learner, batch, steps)

    def _checked(self, learner: Learner, batch: TaskBatch) -> Engine:
        self.check(learner, batch)
        return self._choice(learner)

    def _judge(self, learner: Learner, batch: TaskBatch) -> Engine:
        """The engine that judges a batch, which may be another one than trains."""
        engine = self._checked(learner, batch)
        if engine is self._per_task and batch.tasks >= MANY_TASKS:
            network = learner.module
            if network not in self._small:
                small = self._per_task.widest(learner, batch) <= FEW_ELEMENTS
                self._small[network] = small and self._vectorized.refusal(learner, batch) is None
            if self._small[network]:
                return self._vectorized
        return engine

    def _choice(self, learner: Learner) -> Engine:
        network = learner.module
        device = next((p.device.type for p in network.parameters()), "cpu")
        chosen = self._chosen.setdefault(network, {})
        if device not in chosen:
            slow = device == "cpu" and any(isinstance(layer, _ConvNd) for layer in network.modules())
            chosen[device] = self._per_task if slow else self._vectorized
        return chosen[device]
