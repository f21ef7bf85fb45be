"""What the inner loops have in common whose step has parameters of its own."""

from typing import Any

from torch import nn

from dmaml_pl.algorithms.base import OWN, Weights
from dmaml_pl.algorithms.maml import MAML
from dmaml_pl.checks import require_positive


class LearnedStep(MAML):
    """Base of the algorithms that step as MAML does, but for what is meta-learned of the step.

    Args:
        meta_lr: learning rate of what is meta-learned of the step; by default the meta-optimizer's. Adam moves a rate
            of 0.01 as far in a step as a weight of 1, so that a fiftieth of the weights' keeps rates where steps beyond
            those of training still converge.
        settings: those of `MAML`.

    Raises:
        ConfigError: a value is not greater than zero.

    Examples:
        >>> from dmaml_pl.algorithms import LearnedStep
        >>> class OneRate(LearnedStep):
        ...     def attach(self, network):
        ...         super().attach(network)
        ...         self.rate = nn.Parameter(torch.tensor(self.inner_lr))
        ...     def step(self, meta, fast, gradients, number):
        ...         return {name: fast[name] - meta["algorithm.rate"] * g for name, g in gradients.items()}
        >>> module = MetaLearning(MLP(hidden=[8]), OneRate(inner_lr=0.01, meta_lr=0.0001))
        >>> [name for name in module.learner.meta() if name.startswith("algorithm.")]
        ['algorithm.rate']
    """

    def __init__(self, meta_lr: float | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if meta_lr is not None:
            require_positive(**{"model.algorithm.meta_lr": meta_lr})
        self.meta_lr = meta_lr

    def adapting(self, network: nn.Module) -> Weights:
        """The weights of a network that adapt, by name; known once `MAML.attach` has chosen them."""
        weights = dict(network.named_parameters())
        return {name: weights[name] for name in self.adapts}

    def own(self, meta: Weights, parameters: str) -> Weights:
        """An own list of parameters, one for each weight that adapts, by the names of the weights.

        Args:
            meta: meta-weights.
            parameters: name of the list.
        """
        return {name: meta[f"{OWN}{parameters}.{number}"] for number, name in enumerate(self.adapts)}
