"""Sinusoid regression, the regression problem of the MAML paper (Finn et al. 2017, section 5.1).

Legend: S support points, Q query points; x and y are (S, 1) and (Q, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmaml_pl.data import Split, TaskDataModule
from dmaml_pl.tasks import TaskBatch, derive_seed

MOST_AHEAD, POINTS_AHEAD = 16, 2**14
"""So many meta-batches are drawn together, if they have so few points. Alone in a training, between meta-gradients that
fill the caches with other things, one takes 80 µs."""


class Sinusoid(TaskDataModule):
    """Tasks y = A sin(x - p), with A uniform in 0.1 .. 5, p uniform in 0 .. pi, and x uniform in -5 .. 5.

    The endless distribution needs no split: training, validation and test draw unrelated tasks from it.

    Args:
        shots: K, support points of a task.
        queries: Q, query points of a task.
        meta_batch: T, tasks in the meta-batch of one worker; 25 in the paper.
        runs_per_epoch: runs that Lightning counts as one epoch.
        val_tasks: validation tasks.
        test_tasks: tasks of a meta-test.
        seed: seed of the training tasks; by default that of `seed_everything`, or 0.
        evaluation_seed: seed of the validation and test tasks.
    """

    evaluation_chunk = 100
    """A hundred tasks of some points take hardly longer than one."""

    def __init__(
        self,
        shots: int = 10,
        queries: int = 10,
        meta_batch: int = 25,
        runs_per_epoch: int = 10,
        val_tasks: int = 100,
        test_tasks: int = 600,
        seed: int | None = None,
        evaluation_seed: int = 0,
    ) -> None:
        super().__init__(
            shots=shots,
            queries=queries,
            meta_batch=meta_batch,
            runs_per_epoch=runs_per_epoch,
            val_tasks=val_tasks,
            test_tasks=test_tasks,
            seed=seed,
            evaluation_seed=evaluation_seed,
        )
        self._ahead: dict[Any, TaskBatch] = {}
        """Meta-batches that were drawn with an earlier one, each to be handed out once."""

    def sample(self, *, worker: int, run: int, iteration: int) -> TaskBatch:
        """A training meta-batch, drawn at once: x and y are (T, S, 1) and (T, Q, 1)."""
        shape = self.meta_batch, self.shots, self.queries
        place = self.seed, shape, worker, run
        batch = self._ahead.pop((place, iteration), None)
        if batch is None:
            count = max(1, min(MOST_AHEAD, POINTS_AHEAD // (self.meta_batch * (self.shots + self.queries))))
            iterations = range(iteration, iteration + count)
            seeds = [derive_seed("train", self.seed, worker, run, each) for each in iterations]
            self._ahead = {(place, each): drawn for each, drawn in zip(iterations, _draw(seeds, *shape), strict=True)}
            batch = self._ahead.pop((place, iteration))
        return batch

    def sample_task(self, split: Split, seed: int) -> TaskBatch:
        """One task; the split only matters through the seed."""
        (drawn,) = _draw([seed], 1, self.shots, self.queries)
        return drawn.task(0)

    def figure_tasks(self, tasks: int, points: int = 200) -> TaskBatch:
        """Meta-test tasks 0 .. `tasks` - 1 with their own support sets, and the true curve on a grid as query set."""
        grid = torch.linspace(-5.0, 5.0, points).expand(tasks, points).unsqueeze(-1)
        drawn = []
        for index in range(tasks):
            generator = torch.Generator().manual_seed(derive_seed("test", self.evaluation_seed, index))
            amplitude, phase = _parameters(generator, 1)
            support_x = _inputs(generator, 1, self.shots)
            drawn.append((support_x, _sine(support_x, amplitude, phase), _sine(grid[:1], amplitude, phase)))
        support_x, support_y, query_y = (torch.cat(tensors) for tensors in zip(*drawn, strict=True))
        return TaskBatch(support_x, support_y, grid, query_y, torch.arange(tasks))


def _parameters(generator: torch.Generator, tasks: int) -> tuple[Tensor, Tensor]:
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
    return amplitude, phase


def _inputs(generator: torch.Generator, tasks: int, points: int) -> Tensor:
    return 10.0 * torch.rand(tasks, points, 1, generator=generator) - 5.0


def _sine(x: Tensor, amplitude: Tensor, phase: Tensor) -> Tensor:
    return amplitude * torch.sin(x - phase)


def _draw(seeds: Sequence[int], tasks: int, shots: int, queries: int) -> list[TaskBatch]:
    """A meta-batch from each seed, all at once: bit for bit what the functions above make, in a fraction of the time.

    A compiled meta-gradient takes a third of a millisecond, and NumPy a third of PyTorch's time for so few numbers.
    """
    numbers = tasks * (2 + shots + queries)
    generator, drawn = torch.Generator(), np.empty((len(seeds), numbers), dtype=np.float32)
    for seed, own in zip(seeds, drawn, strict=True):
        generator.manual_seed(seed)
        own[...] = torch.rand(numbers, generator=generator).numpy()
    amplitude = 0.1 + 4.9 * drawn[:, :tasks, None, None]
    phase = math.pi * drawn[:, tasks : 2 * tasks, None, None]
    x = 10.0 * drawn[:, 2 * tasks :] - 5.0

    def points(x: NDArray[Any]) -> tuple[Tensor, Tensor]:
        x = np.ascontiguousarray(x).reshape(len(seeds), tasks, -1, 1)
        y = torch.from_numpy(x - phase).sin_()  # PyTorch's sine, as above
        y.numpy()[...] *= amplitude
        return torch.from_numpy(x), y

    support, query = points(x[:, : tasks * shots]), points(x[:, tasks * shots :])
    return [TaskBatch(*parts) for parts in zip(*(part.unbind() for part in (*support, *query)), strict=True)]
