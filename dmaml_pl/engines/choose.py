"""Which engine executes a learner: the one asked for, or the fastest that can, by the work in a task.

Nothing is timed, so that what is chosen, and with it the bits of a training, are the same at every start.
"""

import copy
from collections.abc import Hashable, Sequence
from typing import Literal

from pytorch_lightning.utilities import rank_zero_info
from torch import nn
from torch.nn.modules.conv import _ConvNd

from dmaml_pl import _learn2learn
from dmaml_pl.checks import require_counts
from dmaml_pl.engines.base import Engine, EngineName, Tried
from dmaml_pl.engines.learn2learn import Learn2LearnEngine
from dmaml_pl.engines.loop import adapts_head_alone
from dmaml_pl.engines.native import NativeEngine
from dmaml_pl.engines.per_task import PerTaskEngine
from dmaml_pl.engines.vectorized import VectorizedEngine
from dmaml_pl.engines.work import Work, work_of
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.networks.names import HEAD
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import TaskBatch

CompileSetting = bool | Literal["auto"]

LARGE_OPERATION = 50_000
"""Elements that an operation gives for one task, as a root mean square, up to which CPUs compute all tasks at once.

Small operations take as long as it takes to start them, so that it is better to start one for all tasks; the results of
large ones for all tasks are in no cache. Between 0.1 and 1.03 of the time of tasks one by one was taken up to 24,000
elements, as much or up to a quarter more from 64,000 to 80,000, and 1.3 to 3 times as much beyond: convolutions,
multilayer perceptrons, adapting wholly and in part (`make benchmark ONLY=auto`).
"""

LARGE_OPERATION_OF_POLICIES = 160_000
"""The same for what acts, whose meta-gradients a trust region follows with dozens of products by the curvature.

These take many small operations beside the large ones: with 2D navigation's policies all tasks at once took 0.65 of the
time of tasks one by one at 80,000 elements, 0.92 at 160,000, and 1.06 at 320,000.
"""

MOST_ELEMENTS = 500_000_000
"""Elements of all tasks' operations, in 2 GB of float32, up to which `auto` has all tasks in memory at once."""

SAVED_OPERATION_S, SAVED_ELEMENT_S = 15e-6, 0.7e-9
"""Seconds of a core that compiling saves of a meta-gradient: for each operation that is not started, for each element
that is not written and read again.

15 µs and 1.9 ns beside all tasks at once, for 1 and 25 tasks of sinusoid and for layers of 256; 0.8 ns beside tasks one
by one, for layers of 1024, where these are faster. The native engine saves as much of convolutions.
"""

SAVED_FLOPS_S = 50e9
"""Floating-point operations of convolutions in which the native engine saves a second of a core beyond that."""

COMPILING_NATIVE_S, COMPILING_LINEAR_S = 40.0, 15.0
"""What compiling the native engine takes where nothing was compiled before and other processes run.

For convolutions, and for linear layers alone.
"""

MOST_LINEAR_WEIGHTS = 30_000
"""Weights of linear layers up to which the native engine takes less time than a compiled graph.

One thread and one inner step: 1.4 times as fast with 5,000 weights and 50 support samples, 1.2 times with 21,000 and 10
samples, 0.92 times with 53,000.
"""

COMPILING_S, COMPILING_OPERATION_S = 10.0, 0.1
"""What compiling takes, where nothing was compiled before: as a whole, and for each operation of one task."""


