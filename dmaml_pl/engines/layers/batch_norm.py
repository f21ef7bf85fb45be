"""Batch norm whose second derivative takes few operations.

PyTorch 2.15's own is some 75 operations, most of them on the whole of the activations: a quarter of the time of a
support set. Written out by hand, it is about ten (the formula is with `_BatchNormBackward`). The values are the same.

Legend: B samples, C channels, n samples and pixels of a channel.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

Figures = NDArray[Any]
"""Figures of the channels, (C,). NumPy computes with so few in a third of PyTorch's time, and keeps Python's lock:
PyTorch gives it away at every operation, and where two threads do, getting it back takes longer than the operation."""

_AT_ONCE = 400_000
"""Elements that are normalized at a time: 1.6 MB in float32."""


def batch_norm(layer: BatchNorm, x: Tensor) -> Tensor:
    """What a layer that has no running statistics gives of samples x (B, C, ...)."""
    if not is_plain(layer, x):
        return BatchNorm.forward(layer, x)
    layer._check_input_dim(x)  # noqa: SLF001 - as its own forward does
    out: Tensor = _BatchNorm.apply(x, layer.weight, layer.bias, layer.eps)
    return out


def is_plain(layer: BatchNorm, x: Tensor) -> bool:
    """Whether the layer has weights, all is of one type that NumPy knows, and there are statistics of more than one."""
    weight, bias = layer.weight, layer.bias
    alike = weight is not None and bias is not None and x.dtype == weight.dtype == bias.dtype
    return alike and x.dtype in (torch.float32, torch.float64) and x.numel() > x.shape[1]


def statistics(x: Tensor, eps: float) -> tuple[Figures, Figures]:
    """The mean of every channel, and r, what its values are to be multiplied by for a variance of 1.

    PyTorch's own adds up one value after another where channels are last in memory: in float32 its variance of a
    channel that varies little was seen to be wrong by a sixth. Some samples at a time: what does not fit into a core's
    cache, or has to be asked of the operating system each time, takes up to four times as long.
    """
    n, each = values(x), max(1, _AT_ONCE * len(x) // x.numel())
    with np.errstate(all="ignore"):  # as in PyTorch: what is not finite is seen in the loss
        mean = total(x).numpy() / n
        center = over(mean, x)
        squares = [total((part - center).square_()).numpy() for part in x.split(each)]
        return mean, 1 / np.sqrt(sum(squares) / n + eps)


def derivative(g: Tensor, x: Tensor, weight: Tensor, mean: Figures, r: Figures) -> tuple[Tensor, Tensor, Tensor]:
    """The first derivative, w r P(g), sum(g z) and sum(g): see `_BatchNormBackward`."""
    mean_and_r = torch.from_numpy(mean), torch.from_numpy(r)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None, None, *mean_and_r, True, 0.0, [True, True, True]
    )
    return found


def values(x: Tensor) -> float:
    """How many a channel has."""
    return float(x.numel() // x.shape[1])


def total(x: Tensor) -> Tensor:
    """The sum of every channel, (C,)."""
    return x.sum([0, *range(2, x.ndim)])


def over(channels: Figures, x: Tensor) -> Tensor:
    """A figure of each channel, for all values of x."""
    return torch.from_numpy(channels.reshape(1, -1, *[1] * (x.ndim - 2)))


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        mean, r = statistics(x, eps)
        w = weight.detach().numpy()
        ctx.save_for_backward(x, weight)
        ctx.figures = w, mean, r
        return (x - over(mean, x)).mul_(over(w * r, x)).add_(over(bias.detach().numpy(), x))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return *_BatchNormBackward.apply(gradients[0], *ctx.saved_tensors, ctx.figures), None


class _BatchNormBackward(torch.autograd.Function):
    """The first derivative of batch norm, and in its backward the second.

    With z = (x - mean) r the normalized samples, r = 1 / sqrt(var + eps), w the layer's weight, and means over the n
    values of a channel, the first derivative at the output's gradient g is

        dx = w r P(g),    dw = sum(g z),    db = sum(g),    where P(g) = g - mean(g) - z mean(g z)

    Let u, v, t be the gradients of what follows by dx, dw, db. P is its own transpose, and what z passes on to x is
    r P of it, so that with p = w r P(u), c = v - w r mean(u z) and i = mean(g p) the gradients are

        by g: p + v z + t,    by x: r (c P(g) - mean(g z) p - i z),    by w: n r mean(g P(u))
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, figures: tuple[Figures, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        w, mean, r = figures
        dx, dw, db = derivative(g, x, weight, mean, r)
        ctx.save_for_backward(g, x, weight)
        ctx.figures = w, mean, r, dw.numpy(), db.numpy()
        ctx.set_materialize_grads(False)
        return dx, dw, db

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, t: Tensor | None) -> Any:
        g, x, weight = ctx.saved_tensors
        w, mean, r, sum_gz, sum_g = ctx.figures
        u, n = torch.zeros_like(x) if u is None else u, values(x)
        v_, t_ = (np.zeros_like(w) if given is None else given.numpy() for given in (v, t))
        p, sum_uz, _ = derivative(u, x, torch.ones_like(weight), mean, r)  # less the weight, which may be zero
        dw = total(p * g)
        with np.errstate(all="ignore"):
            c, b = v_ - sum_uz.numpy() * w * r / n, sum_gz / n
            along_x = (c * b + w * dw.numpy() / n) * -(r * r)
            dg = torch.addcmul(over(t_ - v_ * mean * r, x), p, over(w, x)).addcmul_(x, over(v_ * r, x))
            dx = torch.addcmul(over(c * r * sum_g / -n - mean * along_x, x), p, over(-r * b * w, x))
            dx.addcmul_(g, over(r * c, x)).addcmul_(x, over(along_x, x))
        return dg, dx, dw, None
