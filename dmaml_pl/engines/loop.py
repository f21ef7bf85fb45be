"""Steps of the inner loop as functions of the weights, which the engines that need no wrapper share.

Every tensor has a leading T axis; where tasks are executed one by one, it is of size 1.

Legend: T tasks, S support samples, Q query samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from dmaml_pl.algorithms.base import Algorithm, Weights
from dmaml_pl.objectives import Objective

Judge = Callable[[Weights, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of stacked weights, samples and targets: losses (T,) and predictions."""


def stacked(parameters: Weights, tasks: int) -> Weights:
    """Every task's own weights, which are still equal, so that no memory is taken yet."""
    return {name: p.expand(tasks, *p.shape) for name, p in parameters.items()}


def cut(weights: Weights) -> Weights:
    """The same values without their history."""
    return {name: w.detach().requires_grad_(w.requires_grad) for name, w in weights.items()}


def adapt(algorithm: Algorithm, judge: Judge, weights: Weights, x: Tensor, y: Tensor, *, first_order: bool) -> Weights:
    """One step of the inner loop of every task; frozen and unused weights are left as they are.

    Args:
        algorithm: the inner loop.
        judge: the support loss, of one task or of many.
        weights: the tasks' own, (T, ...).
        x: support samples, (T, S, ...).
        y: their targets, (T, S, ...).
        first_order: take the gradients for constants.
    """
    at = cut(weights) if first_order else weights
    losses, _ = judge(at, x, y)
    names = [name for name, w in at.items() if w.requires_grad]
    found = torch.autograd.grad(
        losses.sum(), [at[name] for name in names], create_graph=not first_order, allow_unused=True
    )
    gradients = {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}
    return weights | algorithm.update({name: weights[name] for name in gradients}, gradients)


def task_metrics(objective: Objective, losses: Tensor, predictions: Tensor, targets: Tensor) -> Tensor:
    """The metric of each task, (T,)."""
    if objective.measure is objective.loss:
        return losses.detach()
    metrics: Tensor = vmap(objective.measure)(predictions.detach(), targets)
    return metrics