class EngineChoice:
    """Chooses engines for learners by network, algorithm and batch, the same at every start, and remembers.

    With "auto" it is the fastest engine that can run the network where it is. On CPUs convolutions and small linear
    layers are trained by the native engine, and all else by a compiled graph, where the training is long enough for
    compiling to pay. Where it is not, networks with large operations are executed per task, and all others vectorized.
    What one cannot run is left to the next, learn2learn the last. Each engine is tried on one task first.

    Args:
        name: the value of `model.engine`.
        objective: the losses and the metric.
        compiled: compile the meta-gradient where the vectorized engine is chosen, or small linear layers. With "auto"
            where that pays within `meta_iterations`, also of networks that it is not chosen for otherwise; and never
            convolutions on CPUs, which take minutes to compile.
        task_chunk: tasks that are in memory at a time, at most; by default as the engine finds best.

    Attributes:
        asked: `name`.
        meta_iterations: of the training; what there is to be gained by compiling. None: there is no training.

    Raises:
        ConfigError: there is no engine of that name, it cannot be compiled, or `task_chunk` is not greater than zero.
    """

    def __init__(
        self, name: EngineName, objective: Objective, *, compiled: CompileSetting = False, task_chunk: int | None = None
    ) -> None:
        if task_chunk is not None:
            require_counts(**{"model.task_chunk": task_chunk})
        if compiled not in (True, False, "auto"):
            raise ConfigError(f"model.compile is {compiled!r}, but must be true, false or auto.")
        if compiled is True and name in ("learn2learn", "native", "per_task"):
            raise ConfigError(f"model.compile is true, but model.engine is {name}: set it to vectorized or auto.")
        self._engines: dict[str, Engine] = {
            "learn2learn": Learn2LearnEngine(objective),
            "native": NativeEngine(objective, task_chunk=task_chunk),
            "per_task": PerTaskEngine(objective, task_chunk=task_chunk),
            "vectorized": VectorizedEngine(objective, task_chunk=task_chunk),
        }
        if name != "auto" and name not in self._engines:
            raise ConfigError(f"model.engine is {name!r}, but must be one of auto, {', '.join(sorted(self._engines))}.")
        self.meta_iterations: float | None = None
        self._objective = objective
        self.asked = name
        self.task_chunk = task_chunk
        self._compiled = compiled
        self._compiling = VectorizedEngine(objective, compiled=True, task_chunk=task_chunk)
        self._trains: Tried[dict[tuple[Hashable, ...], Engine]] = Tried()
        self._evaluates: Tried[dict[tuple[Hashable, ...], Engine]] = Tried()
        self._refusals: Tried[dict[tuple[Hashable, ...], str | None]] = Tried()
        self._said: set[str] = set()
        self._acts = False

    def name(self, learner: MetaLearner) -> str:
        """The engine of a learner, as far as it is known."""
        return self._known(learner).name

    def for_training(self, learner: MetaLearner, batch: TaskBatch) -> Engine:
        """The engine of meta-gradients; tried on one task of `batch` once in training and once in evaluation mode.

        Raises:
            ConfigError: the engine asked for cannot execute the learner, or none can; names `model.engine`.
        """
        chosen, key = self._trains.setdefault(learner, {}), (self.meta_iterations, *_key(learner, batch))
        if key not in chosen:
            takes = self._gains_compiled(learner, batch)
            first = ["native"] * self._gains_natively(learner, batch) + ["vectorized"] * (takes is not None)
            engine = self._first_that_can(learner, batch, first)
            is_compiled = engine is self._engines["vectorized"] and (takes is not None or self._compiled is True)
            if is_compiled and self._compiled == "auto":
                lasts = f"may take {takes:.0f} s and saves more"
                self._say(f"model.compile is auto: the meta-gradient is compiled, which {lasts}.")
            chosen[key] = self._compiling if is_compiled else engine
        return chosen[key]

    def for_evaluation(self, learner: MetaLearner, batch: TaskBatch) -> Engine:
        """The engine that evaluates a batch, which may be another one than trains.

        Raises:
            ConfigError: as for training.
        """
        chosen, key = self._evaluates.setdefault(learner, {}), _key(learner, batch)
        if key not in chosen:
            chosen[key] = self._first_that_can(learner, batch)
        return chosen[key]

    def for_acting(self, learner: MetaLearner) -> Engine:
        """The engine that makes samples; where there were none yet to try the learner on, the one to be tried first."""
        self._acts = True
        known, key = self._refusals.get(learner, {}), ("vectorized", _device_of(learner))
        # Nothing that can be run in training cannot in evaluation mode.
        if self.asked == "auto" and None in (known.get((*key, mode), "") for mode in (learner.network.training, True)):
            return self._engines["vectorized"]  # all tasks act at once, whatever trains them
        return self._known(learner)

    def _known(self, learner: MetaLearner) -> Engine:
        """The last that was chosen, or the one to be tried first."""
        device = _device_of(learner)
        for known in (self._trains, self._evaluates):
            engines = [engine for key, engine in known.get(learner, {}).items() if device in key]
            if engines:
                return engines[-1]
        if self.asked in ("auto", "vectorized"):
            return self._compiling if self._compiled is True else self._engines["vectorized"]
        return self._engines[self.asked]

    def _candidates(self, learner: MetaLearner, batch: TaskBatch) -> list[str]:
        if self.asked != "auto":
            return [self.asked]
        first = ["vectorized", "per_task"] if self._gains_at_once(learner, batch) else ["per_task"]
        return [*first, "learn2learn"]

    def _gains_natively(self, learner: MetaLearner, batch: TaskBatch) -> bool:
        """Whether convolutions or small linear layers are trained for long enough that compiling for them pays."""
        if self.asked != "auto" or _device_of(learner) != "cpu" or self._objective.acts:
            return False
        # A graph computes the embedding of a body that does not adapt once for all steps.
        is_linear = _has_few_linear_layers(learner.network) and not adapts_head_alone(learner)
        if self._compiled is True or self.meta_iterations is None:
            return is_linear and self._compiled is True
        work = work_of(learner, self._objective, batch)
        if work is None:
            return False
        if is_linear:
            return self.meta_iterations * _saved(work, batch) > COMPILING_LINEAR_S
        if not any(isinstance(layer, nn.Conv2d) for layer in learner.network.modules()):
            return False
        saves = _saved(work, batch) + (1 - _needless(learner)) * batch.tasks * work.flops / SAVED_FLOPS_S
        return self.meta_iterations * saves > COMPILING_NATIVE_S

    def _gains_compiled(self, learner: MetaLearner, batch: TaskBatch) -> float | None:
        """Seconds that compiling takes, where they are fewer than it saves, or where it is asked for; else None."""
        on_cpu = _device_of(learner) == "cpu"
        if self._compiled is False or self.asked not in ("auto", "vectorized"):
            return None
        if on_cpu and any(isinstance(layer, _ConvNd) for layer in learner.network.modules()):
            return None
        work = work_of(learner, self._objective, batch)
        if work is None or (on_cpu and self.asked == "auto" and not self._fits_at_once(work, batch)):
            return None
        takes = COMPILING_S + COMPILING_OPERATION_S * work.operations
        pays = self.meta_iterations is not None and self.meta_iterations * _saved(work, batch) > takes
        return takes if pays or self._compiled is True else None

    def _gains_at_once(self, learner: MetaLearner, batch: TaskBatch) -> bool:
        """Whether all tasks at once are faster than one by one, and fit into memory."""
        if _device_of(learner) != "cpu":
            return True
        work = work_of(learner, self._objective, batch)
        large = LARGE_OPERATION_OF_POLICIES if self._acts else LARGE_OPERATION
        return work is None or (work.size <= large and self._fits_at_once(work, batch))

    def _fits_at_once(self, work: Work, batch: TaskBatch) -> bool:
        return min(batch.tasks, self.task_chunk or batch.tasks) * work.elements <= MOST_ELEMENTS

    def _refusal(self, name: str, learner: MetaLearner, batch: TaskBatch) -> str | None:
        known, key = self._refusals.setdefault(learner, {}), (name, _device_of(learner), learner.network.training)
        if key not in known:
            known[key] = self._engines[name].refusal(learner, batch)
        return known[key]

    def _say(self, line: str) -> None:
        """Once."""
        if line not in self._said:
            rank_zero_info(line)
            self._said.add(line)

    def _first_that_can(self, learner: MetaLearner, batch: TaskBatch, first: Sequence[str] = ()) -> Engine:
        refusals: list[str] = []
        for name in (*first, *self._candidates(learner, batch)):
            refusal = self._refusal(name, learner, batch)
            if refusal is None:
                if refusals:
                    self._say(f"model.engine is {name}: {refusals[0]}.")
                if self._acts and self.asked == "auto":
                    self._refusal("vectorized", learner, batch)  # may act even where others train faster
                return self._engines[name]
            refusals.append(refusal)
        if self.asked == "auto":
            untried = "" if _learn2learn.installed() else f"; {refusals[-1]}, and might"
            remedy = self._remedy(learner, batch) or untried
            raise ConfigError(f"No engine can run model.network with model.algorithm: {refusals[-2]}{remedy}.")
        others = "auto" if self.asked == "learn2learn" else "learn2learn or auto"
        raise ConfigError(f"model.engine is {self.asked}, but {refusals[0]}: set model.engine to {others}.")

    def _remedy(self, learner: MetaLearner, batch: TaskBatch) -> str:
        """What can be done about a learner that no engine can run, if it is the second derivative that fails."""
        first_order = copy.copy(learner)  # whole networks cannot always be copied
        first_order.__dict__["_modules"] = {"network": learner.network, "algorithm": copy.deepcopy(learner.algorithm)}
        first_order.algorithm.first_order = True
        if learner.algorithm.first_order or self._engines["per_task"].refusal(first_order, batch) is not None:
            return ""
        return "; it has no second derivative, without which it can be: set model.algorithm.first_order to true"


