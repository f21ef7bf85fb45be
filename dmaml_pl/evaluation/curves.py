"""Adaptation curves over many tasks: joined from the workers, with 95 % confidence intervals.

Legend: N tasks, I adaptation steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dmaml_pl.objectives import Objective

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution; the mean of some hundred tasks is normal enough."""


class TaskScores(NamedTuple):
    """Tasks of one evaluation batch.

    Attributes:
        numbers: number of each task, (N,).
        loss: query loss after 0 .. I adaptation steps, (N, I + 1).
        metric: query metric, likewise.
        untrained: whether the untrained weights were judged.
    """

    numbers: Tensor
    loss: Tensor
    metric: Tensor
    untrained: bool = False


def in_order(shares: list[list[TaskScores]]) -> list[TaskScores]:
    """The scores of all workers, in the order of the tasks, whichever worker judged which."""
    return sorted((item for share in shares for item in share), key=lambda item: int(item.numbers[0]))


def join(scores: list[TaskScores]) -> tuple[Tensor, Tensor]:
    """Losses and metrics of all tasks, both (N, I + 1)."""
    return torch.cat([item.loss for item in scores]), torch.cat([item.metric for item in scores])


def half_width(values: Tensor) -> Tensor:
    """Half the width of the 95 % confidence interval of the mean over tasks, (I + 1,) from (N, I + 1)."""
    if len(values) < 2:
        return torch.full(values.shape[1:], torch.nan)
    return Z95 * values.std(dim=0) / math.sqrt(len(values))


@dataclass(frozen=True)
class MetaTest:
    """The outcome of a meta-test.

    Attributes:
        objective: the metric's name and direction.
        trained: the metric of each task after 0 .. I adaptation steps from the trained weights, (N, I + 1).
        untrained: the same from the weights before training.
        inner_steps: adaptation steps in training.
    """

    objective: Objective
    trained: Tensor
    untrained: Tensor
    inner_steps: int

    @classmethod
    def from_scores(
        cls, objective: Objective, trained: list[TaskScores], untrained: list[TaskScores], inner_steps: int
    ) -> MetaTest:
        """Join the scores of all evaluation batches."""
        return cls(objective, join(trained)[1], join(untrained)[1], inner_steps)

    @property
    def tasks(self) -> int:
        """N."""
        return len(self.trained)

    @property
    def steps(self) -> int:
        """I."""
        return self.trained.shape[1] - 1

    def table_steps(self) -> list[int]:
        """The adaptation steps that a table shows: 0, 1, 5, 10 as in the MAML paper, the training's, and the last."""
        return sorted({step for step in (0, 1, 5, 10, self.inner_steps, self.steps) if step <= self.steps})

    def row(self, step: int) -> dict[str, float]:
        """Mean and half width of the 95 % confidence interval after `step` steps, of both sets of weights."""
        return {
            "step": step,
            "trained": float(self.trained[:, step].mean()),
            "trained_ci95": float(half_width(self.trained)[step]),
            "untrained": float(self.untrained[:, step].mean()),
            "untrained_ci95": float(half_width(self.untrained)[step]),
        }
