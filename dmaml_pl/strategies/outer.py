"""An outer optimizer, for which the workers' mean displacement is the (pseudo-)gradient.

Legend: P floating-point parameters of the network, flattened.
"""

from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn

from dmaml_pl.strategies.merge import MergeRule


class OuterOptimizerMerge(MergeRule):
    """DiLoCo's merge (Douillard et al. 2023, arXiv:2311.08105): one step of an optimizer from the run's start.

    With w0 the meta-weights at the run's start and w the workers' mean at its end, the pseudo-gradient is g = w0 - w,
    and the new meta-weights are what the optimizer makes of w0 and g. SGD with lr 1 and no momentum gives the plain
    mean. The step is computed in float64, in which w0 - (w0 - w) is w again for float32 weights of like size. A single
    worker takes the step too (which is then Lookahead, Zhang et al. 2019, arXiv:1907.08610).

    Args:
        optimizer: from parameters to a `torch.optim` optimizer; by default SGD with lr 0.7 and Nesterov momentum 0.9,
            which DiLoCo found best.

    Examples:
        >>> nesterov = lambda weights: torch.optim.SGD(weights, lr=0.7, momentum=0.9, nesterov=True)
        >>> OuterOptimizerMerge(nesterov).merge(torch.zeros(3), torch.ones(3))
        tensor([1.3300, 1.3300, 1.3300])
    """

    acts_alone = True

    def __init__(
        self,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True),
    ) -> None:
        self.optimizer = optimizer
        self._weights: nn.Parameter | None = None
        self._stepper: Any = None
        self._restored: dict[str, Any] | None = None

    def merge(self, start: Tensor, mean: Tensor) -> Tensor:
        """One step of the outer optimizer, (P,)."""
        if self._weights is None:
            self._weights = nn.Parameter(start.double().clone())  # float64 would be the same memory
            self._stepper = self.optimizer([self._weights])
            if self._restored is not None:
                self._stepper.load_state_dict(self._restored)
        with torch.no_grad():
            self._weights.copy_(start)
        self._weights.grad = start.double() - mean.double()
        self._stepper.step()
        return self._weights.detach().clone().to(start.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's moments."""
        state: dict[str, Any] = {} if self._stepper is None else self._stepper.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the moments back at the next merge, when the weights are known."""
        self._restored = state or None
        self._weights = None
