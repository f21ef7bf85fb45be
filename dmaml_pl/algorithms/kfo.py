"""Kronecker-factored learned optimizers (Arnold, Iqbal and Sha 2019, arXiv:1910.13603).

Legend: T tasks, O outputs and I inputs of a layer, K values of a filter for one input.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dmaml_pl.algorithms.base import Weights
from dmaml_pl.algorithms.gradient_transform import GradientTransform


class KFO(GradientTransform):
    """The inner loop w' = w - inner_lr * U(dL(support; w)/dw), where U(G) = L'L G R'R with learned L and R.

    So U is a Kronecker product, and positive semi-definite, as in learn2learn. G is (O, I) for a linear layer, (O, 1)
    for a bias, and (I, K) for each output of a convolution; gradients of other shapes are left as they are. All start
    as the identity, and stay the same within the inner loop.

    Its settings are those of `LearnedStep`.

    Examples:
        >>> module = MetaLearning(MLP(hidden=[8]), KFO(inner_lr=0.01, inner_steps=2))
        >>> module.learner.states()
        {'frozen': 0, 'learned': 197, 'adapting': 25}
    """

    def identity(self, weight: Tensor) -> Weights:
        """Matrices L and R, square, by the sizes of G."""
        if weight.ndim not in (1, 2, 4):
            return {}
        rows, columns = _as_matrices(weight.unsqueeze(0)).shape[-2:]
        return {
            side: torch.eye(size, dtype=weight.dtype, device=weight.device)
            for side, size in (("left", rows), ("right", columns))
        }

    def transform(self, own: Weights, gradient: Tensor) -> Tensor:
        """Of a bias (T, O), a matrix (T, O, I), or filters (T, O, I, height, width)."""
        left, right = own["left"], own["right"]
        return ((left.T @ left) @ _as_matrices(gradient) @ (right.T @ right)).view(gradient.shape)

    def reference(self, package: ModuleType, weight: Tensor, own: Weights) -> nn.Module:
        """`KroneckerTransform` of `KroneckerLinear`."""
        made: nn.Module = package.optim.transforms.KroneckerTransform(package.nn.KroneckerLinear)(weight)
        factors: Any = made.transform
        factors.left, factors.right = own["left"], own["right"]
        return made


def _as_matrices(gradient: Tensor) -> Tensor:
    """G of each task: (T, O, 1), (T, O, I), or (T, O, I, K)."""
    return gradient.unsqueeze(2) if gradient.ndim == 2 else gradient.flatten(3) if gradient.ndim == 5 else gradient
