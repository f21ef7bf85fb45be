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

from dmaml_pl.data import PlottedTasks, Split, TaskDataModule
from dmaml_pl.tasks import Act, Samples, TaskBatch, derive_seed

MOST_AHEAD, POINTS_AHEAD = 16, 2**14
"""So many meta-batches are sampled together, if they have so few points. Alone in a training, between meta-gradients
that fill the caches with other things, one takes 80 µs."""


class Sinusoid(TaskDataModule):
    """Tasks y = A sin(x - p), with A uniform in 0.1 .. 5, p uniform in 0 .. pi, and x uniform in -5 .. 5.

    The endless distribution needs no split: training, validation and test have unrelated tasks of it.

    Args:
        shots: K, support points of a task.
        queries: Q, query points of a task.
        meta_batch: T, tasks in the meta-batch of one worker; 25 in the paper.
        settings: those of `TaskDataModule`.

    Examples:
        >>> tasks = Sinusoid(shots=10, queries=15).sample_tasks("train", [0, 1, 2])
        >>> tasks.support_x.shape, tasks.query_y.shape
        (torch.Size([3, 10, 1]), torch.Size([3, 15, 1]))
    """

    evaluation_chunk = 100
    """A hundred tasks of some points take hardly longer than one."""

    def __init__(self, *, shots: int = 10, queries: int = 10, meta_batch: int = 25, **settings: Any) -> None:
        super().__init__(shots=shots, queries=queries, meta_batch=meta_batch, **settings)
        self._ahead: dict[Any, TaskBatch] = {}
        """Meta-batches that were sampled with an earlier one, each to be handed out once."""

    def sample(self, *, worker: int, run: int, iteration: int, act: Act | None = None) -> TaskBatch:
        """A training meta-batch, sampled at once: x and y are (T, S, 1) and (T, Q, 1)."""
        shape = self.meta_batch, self.shots, self.queries
        place = self.seed, shape, worker, run
        batch = self._ahead.pop((place, iteration), None)
        if batch is None:
            count = max(1, min(MOST_AHEAD, POINTS_AHEAD // (self.meta_batch * (self.shots + self.queries))))
            iterations = range(iteration, iteration + count)
            seeds = [derive_seed("train", self.seed, worker, run, each) for each in iterations]
            self._ahead = dict(zip(((place, each) for each in iterations), _sample(seeds, *shape), strict=True))
            batch = self._ahead.pop((place, iteration))
        return batch

    def sample_task(self, split: Split, seed: int) -> TaskBatch:
        """One task; the split only matters through the seed."""
        (batch,) = _sample([seed], 1, self.shots, self.queries)
        return batch.task(0)

    def tasks_to_plot(self, count: int, points: int = 200) -> PlottedTasks:
        """Meta-test tasks 0 .. `count` - 1 with their own support sets, and the true curve on a grid as query set."""
        tasks = self.evaluation_tasks("test", range(count))
        seeds = [derive_seed("test", self.evaluation_seed, index) for index in range(count)]
        amplitude, phase, _ = _parameters(seeds, 1, 0)
        x = np.linspace(-5.0, 5.0, points, dtype=np.float32).reshape(1, 1, points, 1)
        y = torch.from_numpy(amplitude * np.sin(x - phase)).squeeze(1)
        return PlottedTasks(tasks._replace(query=Samples(torch.from_numpy(x[0]).expand(count, points, 1), y)))


def _parameters(
    seeds: Sequence[int], tasks: int, points: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Amplitudes and phases (seeds, T, 1, 1), and then so many inputs (seeds, `points`)."""
    generator, drawn = torch.Generator(), torch.empty(len(seeds), 2 * tasks + points)
    for seed, row in zip(seeds, drawn.unbind(), strict=True):
        row.uniform_(generator=generator.manual_seed(seed))
    uniform: NDArray[np.float32] = drawn.numpy()
    amplitude = 0.1 + 4.9 * uniform[:, :tasks, None, None]
    phase = math.pi * uniform[:, tasks : 2 * tasks, None, None]
    return amplitude, phase, 10.0 * uniform[:, 2 * tasks :] - 5.0


def _sample(seeds: Sequence[int], tasks: int, shots: int, queries: int) -> list[TaskBatch]:
    """A meta-batch from each seed, all at once.

    A compiled meta-gradient takes a third of a millisecond, and NumPy a third of PyTorch's time for so few numbers.
    """
    amplitude, phase, x = _parameters(seeds, tasks, tasks * (shots + queries))

    def points(x: NDArray[Any]) -> tuple[Tensor, Tensor]:
        x = np.ascontiguousarray(x).reshape(len(seeds), tasks, -1, 1)
        y = torch.from_numpy(x - phase).sin_()  # PyTorch's sine, whose last bit is not NumPy's
        y.numpy()[...] *= amplitude
        return torch.from_numpy(x), y

    support, query = points(x[:, : tasks * shots]), points(x[:, tasks * shots :])
    return [TaskBatch.of(*parts) for parts in zip(*(part.unbind() for part in (*support, *query)), strict=True)]
