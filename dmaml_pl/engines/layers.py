"""Batch norm whose second derivative takes few operations.

PyTorch 2.15's own is some 75 operations, most of them on the whole of the activations: a quarter of the time of a
support set. Written out by hand, it is about ten (the formula is with `_BatchNormBackward`). The values are the same.

Legend: B samples, C channels, n samples and pixels of a channel.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm


def use_faster_batch_norm(network: nn.Module) -> None:
    """Make every batch norm of a network on a CPU that has no running statistics compute as this file says.

    Gradients of gradients can be taken then, but not gradients of those.
    """
    for layer in network.modules():
        if isinstance(layer, BatchNorm) and type(layer).forward is BatchNorm.forward and layer.running_mean is None:
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: BatchNorm, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    alike = weight is not None and bias is not None and x.dtype == weight.dtype == bias.dtype
    if not alike or x.numel() <= x.shape[1]:  # of one value there are no statistics: an error
        return BatchNorm.forward(layer, x)
    layer._check_input_dim(x)  # noqa: SLF001 - as its own forward does
    out: Tensor = _BatchNorm.apply(x, weight, bias, layer.eps)
    return out


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        # PyTorch's own adds up one value after another where channels are last in memory: in float32 its variance of a
        # channel that varies little was seen to be wrong by a sixth.
        n, axes, shape = x.numel() // x.shape[1], [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        mean = x.sum(axes).div_(n)
        centered = x - mean.view(shape)
        scale = centered.square().sum(axes).div_(n).add_(eps).rsqrt_()
        out = torch.addcmul(bias.view(shape), centered, (weight * scale).view(shape))
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return *_BatchNormBackward.apply(gradients[0], *ctx.saved_tensors, ctx.eps), None


class _BatchNormBackward(torch.autograd.Function):
    """The first derivative of batch norm, and in its backward the second.

    With z = (x - mean) r the normalized samples, r = 1 / sqrt(var + eps), w the layer's weight, and means over the n
    values of a channel, the first derivative at the output's gradient g is

        dx = w r (g - mean(g) - z mean(g z)),    dw = sum(g z),    db = sum(g)

    Let u, v, t be the gradients of what follows by dx, dw, db, and a = mean(u z), b = mean(g z). The bracket is a
    projection, so it is its own transpose, and the gradients by g, w and x follow from the chain rule, the latter
    through z and through r.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(g, x, weight, mean, scale)
        ctx.set_materialize_grads(False)
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, scale, True, eps, [True, True, True]
        )
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, t: Tensor | None) -> Any:
        g, x, weight, mean, r = ctx.saved_tensors
        shape = [1, -1, *[1] * (x.ndim - 2)]
        n: int = x.numel() // x.shape[1]

        def average(tensor: Tensor) -> Tensor:
            return tensor.sum([axis for axis in range(tensor.ndim) if axis != 1]).div_(n)

        def over(channels: Tensor) -> Tensor:
            return channels.view(shape)

        zero = torch.zeros_like(mean)
        v, t = zero if v is None else v, zero if t is None else t
        z = torch.addcmul(over(-mean * r), x, over(r))
        mean_g, b = average(g), average(g * z)
        if u is None:
            by_z = v
            dg = torch.addcmul(over(t), z, over(v))
            dx = torch.addcmul(over(-r * by_z * mean_g), g, over(r * by_z)).addcmul_(z, over(-r * v * b))
            return dg, dx, None, None, None, None
        wr, mean_u, a = weight * r, average(u), average(u * z)
        by_z = v - wr * a
        inner = average(u * g) - mean_u * mean_g - a * b
        dg = torch.addcmul(over(t - wr * mean_u), u, over(wr)).addcmul_(z, over(by_z))
        mean_h = by_z * mean_g - wr * b * mean_u
        along_z = v * b - 2 * wr * a * b + wr * inner
        dx = torch.addcmul(over(-r * mean_h), u, over(-r * wr * b))
        dx.addcmul_(g, over(r * by_z)).addcmul_(z, over(-r * along_z))
        return dg, dx, n * r * inner, None, None, None
