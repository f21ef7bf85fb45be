"""DMAML written out in one process, without any strategy: what tests hold the strategies against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dmaml_pl import MetaLearning
from dmaml_pl.engines import AdaptationCurve
from dmaml_pl.tasks import TaskBatch, stack_tasks
from tests.recipes import meta_gradient, small_data, small_maml

State = dict[int, dict[str, Any]]


class ByHand:
    """W workers in one process: each a module and an optimizer of its own."""

    def __init__(self, workers: int, optimizer: Callable[[Any], Any], data: Any = None, **settings: Any) -> None:
        self.data = small_data() if data is None else data
        self.modules: list[MetaLearning] = [small_maml(**copy.deepcopy(settings)) for _ in range(workers)]
        self.optimizers = [optimizer(module.parameters()) for module in self.modules]

    def run(self, number: int, length: int | Sequence[int], streams: Sequence[int] | None = None) -> None:
        """Every worker makes a run alone; `length` may differ, and `streams` says whose tasks each draws."""
        lengths = [length] * len(self.modules) if isinstance(length, int) else length
        ranks = range(len(self.modules)) if streams is None else streams
        for rank, module, optimizer, own in zip(ranks, self.modules, self.optimizers, lengths, strict=True):
            for iteration in range(own):
                optimizer.zero_grad()
                batch = self.data.sample(worker=rank, run=number, iteration=iteration)
                meta_gradient(module, batch)
                optimizer.step()

    @property
    def weights(self) -> Tensor:
        """Of every worker, (W, P)."""
        return torch.stack([parameters_to_vector(module.parameters()).detach() for module in self.modules])

    @weights.setter
    def weights(self, flat: Tensor) -> None:
        for module, own in zip(self.modules, flat, strict=True):
            vector_to_parameters(own.clone(), module.parameters())

    def merge(self, weights: Sequence[float] | None = None) -> None:
        """Give every worker the mean, weighted if asked for."""
        share = torch.ones(len(self.modules)) if weights is None else torch.tensor(weights)
        mean = (self.weights * share[:, None]).sum(dim=0) / share.sum()
        self.weights = mean.expand(len(self.modules), -1)

    def without(self, worker: int) -> None:
        """Lose a worker."""
        del self.modules[worker], self.optimizers[worker]

    def average_moments(self) -> None:
        """Give every worker the mean of all optimizers' states."""
        states: list[State] = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        mean = {
            number: {
                name: torch.stack([state[number][name] for state in states]).mean(dim=0) for name in states[0][number]
            }
            for number in states[0]
        }
        for optimizer in self.optimizers:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": copy.deepcopy(mean)})

    def reset_moments(self) -> None:
        """Let every optimizer start anew."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def losses(self, tasks: range) -> list[float]:
        """Each worker's loss after adaptation on validation tasks."""
        batch = stack_tasks([self.data.evaluation_task("val", index) for index in tasks])
        return [float(_curve(module, batch).loss[:, 1].mean()) for module in self.modules]


def _curve(module: MetaLearning, batch: TaskBatch) -> AdaptationCurve:
    return module.engine.for_evaluation(module.learner, batch).adaptation_curve(module.learner, batch, steps=1)


def weights_of(state: dict[str, Tensor]) -> Tensor:
    """A recorded state's parameters as `ByHand.weights` has them, (P,)."""
    return torch.cat([value.reshape(-1) for value in state.values()])
