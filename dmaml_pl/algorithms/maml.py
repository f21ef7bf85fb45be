"""MAML: all weights adapt, by gradient descent (Finn, Abbeel and Levine 2017, arXiv:1703.03400)."""

from types import ModuleType
from typing import Any

import torch
from torch import nn

from dmaml_pl.algorithms.base import Algorithm, Weights
from dmaml_pl.checks import require_counts, require_not_negative, require_positive

_HOOKS = ("learned_from", "minibatch", "start", "step", "place", "adapt", "outer")


class MAML(Algorithm):
    """The inner loop w' = w - inner_lr * dL(support; w)/dw, repeated, starting from the meta-weights.

    Args:
        inner_lr: step size of the inner loop; 0.01 in the paper's sinusoid regression.
        inner_steps: steps of the inner loop in training.
        first_order: leave out the second derivatives (FOMAML): faster, and slightly another direction.
        first_order_until: leave them out in so many meta-iterations at the start of the training, as MAML++ does.
        settings: those of `Algorithm`.

    Raises:
        ConfigError: a value is not greater than zero.

    Examples:
        >>> module = MetaLearning(MLP(), MAML(inner_lr=0.01, inner_steps=5))
        >>> adapted = FewShotLearner(module).adapt(torch.rand(10, 1), torch.rand(10, 1))
        >>> adapted.predict(torch.rand(3, 1)).shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        first_order: bool = False,
        first_order_until: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(inner_steps, **settings)
        require_positive(**{"model.algorithm.inner_lr": inner_lr})
        require_counts(**{"model.algorithm.inner_steps": inner_steps})
        require_not_negative(**{"model.algorithm.first_order_until": first_order_until})
        self.inner_lr = inner_lr
        self.first_order = first_order
        self._first_order_until = None if first_order else first_order_until

    def begin(self, meta_iteration: int) -> None:
        """First order, until its time is over."""
        is_first_order = meta_iteration < (self._first_order_until or 0)
        if self._first_order_until is not None and self.first_order is not is_first_order:  # PyTorch sets slowly
            self.first_order = is_first_order

    def step(self, meta: Weights, fast: Weights, gradients: Weights, number: int) -> Weights:
        """Every weight w becomes w - inner_lr * g."""
        # Not `sub`, whose derivative takes one operation more.
        return {name: torch.add(fast[name], g, alpha=-self.inner_lr) for name, g in gradients.items()}

    def learn2learn(self, package: ModuleType, network: nn.Module) -> Any:
        """`learn2learn.algorithms.MAML`, where all weights adapt that are not frozen, by gradient descent."""
        learned = [name for name, weight in network.named_parameters() if weight.requires_grad]
        # A subclass that does anything else is another algorithm.
        differs = any(getattr(type(self), hook) is not getattr(MAML, hook) for hook in _HOOKS)
        if differs or self.adapts != learned or self.inner_optimizer is not None:
            return None
        return package.algorithms.MAML(
            network, lr=self.inner_lr, first_order=self.first_order, allow_nograd=True, allow_unused=True
        )
