"""Meta-Curvature: gradients are transformed by learned matrices (Park and Oliva 2019, arXiv:1902.03356).

Legend: T tasks, O outputs and I inputs of a layer, K values of a filter for one input.
"""

from types import ModuleType

import torch
from torch import Tensor, nn

from dmaml_pl.algorithms.base import Weights
from dmaml_pl.algorithms.gradient_transform import GradientTransform

_LEARN2LEARN = {"scale": "mc", "outputs": "mc_in", "inputs": "mc_out", "filter": "mc_f"}
"""learn2learn names the matrix of the first axis `in`, as it would be of TensorFlow's weights."""


class MetaCurvature(GradientTransform):
    """The inner loop w' = w - inner_lr * U(dL(support; w)/dw), where U multiplies along every axis by a learned matrix.

    For a linear layer U(G) = M_outputs G M_inputs; a convolution's gradient is also multiplied along its filters, by
    M_filter, and that of a bias value by value. Others are left as they are. All start as the identity.

    Its settings are those of `LearnedStep`.

    Examples:
        >>> module = MetaLearning(MLP(hidden=[8]), MetaCurvature(inner_lr=0.01))
        >>> module.learner.states()
        {'frozen': 0, 'learned': 139, 'adapting': 25}
    """

    def identity(self, weight: Tensor) -> Weights:
        """Matrices (O, O), (I, I), (K, K), or one scale (O,) of a bias."""
        if weight.ndim == 1:
            return {"scale": torch.ones_like(weight)}
        if weight.ndim not in (2, 4):
            return {}
        sizes = {"outputs": weight.shape[0], "inputs": weight.shape[1]}
        if weight.ndim == 4:
            sizes["filter"] = weight[0, 0].numel()
        return {axis: torch.eye(size, dtype=weight.dtype, device=weight.device) for axis, size in sizes.items()}

    def transform(self, own: Weights, gradient: Tensor) -> Tensor:
        """Of a bias (T, O), a matrix (T, O, I), or filters (T, O, I, height, width)."""
        if "scale" in own:
            return own["scale"] * gradient
        if "filter" not in own:
            return own["outputs"] @ gradient @ own["inputs"]
        by_outputs = (own["outputs"] @ gradient.flatten(2)).view(*gradient.shape[:3], -1)
        return (own["inputs"].T @ by_outputs @ own["filter"].T).view(gradient.shape)

    def reference(self, package: ModuleType, weight: Tensor, own: Weights) -> nn.Module:
        """`MetaCurvatureTransform`."""
        made: nn.Module = package.optim.transforms.MetaCurvatureTransform(weight)
        for kind, tensor in own.items():
            setattr(made, _LEARN2LEARN[kind], tensor)
        return made
