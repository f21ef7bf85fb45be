"""CAVIA: a few context parameters adapt, all weights are shared (Zintgraf et al. 2019, arXiv:1810.03642)."""

from typing import Any

import torch
from torch import nn

from dmaml_pl.algorithms.base import Tasks, Weights
from dmaml_pl.algorithms.maml import MAML
from dmaml_pl.errors import ConfigError
from dmaml_pl.networks.names import select

CONTEXT = "context"
"""What a network names the parameter that adapts."""


class CAVIA(MAML):
    """The inner loop c' = c - inner_lr * dL(support; c, w)/dc, repeated, starting from c = 0 in every task.

    The weights w of the network are meta-learned through it, and the same for all tasks. The context c is a parameter
    of the network (`dmaml_pl.networks.ContextMLP`, `ContextConv4`), which only the inner loop changes.

    Args:
        inner_lr: step size of the inner loop; 1.0 in the paper's sinusoid regression, far larger than MAML's, as the
            network learns how far a step leads.
        inner_steps: steps of the inner loop in training; 1 in the paper's regression, 2 on images.
        settings: those of `MAML`; `adapts` is every parameter that is named `context`, unless it is set.

    Examples:
        >>> module = MetaLearning(ContextMLP(context=5), CAVIA(inner_lr=1.0))
        >>> module.learner.states()
        {'frozen': 0, 'learned': 1961, 'adapting': 5}
    """

    def __init__(self, inner_lr: float = 1.0, inner_steps: int = 1, **settings: Any) -> None:
        super().__init__(inner_lr, inner_steps, **settings)

    def attach(self, network: nn.Module) -> None:
        """Choose the context, and keep the meta-optimizer from it.

        Raises:
            ConfigError: the network has no context.
        """
        names = [name for name, _ in network.named_parameters()]
        if self._patterns is None:
            self.adapts = [name for name in names if name.rpartition(".")[2] == CONTEXT]
        else:
            self.adapts = select(names, self._patterns, "model.algorithm.adapts")
        if not self.adapts:
            raise ConfigError(
                f"model.algorithm is {type(self).__name__}, but model.network, {type(network).__name__}, has no "
                f"parameter named {CONTEXT}: set it to dmaml_pl.ContextMLP or dmaml_pl.ContextConv4, give your own "
                "network one, or name in model.algorithm.adapts what adapts from zero."
            )
        for name in self.adapts:
            network.get_parameter(name).requires_grad_(False)

    def start(self, meta: Weights, tasks: Tasks) -> Weights:
        """Zero."""
        return {name: tasks.expand(torch.zeros_like(meta[name])) for name in self.adapts}
