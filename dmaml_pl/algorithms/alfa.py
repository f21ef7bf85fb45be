"""ALFA: rates and decays that a small network chooses at every step (Baik et al. 2020, arXiv:2011.00209).

Legend: T tasks, L weights that adapt.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmaml_pl.algorithms.base import OWN, Weights
from dmaml_pl.algorithms.learned_step import LearnedStep
from dmaml_pl.checks import require_not_negative


class ALFA(LearnedStep):
    """The inner loop w' = (1 - b * decay[w, step]) w - a * rate[w, step] * dL(support; w)/dw.

    (a, b), two numbers for each weight tensor, are what a network of two layers with 2 L units each makes of the means
    of all weight and all gradient tensors, at every step anew. That network is meta-learned, as are `rate` and `decay`.
    The gradients that it is shown are constants to it, as in the paper's code. There the rates and decays have a value
    for one step more than are made, and batch norms do not adapt; here steps beyond training take the last, and all
    adapts that `adapts` does not leave out.

    Args:
        weight_decay: where all of `decay` start, times `inner_lr`; 0.0005 in the paper's code.
        settings: `inner_lr`, where all of `rate` start, and the others of `LearnedStep`.

    Attributes:
        rates: (L, `inner_steps`), after `attach`.
        decays: (L, `inner_steps`).
        generator: from (2 L,) to (2 L,).

    Raises:
        ConfigError: `weight_decay` is less than zero.

    Examples:
        >>> module = MetaLearning(MLP(hidden=[8]), ALFA(inner_lr=0.01, inner_steps=5, meta_lr=0.001))
        >>> module.learner.states()
        {'frozen': 0, 'learned': 184, 'adapting': 25}
    """

    def __init__(self, weight_decay: float = 0.0005, **settings: Any) -> None:
        super().__init__(**settings)
        require_not_negative(**{"model.algorithm.weight_decay": weight_decay})
        self.weight_decay = weight_decay

    def attach(self, network: nn.Module) -> None:
        """Make rates, decays and the network that chooses by them, its weights as PyTorch draws them."""
        super().attach(network)
        like = next(iter(self.adapting(network).values())).detach()
        size = len(self.adapts)
        self.rates = nn.Parameter(like.new_full((size, self.steps), self.inner_lr))
        self.decays = nn.Parameter(like.new_full((size, self.steps), self.inner_lr * self.weight_decay))
        self.generator = nn.Sequential(nn.Linear(2 * size, 2 * size), nn.ReLU(), nn.Linear(2 * size, 2 * size)).to(like)

    def step(self, meta: Weights, fast: Weights, gradients: Weights, number: int) -> Weights:
        """Every weight w becomes (1 - b * decay) w - a * rate * g."""
        at = min(number, self.steps - 1)
        seen = torch.cat([self._means(fast), self._means(gradients).detach()], dim=1)
        a, b = self._generate(meta, seen).chunk(2, dim=1)
        rates, decays = a * meta[f"{OWN}rates"][:, at], b * meta[f"{OWN}decays"][:, at]
        stepped = {}
        for place, name in enumerate(self.adapts):
            if name in gradients:
                rate, decay = (_over(of[:, place], gradients[name]) for of in (rates, decays))
                stepped[name] = (1 - decay) * fast[name] - rate * gradients[name]
        return stepped

    def _means(self, tensors: Weights) -> Tensor:
        """The mean of each tensor, (T, L); zero where a weight has none, as it is not used."""
        some = next(iter(tensors.values()))
        none = some.new_zeros(len(some))
        return torch.stack(
            [tensors[name].reshape(len(some), -1).mean(1) if name in tensors else none for name in self.adapts], dim=1
        )

    def _generate(self, meta: Weights, seen: Tensor) -> Tensor:
        """From (T, 2 L) to (T, 2 L); by hand, as tasks in several threads cannot lend one module their weights."""
        for layer in (0, 2):
            weight, bias = (meta[f"{OWN}generator.{layer}.{kind}"] for kind in ("weight", "bias"))
            seen = functional.linear(seen if layer == 0 else seen.relu(), weight, bias)
        return seen


def _over(values: Tensor, tensor: Tensor) -> Tensor:
    """One value a task (T,), with as many axes as a tensor (T, ...)."""
    return values.view(-1, *[1] * (tensor.ndim - 1))
