"""What `model.engine: auto` takes beside every engine, over networks, sizes and lengths of a training.

Legend: T tasks, S support samples and Q query samples of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.speed.peers import LONG
from benchmarks.speed.timing import clock, in_turn
from dmaml_pl.algorithms import ANIL, MAML, Algorithm
from dmaml_pl.engines import Engine, EngineChoice, EngineName
from dmaml_pl.engines.threads import limited_threads
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.networks import MLP, Conv4, ResNet12
from dmaml_pl.objectives import ObjectiveName, objective_of
from dmaml_pl.tasks import TaskBatch

ENGINES: tuple[EngineName, ...] = ("learn2learn", "per_task", "vectorized", "native")
COMPILED = "compiled vectorized"
WITHOUT_COMPILING = ("learn2learn", "per_task", "vectorized")
SHORT = 100
"""Meta-iterations for which compiling does not pay."""

ROUNDS, SLOT_SECONDS, BUDGET_SECONDS = 7, 0.1, 25.0


class Case(NamedTuple):
    """A meta-gradient.

    Attributes:
        title: as in the table.
        network: makes the network.
        batch: the tasks.
        algorithm: makes the inner loop.
    """

    title: str
    network: Callable[[], nn.Module]
    batch: TaskBatch
    algorithm: Callable[[], Algorithm] = MAML


class Found(NamedTuple):
    """What was measured.

    Attributes:
        title: of the case.
        seconds: of a meta-gradient in the best round, by engine, for those that can.
        short: what `auto` takes for a training that is too short for compiling to pay.
        long: what it takes for one of 60,000 meta-iterations.
    """

    title: str
    seconds: dict[str, float]
    short: str
    long: str

    @property
    def short_ratio(self) -> float:
        """The time of what a short training takes over that of the fastest that compiles nothing."""
        able = [seconds for name, seconds in self.seconds.items() if name in WITHOUT_COMPILING]
        return self.seconds[self.short] / min(able)

    @property
    def long_ratio(self) -> float:
        """The time of what a long training takes over that of the fastest."""
        return self.seconds[self.long] / min(self.seconds.values())


def points(tasks: int, samples: int, inputs: int = 1) -> TaskBatch:
    """Regression, as many samples to adapt to as to be evaluated on."""
    x = torch.randn(tasks, samples, inputs, generator=torch.Generator().manual_seed(0))
    y = x.sum(dim=2, keepdim=True)
    return TaskBatch.of(x, y, x, y)


def images(tasks: int, queries: int, size: int = 28, channels: int = 1, ways: int = 5) -> TaskBatch:
    """Classification, one shot."""
    generator, labels = torch.Generator().manual_seed(0), torch.arange(ways).repeat(tasks, 1)
    support, query = (
        torch.rand(tasks, ways * samples, channels, size, size, generator=generator) for samples in (1, queries)
    )
    return TaskBatch.of(support, labels, query, labels.repeat(1, queries))


def frozen(filters: int) -> nn.Module:
    """A body that neither learns nor adapts, below a head that does."""
    network = Conv4(filters=filters)
    network.features.requires_grad_(False)
    return network


strided = partial(Conv4, pooling="stride")
narrow = partial(ResNet12, widths=(16, 40, 80, 160))


def cases() -> list[Case]:
    """Both Conv4, multilayer perceptrons, ResNet12, a frozen body; few and many tasks and queries."""
    return [
        Case("MLP [40, 40], 25 tasks of 10+10", partial(MLP, 1, [40, 40], 1), points(25, 10)),
        Case("the same, 5 steps", partial(MLP, 1, [40, 40], 1), points(25, 10), partial(MAML, inner_steps=5)),
        Case("the same, 1 task, 1 step", partial(MLP, 1, [40, 40], 1), points(1, 10)),
        Case("MLP [256, 256, 256], 16 tasks of 20+20", partial(MLP, 32, [256] * 3, 1), points(16, 20, 32)),
        Case("MLP [1024, 1024, 1024], 8 tasks of 50+50", partial(MLP, 64, [1024] * 3, 1), points(8, 50, 64)),
        Case("Conv4, stride, 32 tasks, 1 query (the MAML paper's)", strided, images(32, 1)),
        Case("the same, 4 tasks", strided, images(4, 1)),
        Case("Conv4, stride, 8 tasks, 15 queries", strided, images(8, 15)),
        Case("Conv4, stride, 8 tasks, 1 query, 20-way", partial(strided, ways=20), images(8, 1, ways=20)),
        Case("Conv4, max, 16 tasks, 1 query", Conv4, images(16, 1)),
        Case("Conv4, max, 8 tasks, 15 queries", Conv4, images(8, 15)),
        Case("Conv4, max, 32 filters, 8 tasks, 5 queries", partial(Conv4, filters=32), images(8, 5)),
        Case("Conv4, max, 8 filters, 1 task, 1 query", partial(Conv4, filters=8), images(1, 1)),
        Case("Conv4, max, 16 filters, 32 tasks, 1 query", partial(Conv4, filters=16), images(32, 1)),
        Case("ResNet12, quarter width, 32x32, 4 tasks, 5 queries", narrow, images(4, 5, 32, 3)),
        Case("ResNet12, quarter width, 16x16, 8 tasks, 1 query", narrow, images(8, 1, 16, 3)),
        Case("Conv4 frozen, head adapts, 8 tasks, 15 queries", partial(frozen, 64), images(8, 15)),
        Case("the same, 16 filters, 5 queries", partial(frozen, 16), images(8, 5)),
        Case("Conv4, ANIL, 16 tasks, 1 query", Conv4, images(16, 1), partial(ANIL, inner_lr=0.1)),
    ]


def measure() -> Iterator[Found]:
    """Each case by every engine in turn, with as many threads as a training takes."""
    for case in cases():
        yield _of_case(case)


def _of_case(case: Case) -> Found:
    torch.manual_seed(0)
    kind: ObjectiveName = "regression" if case.batch.query_y.is_floating_point() else "classification"
    objective, learner, batch = objective_of(kind), MetaLearner(case.network(), case.algorithm()), case.batch
    choices: dict[str, EngineChoice] = {name: EngineChoice(name, objective) for name in ENGINES}
    if not any(isinstance(layer, nn.Conv2d) for layer in learner.network.modules()):  # these take minutes to compile
        choices[COMPILED] = EngineChoice("vectorized", objective, compiled=True)
    calls: dict[str, Callable[[], object]] = {}
    for name, choice in choices.items():
        try:
            engine = choice.for_training(learner, batch)
        except ConfigError:  # learn2learn has not every algorithm, native not every network
            continue
        calls[name] = partial(_meta_gradient, engine, learner, batch)
        calls[name]()
    times = in_turn(calls, rounds=ROUNDS, slot=SLOT_SECONDS, budget=BUDGET_SECONDS, clock=clock())
    taken = []
    for meta_iterations in (SHORT, LONG):
        choice = EngineChoice("auto", objective, compiled="auto")
        choice.meta_iterations = meta_iterations
        taken.append(choice.for_training(learner, batch).name)
    return Found(case.title, {name: min(own.seconds) for name, own in times.items()}, *taken)


def _meta_gradient(engine: Engine, learner: MetaLearner, batch: TaskBatch) -> None:
    with limited_threads(engine.threads(learner, batch)):
        engine.meta_gradient(learner, batch)
