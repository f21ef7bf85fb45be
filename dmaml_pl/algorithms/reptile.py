"""Reptile: the meta-weights move towards the adapted ones (Nichol, Achiam and Schulman 2018, arXiv:1803.02999)."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from dmaml_pl.algorithms.base import Outcome, Tasks, Weights
from dmaml_pl.algorithms.inner_optimizers import InnerAdam, InnerOptimizer
from dmaml_pl.algorithms.maml import MAML
from dmaml_pl.checks import require_counts
from dmaml_pl.tasks import TaskBatch


class Reptile(MAML):
    """The meta-gradient is w_0 - w_K, the way back from a task's weights after K steps, averaged over the tasks.

    No derivative of the inner loop is taken. Training learns from all samples of a task, support and query alike, as in
    the paper, which does not split them; the loss of the query set is shown. What does not adapt is not learned,
    either. The paper's step w_0 + epsilon * (mean of w_K - w_0) is the meta-optimizer `torch.optim.SGD` with learning
    rate epsilon, in the paper 1 and falling linearly to 0 (`meta_schedule: torch.optim.lr_scheduler.LinearLR` with
    `start_factor` 1, `end_factor` 0 and `total_iters` the meta-iterations). K must be more than 1, or the mean of tasks
    is all that is learned.

    Minibatches are those of an epoch in random order, then of the next in another, as in the paper's code
    (github.com/openai/supervised-reptile). The orders are the same in all tasks, a function of the step's number. As
    the samples of a class lie in a task's support set by chance, and classes have their labels by chance, a minibatch
    is a random one in each task all the same; only how many samples of each label it has is common to all tasks.

    In the paper's code the state of the inner Adam outlives a task, and is handed to the next. Here every task begins
    with none, without which tasks could not be adapted to at once, nor in any order.

    Args:
        inner_lr: step size of the inner loop; 0.001 in the paper's classification.
        inner_steps: K, steps of the inner loop in training; 5 in the paper's 5-way Omniglot.
        inner_batch: samples of a step, 10 in the paper's 5-way; None takes all.
        whole_tasks: learn from all samples of a task, as above; else from its support set alone. A few samples that are
            the same in every step teach no step to help with others, which is all that Reptile learns from.
        inner_optimizer: the paper's `InnerAdam(beta1=0.0)` by default; `InnerMomentum(momentum=0.0)` is plain gradient
            descent.
        settings: those of `MAML`.

    Raises:
        ConfigError: a value is not greater than zero.

    Examples:
        >>> sgd = lambda weights: torch.optim.SGD(weights, lr=1.0)
        >>> module = MetaLearning(MLP(), Reptile(inner_lr=0.02, inner_steps=10), meta_optimizer=sgd)
        >>> module.learner.states()
        {'frozen': 0, 'learned': 0, 'adapting': 1761}
    """

    def __init__(
        self,
        inner_lr: float = 0.001,
        inner_steps: int = 5,
        inner_batch: int | None = None,
        inner_optimizer: InnerOptimizer | None = None,
        whole_tasks: bool = True,
        **settings: Any,
    ) -> None:
        optimizer = InnerAdam(beta1=0.0) if inner_optimizer is None else inner_optimizer
        super().__init__(
            inner_lr, inner_steps, first_order=True, first_order_until=0, inner_optimizer=optimizer, **settings
        )
        if inner_batch is not None:
            require_counts(**{"model.algorithm.inner_batch": inner_batch})
        self.inner_batch = inner_batch
        self.whole_tasks = whole_tasks

    def learned_from(self, batch: TaskBatch) -> TaskBatch:
        """Support and query sets as one support set, unless every step has its own, as of a policy's rollouts."""
        if not self.whole_tasks or len(batch.support) > 1:
            return batch
        (support,), query = batch.support, iter(batch.query.tensors())
        return batch._replace(support=(support.map(lambda tensor: torch.cat([tensor, next(query)], dim=1)),))

    def minibatch(self, number: int, samples: int) -> Sequence[int] | None:
        """The next so many of the samples, in another order each time that all have had their turn."""
        if self.inner_batch is None or self.inner_batch >= samples:
            return None
        first, end = number * self.inner_batch, (number + 1) * self.inner_batch
        epochs = range(first // samples, (end - 1) // samples + 1)
        rows = [row for epoch in epochs for row in random.Random(epoch).sample(range(samples), samples)]  # noqa: S311 - nothing secret
        skipped = epochs[0] * samples
        return rows[first - skipped : end - skipped]

    def outer(self, meta: Weights, path: list[Weights], tasks: Tasks) -> Outcome:
        """Half the square of the way, whose gradient is the way."""
        end = {name: weight.detach() for name, weight in path[-1].items()}
        ways = [(tasks.expand(meta[name]) - weight).square().flatten(1).sum(dim=1) / 2 for name, weight in end.items()]
        with torch.no_grad():
            loss, output = tasks.query(meta, end)
        return Outcome(torch.stack(ways).sum(dim=0), loss, output)
