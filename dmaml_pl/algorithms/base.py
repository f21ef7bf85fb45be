"""What an algorithm is: an inner loop's length, and the learn2learn wrapper that makes its steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

from torch import Tensor, nn

from dmaml_pl.errors import require_positive


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

    Raises:
        ConfigError: `steps` is not greater than zero.
    """

    def __init__(self, steps: int) -> None:
        require_positive(**{"model.inner_steps": steps})
        self.steps = steps

    @abstractmethod
    def wrap(self, network: nn.Module) -> nn.Module:
        """The learn2learn wrapper (a `Learner`) around the network; its parameters are what is meta-learned."""
