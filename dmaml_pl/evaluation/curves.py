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

TRAINED, BASELINE, UNTRAINED, ORACLE = NETWORKS = ("trained", "baseline", "untrained", "oracle")
"""The networks that a meta-test compares: meta-trained; trained without meta-learning, then fine-tuned; not trained.

In environments also whoever knows the task, where it is known how that one would act.
"""

TITLES = {TRAINED: "meta-trained", BASELINE: "baseline", UNTRAINED: "untrained", ORACLE: "knows the task"}


class TaskScores(NamedTuple):
    """Tasks of one evaluation batch.

    Attributes:
        numbers: number of each task, (N,).
        loss: query loss after 0 .. I adaptation steps, (N, I + 1).
        metric: query metric, likewise.
        network: which of the networks was evaluated, one of `NETWORKS`.
    """

    numbers: Tensor
    loss: Tensor
    metric: Tensor
    network: str = TRAINED


def in_order(shares: list[list[TaskScores]]) -> list[TaskScores]:
    """The scores of all workers, in the order of the tasks, whichever worker evaluated which."""
    return sorted((item for share in shares for item in share), key=lambda item: int(item.numbers[0]))


def join(scores: list[TaskScores]) -> tuple[Tensor, Tensor]:
    """Losses and metrics of all tasks, both (N, I + 1)."""
    return torch.cat([item.loss for item in scores]), torch.cat([item.metric for item in scores])


def half_width(values: Tensor) -> Tensor:
    """Half the width of the 95 % confidence interval of the mean over tasks, (I + 1,) from (N, I + 1)."""
    if len(values) < 2:
        return torch.full(values.shape[1:], torch.nan)
    return Z95 * values.std(dim=0) / math.sqrt(len(values))


class Validation(NamedTuple):
    """What one validation of a training in environments found; plain values, as a checkpoint keeps them.

    Attributes:
        env_steps: steps in environments that all workers had made before it.
        returns: the mean over the tasks after 0 .. I adaptation steps.
        ci95: half the width of their 95 % confidence intervals.
    """

    env_steps: int
    returns: list[float]
    ci95: list[float]

    @classmethod
    def of(cls, env_steps: int, scores: list[TaskScores]) -> Validation:
        """Join the scores of all evaluation batches."""
        _, returns = join(scores)
        return cls(env_steps, returns.mean(dim=0).tolist(), half_width(returns).tolist())


@dataclass(frozen=True)
class MetaTest:
    """The outcome of a meta-test.

    Attributes:
        objective: the metric's name and direction.
        metrics: by network (`NETWORKS`; `BASELINE` may be missing), the metric of each task after 0 .. I adaptation
            steps, (N, I + 1), the same tasks for each network.
        inner_steps: adaptation steps in training.
        about_baseline: what the baseline is; where there is none, why.
    """

    objective: Objective
    metrics: dict[str, Tensor]
    inner_steps: int
    about_baseline: str = ""

    @classmethod
    def from_scores(cls, objective: Objective, scores: list[TaskScores], inner_steps: int) -> MetaTest:
        """Join the scores of all evaluation batches."""
        by_network = {name: [item for item in scores if item.network == name] for name in NETWORKS}
        return cls(objective, {name: join(own)[1] for name, own in by_network.items() if own}, inner_steps)

    @property
    def trained(self) -> Tensor:
        """The metric of each task from the trained weights, (N, I + 1)."""
        return self.metrics[TRAINED]

    @property
    def tasks(self) -> int:
        """N."""
        return len(self.trained)

    @property
    def steps(self) -> int:
        """I."""
        return self.trained.shape[1] - 1

    def row(self, step: int) -> dict[str, float]:
        """Mean and half width of the 95 % confidence interval after `step` steps, of each network."""
        row: dict[str, float] = {"step": step}
        for name, values in self.metrics.items():
            row |= {name: float(values[:, step].mean()), f"{name}_ci95": float(half_width(values)[step])}
        return row

    @property
    def advantage(self) -> tuple[float, float] | None:
        """How much better the trained network is than the baseline after the training's number of steps; None without.

        Returns:
            The mean of the differences on the same tasks, greater than zero where it is better, and half the width of
            its 95 % confidence interval, which is narrower than those of the two means suggest, as a hard task is hard
            for both.
        """
        if BASELINE not in self.metrics:
            return None
        differences = self.trained - self.metrics[BASELINE]
        if self.objective.better == "min":
            differences = -differences
        return float(differences[:, self.inner_steps].mean()), float(half_width(differences)[self.inner_steps])