def _has_few_linear_layers(network: nn.Module) -> bool:
    layers = [layer for layer in network.modules() if any(True for _ in layer.parameters(recurse=False))]
    weights = sum(p.numel() for p in network.parameters())
    return weights <= MOST_LINEAR_WEIGHTS and all(type(layer) is nn.Linear for layer in layers)


def _needless(learner: MetaLearner) -> float:
    """How often more than needed the native engine computes a body that does not adapt.

    It runs it anew in every step, each 0.3 to 0.7 of a meta-gradient of one (Conv4 of 16 and 64 filters), and with the
    derivatives of a frozen one.
    """
    if not adapts_head_alone(learner):
        return 0.0
    body = [p for name, p in learner.network.named_parameters() if not name.startswith(HEAD)]
    return 0.4 * (learner.algorithm.steps - 1) + (0.0 if any(p.requires_grad for p in body) else 2.0)


def _saved(work: Work, batch: TaskBatch) -> float:
    """Seconds of a core that are saved where operations are neither started nor leave what they give."""
    return SAVED_OPERATION_S * work.operations + SAVED_ELEMENT_S * batch.tasks * work.elements


def _key(learner: MetaLearner, batch: TaskBatch) -> tuple[Hashable, ...]:
    """What a choice depends on."""
    shapes = tuple(tensor.shape for tensor in batch.tensors())
    return _device_of(learner), learner.network.training, shapes


def _device_of(learner: MetaLearner) -> str:
    return next((p.device.type for p in learner.network.parameters()), "cpu")
