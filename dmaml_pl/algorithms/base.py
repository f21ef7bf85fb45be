"""What an algorithm is: an inner loop's length, and its step, as a learn2learn wrapper and as a function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

from torch import Tensor, nn

from dmaml_pl.checks import require_positive

Weights = dict[str, Tensor]
"""Tensors by the names that `nn.Module.named_parameters` gives them."""


class Learner(Protocol):
    """The interface of learn2learn's wrappers (`l2l.algorithms.MAML` and its siblings), as the engines use it."""

    module: nn.Module

    def clone(self) -> Learner:
        """A copy that adapts alone, and through which gradients flow back to the meta-weights."""
        ...

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """One step of the inner loop, down the gradient of `loss`, in place."""
        ...

    def __call__(self, x: Tensor) -> Any:
        """The network's predictions."""
        ...


class Algorithm(ABC):
    """Base of the algorithms.

    Args:
        steps: steps of the inner loop in training.

    Attributes:
        first_order: the meta-gradient takes the gradients of the inner loop for constants.

    Raises:
        ConfigError: `steps` is not greater than zero.
    """

    first_order: bool = False

    def __init__(self, steps: int) -> None:
        require_positive(**{"model.inner_steps": steps})
        self.steps = steps

    @abstractmethod
    def wrap(self, network: nn.Module) -> nn.Module:
        """The learn2learn wrapper (a `Learner`) around the network; its parameters are what is meta-learned."""

    def update(self, weights: Weights, gradients: Weights) -> Weights:
        """One step of the inner loop as a function, the same step that the wrapper makes; the vectorized engine's.

        An algorithm that has none leaves this method as it is, and is executed by learn2learn.

        Args:
            weights: what adapts, as it is now. Every tensor has a leading axis of tasks, so the step must treat
                elements alike, or tasks apart.
            gradients: of the support loss, of the same names and shapes.

        Returns:
            The weights after the step, differentiable, of the same names and shapes.
        """
        raise NotImplementedError

    @property
    def is_functional(self) -> bool:
        """Whether the algorithm has an `update`."""
        return type(self).update is not Algorithm.update
