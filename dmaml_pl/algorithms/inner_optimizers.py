"""Optimizers of the inner loop that have a state, differentiable: what makes of gradients the direction of a step.

An algorithm steps along the direction as it would along the gradient, with its own rates: MAML with `InnerAdam` is
w' = w - inner_lr * direction, as `torch.optim.Adam` with lr `inner_lr`.

Legend: T tasks, `...` the axes of one tensor.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmaml_pl.checks import require_positive
from dmaml_pl.errors import ConfigError


class InnerOptimizer(ABC):
    """Makes of the gradients of a step and of what it remembers the direction of the step.

    Examples:
        >>> from dmaml_pl.algorithms import InnerOptimizer
        >>> class Signs(InnerOptimizer):
        ...     def direction(self, gradients, state, number):
        ...         return {name: gradient.sign() for name, gradient in gradients.items()}, state
        >>> MAML(inner_lr=0.1, inner_optimizer=Signs()).inner_optimizer.direction({"w": torch.tensor([-3.0])}, None, 0)
        ({'w': tensor([-1.])}, None)
    """

    @abstractmethod
    def direction(self, gradients: dict[str, Tensor], state: Any, number: int) -> tuple[dict[str, Tensor], Any]:
        """The direction of step `number`, from 0, and what to remember of it.

        Args:
            gradients: each task's own, (T, ...).
            state: what was given at the step before; None at the first.
            number: of the step.
        """


class InnerScales(InnerOptimizer):
    """Gradients, each step's times a factor of its own, such as a shorter second step.

    Args:
        scales: of step 1, 2 and so on; the last of all that follow. In the MAML paper's reinforcement learning 1 and
            0.5.

    Raises:
        ConfigError: there is none, or one is not greater than zero.

    Examples:
        >>> algorithm = MAML(inner_lr=0.1, inner_steps=2, inner_optimizer=InnerScales([1.0, 0.5]))
        >>> algorithm.steps
        2
    """

    def __init__(self, scales: Sequence[float] = (1.0, 0.5)) -> None:
        if not scales:
            raise ConfigError("model.algorithm.inner_optimizer.scales is empty, but must hold a factor.")
        require_positive(**{f"model.algorithm.inner_optimizer.scales[{n}]": each for n, each in enumerate(scales)})
        self.scales = list(scales)

    def direction(self, gradients: dict[str, Tensor], state: Any, number: int) -> tuple[dict[str, Tensor], Any]:
        """The factor times g."""
        scale = self.scales[min(number, len(self.scales) - 1)]
        return {name: scale * g for name, g in gradients.items()}, None


class InnerMomentum(InnerOptimizer):
    """Momentum as of `torch.optim.SGD`: v = momentum * v + g, beginning with v = g.

    Args:
        momentum: share of the last direction that is kept.
        nesterov: step along g + momentum * v.

    Raises:
        ConfigError: `momentum` is not between 0 and 1.

    Examples:
        >>> algorithm = MAML(inner_lr=0.01, inner_steps=5, inner_optimizer=InnerMomentum(0.5))
        >>> algorithm.steps
        5
    """

    def __init__(self, momentum: float = 0.9, nesterov: bool = False) -> None:
        _require_share("momentum", momentum)
        self.momentum = momentum
        self.nesterov = nesterov

    def direction(self, gradients: dict[str, Tensor], state: Any, number: int) -> tuple[dict[str, Tensor], Any]:
        """v, or g + momentum * v."""
        kept = dict[str, Tensor](state or {})
        kept |= {name: g + self.momentum * kept[name] if name in kept else g for name, g in gradients.items()}
        if self.nesterov:
            return {name: g + self.momentum * kept[name] for name, g in gradients.items()}, kept
        return {name: kept[name] for name in gradients}, kept


class InnerAdam(InnerOptimizer):
    """Adam (Kingma and Ba 2015, arXiv:1412.6980), its moments zero at the start of every task.

    Args:
        beta1: of the mean of gradients; 0 in the Reptile paper.
        beta2: of the mean of their squares.
        eps: added to the root of that mean.

    Raises:
        ConfigError: a share is not between 0 and 1.

    Examples:
        >>> algorithm = MAML(inner_lr=0.001, inner_steps=5, inner_optimizer=InnerAdam(beta1=0.5))
        >>> algorithm.steps
        5
    """

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        _require_share("beta1", beta1)
        _require_share("beta2", beta2)
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    def direction(self, gradients: dict[str, Tensor], state: Any, number: int) -> tuple[dict[str, Tensor], Any]:
        """M / (sqrt(v) + eps), both corrected for their beginning at zero."""
        first, second = (dict(state[0]), dict(state[1])) if state else ({}, {})
        found = {}
        for name, g in gradients.items():
            first[name] = (1 - self.beta1) * g + (self.beta1 * first[name] if name in first else 0.0)
            second[name] = (1 - self.beta2) * g.square() + (self.beta2 * second[name] if name in second else 0.0)
            mean, square = (
                first[name] / (1 - self.beta1 ** (number + 1)),
                second[name] / (1 - self.beta2 ** (number + 1)),
            )
            # The root has no derivative at zero, which is where the gradients of a ReLU that is off are.
            root = torch.where(square > 0, square, torch.ones_like(square)).sqrt()
            found[name] = mean / (torch.where(square > 0, root, torch.zeros_like(root)) + self.eps)
        return found, (first, second)


def _require_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"model.algorithm.inner_optimizer.{name} is {value}, but must be at least 0 and less than 1.")
