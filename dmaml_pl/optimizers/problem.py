"""What a meta-optimizer may ask of a meta-iteration beside the gradient that PyTorch's closure gives.

Legend: P values of all parameters together.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer


class Values(NamedTuple):
    """Of a meta-batch at the present weights, means over the tasks.

    Attributes:
        loss: after adaptation.
        constraint: how far the adapted policies are from those that acted.
    """

    loss: float
    constraint: float


class Problem(Protocol):
    """A meta-iteration at the weights as they are when it is asked; the same answers on every worker that shares it."""

    def values(self) -> Values:
        """Loss and constraint, without gradients, for a fraction of what a closure takes."""
        ...

    def curvature(self, *, exact: bool, every: int) -> Callable[[list[Tensor]], list[Tensor]]:
        """The curvature of the constraint, times a vector with a tensor for each parameter.

        Args:
            exact: differentiate through the inner loop; else its gradients are constants.
            every: only each so-many-th time step counts.
        """
        ...


class AskingOptimizer(Optimizer):
    """Base of the meta-optimizers that are given a `Problem` before each step.

    Attributes:
        problem: of the meta-iteration under way.
        stepper: the optimizer that makes its steps, and whose state its is; None where it has no state.
        metrics: what the last step tells of itself, by the names in `metric_names`; logged as `train/...`.
    """

    metric_names: ClassVar[tuple[str, ...]] = ()

    problem: Problem
    stepper: Optimizer | None = None

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.metrics: dict[str, float] = {}

    def parameters(self) -> list[Tensor]:
        """All, in the order of their groups."""
        return [p for group in self.param_groups for p in group["params"]]

    def put(self, values: Tensor) -> None:
        """Give all parameters values, (P,)."""
        with torch.no_grad():
            for p, own in zip(self.parameters(), self.split(values), strict=True):
                p.copy_(own)

    def split(self, values: Tensor) -> list[Tensor]:
        """A vector (P,) as a tensor for each parameter."""
        parameters = self.parameters()
        parts = values.split([p.numel() for p in parameters])
        return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def flat(tensors: list[Tensor]) -> Tensor:
    """A tensor for each parameter as one vector, (P,)."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradients_of(parameters: list[Tensor]) -> Tensor:
    """Their gradients as one vector, (P,); zero where there is none."""
    return flat([torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters])
