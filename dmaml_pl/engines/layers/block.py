"""Batch norm, ReLU and max-pooling as one operation, which keeps and walks through a quarter of the values.

All three leave the order of a channel's values as it is (batch norm does for a positive weight), so that the largest of a
window can be looked up first, and only those are normalized and cut at zero. Their gradient is zero everywhere else, so
that batch norm's derivatives need few sums over all values, too. The values are the same.

Legend: B samples, C channels, H W pixels before pooling, P pixels after, n samples and pixels of a channel before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dmaml_pl.engines.layers.batch_norm import (
    BatchNorm,
    batch_norm,
    derivative,
    is_plain,
    over,
    statistics,
    total,
    values,
)

_aten: Any = torch.ops.aten
_Pool = tuple[list[int], list[int], list[int], list[int], bool]


def pool_then_relu(relu: nn.ReLU, pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    """Both of x (B, C, H, W), in the order in which the second is less work."""
    del relu
    return torch.relu_(pool(x)) if not x.requires_grad else torch.relu(pool(x))


def batch_norm_relu_pool(norm: BatchNorm, relu: nn.ReLU, pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    """All three of x (B, C, H, W), one after another."""
    if x.ndim != 4 or not is_plain(norm, x):
        return pool_then_relu(relu, pool, batch_norm(norm, x))
    weight, bias = norm.weight, norm.bias
    signs = weight.detach().sign()
    lowest = signs.min()
    if lowest != 1:
        if not signs.all() or lowest.isnan():  # with a weight of zero all values of a window are the largest
            return pool_then_relu(relu, pool, batch_norm(norm, x))
        # Normalized values have the sign of the values, so that the product stays the same.
        x, weight = x * signs.view(1, -1, 1, 1), weight * signs
    out: Tensor = _Block.apply(x, weight, bias, norm.eps, _shape_of(pool))
    return out


def _shape_of(pool: nn.MaxPool2d) -> _Pool:
    def pair(size: Any) -> list[int]:
        return [size, size] if isinstance(size, int) else list(size)

    return pair(pool.kernel_size), pair(pool.stride), pair(pool.padding), pair(pool.dilation), pool.ceil_mode


def _gathered(x: Tensor, at: Tensor) -> Tensor:
    """The values of x that were the largest of their windows, in the shape of `at`."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return x.flatten(2).gather(2, at.flatten(2)).view_as(at)
    b, c, *size = at.shape
    pixels, places = (tensor.permute(0, 2, 3, 1).reshape(b, -1, c) for tensor in (x, at))
    return pixels.gather(1, places).view(b, *size, c).permute(0, 3, 1, 2)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: _Pool) -> Tensor:
        mean, r = statistics(x, eps)
        largest, at = _aten.max_pool2d_with_indices(x, *pool)
        z = largest.sub_(over(mean, x)).mul_(over(r, x))
        out = torch.addcmul(over(bias, x), z, over(weight, x)).clamp_min_(0)
        ctx.save_for_backward(x, weight, mean, r, z, at, out)
        ctx.pool = pool
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return *_BlockBackward.apply(gradients[0], *ctx.saved_tensors, ctx.pool), None, None


class _BlockBackward(torch.autograd.Function):
    """The first derivative, and in its backward the second.

    They are batch norm's (`batch_norm.py`, whose names these are), with a g that is zero but for the pixels that were the
    largest of their window and larger than zero. P(g) is kept, as w r P(g), for the weight is not zero here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        r: Tensor,
        z: Tensor,
        at: Tensor,
        out: Tensor,
        pool: _Pool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        g = _aten.threshold_backward(g, out, 0)
        sum_g, sum_gz, wr, n = total(g), total(g * z), weight * r, values(x)
        along_x = (sum_gz * wr * r).div_(-n)
        constant = (sum_g * wr).div_(n).addcmul_(mean, along_x)
        dx: Tensor = _aten.max_pool2d_with_indices_backward(g * over(wr, x), x, *pool, at)
        dx.addcmul_(x, over(along_x, x)).sub_(over(constant, x))
        ctx.save_for_backward(g, x, weight, mean, r, z, at, out, sum_gz, dx)
        ctx.set_materialize_grads(False)
        return dx, sum_gz, sum_g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, t: Tensor | None) -> Any:
        g, x, weight, mean, r, z, at, out, sum_gz, first = ctx.saved_tensors
        u, n = torch.zeros_like(x) if u is None else u, values(x)
        p, sum_uz, _ = derivative(u, x, weight, mean, r)
        v, t = (torch.zeros_like(r) if given is None else given for given in (v, t))
        c = v - sum_uz * weight * r / n
        gathered = _gathered(p, at)
        i = total(gathered * g).div_(n)
        along_x = (r * r * i).neg_()
        dx = p.mul_(over(sum_gz * r / -n, x)).addcmul_(first, over(c / weight, x)).addcmul_(x, over(along_x, x))
        dx.sub_(over(mean * along_x, x))
        dg = gathered.addcmul_(z, over(v, x)).add_(over(t, x))
        return _aten.threshold_backward(dg, out, 0), dx, i / weight * n, *[None] * 6
