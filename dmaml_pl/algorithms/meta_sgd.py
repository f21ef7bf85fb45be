"""Meta-SGD: every weight has a rate of its own, which is meta-learned (Li et al. 2017, arXiv:1707.09835)."""

from types import ModuleType
from typing import Any

import torch
from torch import nn

from dmaml_pl.algorithms.base import Weights
from dmaml_pl.algorithms.learned_step import LearnedStep


class MetaSGD(LearnedStep):
    """The inner loop w' = w - rate * dL(support; w)/dw, with learned rates of the shape of w that start at `inner_lr`.

    The paper makes one step; here all steps share the rates.

    Its settings are `inner_lr`, where all rates start, `meta_lr`, their own learning rate, and the others of
    `MAML`.

    Examples:
        >>> module = MetaLearning(MLP(hidden=[8]), MetaSGD(inner_lr=0.01, meta_lr=0.0001))
        >>> [rate.shape for rate in module.learner.algorithm.parameters()]
        [torch.Size([8, 1]), torch.Size([8]), torch.Size([1, 8]), torch.Size([1])]
    """

    def attach(self, network: nn.Module) -> None:
        """Make the rates of what adapts."""
        super().attach(network)
        weights = self.adapting(network).values()
        self.rates = nn.ParameterList(torch.full_like(weight, self.inner_lr) for weight in weights)

    def step(self, meta: Weights, fast: Weights, gradients: Weights, number: int) -> Weights:
        """Every weight w becomes w - rate * g."""
        rates = self.own(meta, "rates")
        return {name: fast[name] - rates[name] * g for name, g in gradients.items()}

    def learn2learn(self, package: ModuleType, network: nn.Module) -> Any:
        """`learn2learn.algorithms.MetaSGD`, where all weights adapt, by gradient descent."""
        if len(self.adapts) < len(list(network.parameters())) or self.inner_optimizer is not None:
            return None
        return package.algorithms.MetaSGD(network, first_order=self.first_order, lrs=list(self.rates))
