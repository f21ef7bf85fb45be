"""Which engine executes a learner: the one asked for, or the fastest that can, by the network and where it is."""

from pytorch_lightning.utilities import rank_zero_info
from torch.nn.modules.conv import _ConvNd

from dmaml_pl.checks import require_positive
from dmaml_pl.engines.base import Engine, EngineName, Tried
from dmaml_pl.engines.learn2learn import Learn2LearnEngine
from dmaml_pl.engines.per_task import PerTaskEngine
from dmaml_pl.engines.vectorized import VectorizedEngine
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import TaskBatch

MANY_TASKS, FEW_ELEMENTS = 8, 100_000
"""From so many tasks on, and up to so many elements of a task's largest feature maps, convolutions of all tasks at once
are evaluated faster on CPUs: 1.6 times as fast with 80,000, equally with 160,000, and a third as fast with 940,000."""


class EngineChoice:
    """Chooses an engine for learners, tries it on them once, and remembers.

    With "auto" it is the fastest engine that can run the network where it is. On CPUs a convolution with other weights
    for every task is slower than one task's after another, so networks with convolutions are executed per task there;
    all others vectorized. What one cannot run is left to the next, learn2learn the last.

    Args:
        name: the value of `model.engine`.
        objective: the losses and the metric.
        compiled: compile the meta-gradient where the vectorized engine is chosen.
        task_chunk: tasks that are in memory at a time, at most; by default as the engine finds best.

    Raises:
        ConfigError: there is no engine of that name, it cannot be compiled, or `task_chunk` is not greater than zero.
    """

    def __init__(
        self, name: EngineName, objective: Objective, *, compiled: bool = False, task_chunk: int | None = None
    ) -> None:
        if task_chunk is not None:
            require_positive(**{"model.task_chunk": task_chunk})
        if compiled and name in ("learn2learn", "per_task"):
            raise ConfigError(f"model.compile is true, but model.engine is {name}: set it to vectorized or auto.")
        self._engines: dict[str, Engine] = {
            "learn2learn": Learn2LearnEngine(objective),
            "per_task": PerTaskEngine(objective, task_chunk=task_chunk),
            "vectorized": VectorizedEngine(objective, compiled=compiled, task_chunk=task_chunk),
        }
        if name != "auto" and name not in self._engines:
            raise ConfigError(f"model.engine is {name!r}, but must be one of auto, {', '.join(sorted(self._engines))}.")
        self._asked = name
        self._chosen: Tried[dict[tuple[str, bool], Engine]] = Tried()
        self._all_at_once: Tried[bool] = Tried()
        self._said: set[str] = set()

    def name(self, learner: MetaLearner) -> str:
        """The engine of a learner, as far as it is known."""
        return self.for_acting(learner).name

    def for_training(self, learner: MetaLearner, batch: TaskBatch) -> Engine:
        """The engine of meta-gradients; tried on one task of `batch` once in training and once in evaluation mode.

        Raises:
            ConfigError: the engine asked for cannot execute the learner, or none can; names `model.engine`.
        """
        chosen = self._chosen.setdefault(learner, {})
        key = _device_of(learner), learner.network.training
        if key not in chosen:
            chosen[key] = self._first_that_can(learner, batch)
        return chosen[key]

    def for_evaluation(self, learner: MetaLearner, batch: TaskBatch) -> Engine:
        """The engine that evaluates a batch, which may be another one than trains.

        Raises:
            ConfigError: as for training.
        """
        engine = self.for_training(learner, batch)
        if self._asked == "auto" and isinstance(engine, PerTaskEngine) and batch.tasks >= MANY_TASKS:
            vectorized = self._engines["vectorized"]
            if learner not in self._all_at_once:
                small = engine.widest(learner, batch) <= FEW_ELEMENTS
                self._all_at_once[learner] = small and vectorized.refusal(learner, batch) is None
            if self._all_at_once[learner]:
                return vectorized
        return engine

    def for_acting(self, learner: MetaLearner) -> Engine:
        """The engine that makes samples; where there were none yet to try the learner on, the one to be tried first."""
        chosen = self._chosen.get(learner, {})
        known = [engine for (device, _), engine in chosen.items() if device == _device_of(learner)]
        return known[-1] if known else self._engines[self._candidates(learner)[0]]

    def _candidates(self, learner: MetaLearner) -> list[str]:
        if self._asked != "auto":
            return [self._asked]
        convolves = any(isinstance(layer, _ConvNd) for layer in learner.network.modules())
        first = ["per_task"] if convolves and _device_of(learner) == "cpu" else ["vectorized", "per_task"]
        return [*first, "learn2learn"]

    def _first_that_can(self, learner: MetaLearner, batch: TaskBatch) -> Engine:
        refusals: list[str] = []
        for name in self._candidates(learner):
            refusal = self._engines[name].refusal(learner, batch)
            if refusal is None:
                if refusals and refusals[0] not in self._said:
                    rank_zero_info(f"model.engine is {name}: {refusals[0]}.")
                    self._said.add(refusals[0])
                return self._engines[name]
            refusals.append(refusal)
        if self._asked == "auto":
            raise ConfigError(f"No engine can run model.network with model.algorithm: {refusals[-2]}.")
        others = "auto" if self._asked == "learn2learn" else "learn2learn or auto"
        raise ConfigError(f"model.engine is {self._asked}, but {refusals[0]}: set model.engine to {others}.")


def _device_of(learner: MetaLearner) -> str:
    return next((p.device.type for p in learner.network.parameters()), "cpu")
