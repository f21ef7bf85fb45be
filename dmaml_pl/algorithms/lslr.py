"""Learned rates of each layer and step, a part of MAML++ (Antoniou et al. 2019, arXiv:1810.09502)."""

from torch import nn

from dmaml_pl.algorithms.base import OWN, Weights
from dmaml_pl.algorithms.learned_step import LearnedStep


class LSLR(LearnedStep):
    """The inner loop w' = w - rate[w, step] * dL(support; w)/dw, with learned rates that start at `inner_lr`.

    A layer's weight and its bias have rates of their own, as in the paper's code. Steps beyond those of training take
    the last step's rates.

    Its settings are `inner_lr`, where all rates start, `meta_lr`, their own learning rate, and the others of
    `MAML`.

    Attributes:
        rates: (weights that adapt, `inner_steps`), after `attach`.

    Examples:
        >>> module = MetaLearning(MLP(hidden=[8]), LSLR(inner_lr=0.01, inner_steps=3))
        >>> [rates.shape for rates in module.learner.algorithm.parameters()]
        [torch.Size([4, 3])]
    """

    def attach(self, network: nn.Module) -> None:
        """Make the rates of what adapts."""
        super().attach(network)
        like = next(iter(self.adapting(network).values()))
        self.rates = nn.Parameter(like.new_full((len(self.adapts), self.steps), self.inner_lr))

    def step(self, meta: Weights, fast: Weights, gradients: Weights, number: int) -> Weights:
        """Every weight w becomes w - rate * g."""
        rates = dict(zip(self.adapts, meta[f"{OWN}rates"][:, min(number, self.steps - 1)], strict=True))
        return {name: fast[name] - rates[name] * g for name, g in gradients.items()}
