"""Batch norm, ReLU and max-pooling as one operation, which keeps and walks through a quarter of the values.

All three leave the order of a channel's values as it is (batch norm does for a positive weight), so that the largest of
a window can be looked up first, and only those are normalized and cut at zero. Their gradient is zero everywhere else,
so that batch norm's derivatives need few sums over all values, too. The values are the same.

Legend: B samples, C channels, H W pixels before pooling, P pixels after, n samples and pixels of a channel before.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from dmaml_pl.engines.layers.batch_norm import (
    Figures,
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


def pool_then_relu(pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    """A ReLU and max-pooling of x (B, C, H, W), in the order in which the ReLU has less to do."""
    return torch.relu(pool(x))


def batch_norm_relu_pool(norm: BatchNorm, pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    """Batch norm, ReLU and max-pooling of x (B, C, H, W), one after another."""
    if x.ndim != 4 or not is_plain(norm, x):
        return pool_then_relu(pool, batch_norm(norm, x))
    weight: Tensor = norm.weight
    signs = np.sign(weight.detach().numpy())
    if not np.all(np.abs(signs) == 1):  # with a weight of zero all values of a window are the largest
        return pool_then_relu(pool, batch_norm(norm, x))
    if np.any(signs < 0):
        # Normalized values have the sign of the values, so that the product stays the same.
        x, weight = x * over(signs, x), weight * torch.from_numpy(signs)
    out: Tensor = _Block.apply(x, weight, norm.bias, norm.eps, _settings_of(pool))
    return out


def _settings_of(pool: nn.MaxPool2d) -> _Pool:
    def pair(size: Any) -> list[int]:
        return [size, size] if isinstance(size, int) else list(size)

    return pair(pool.kernel_size), pair(pool.stride), pair(pool.padding), pair(pool.dilation), pool.ceil_mode


def _largest(x: Tensor, at: Tensor) -> Tensor:
    """The values of x at the pixels `at` (B, C, P), counted in windows of max-pooling, in the shape of `at`."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return x.flatten(2).gather(2, at.flatten(2)).view_as(at)
    b, c, *size = at.shape
    pixels, places = (tensor.permute(0, 2, 3, 1).reshape(b, -1, c) for tensor in (x, at))
    return pixels.gather(1, places).view(b, *size, c).permute(0, 3, 1, 2)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: _Pool) -> Tensor:
        mean, r = statistics(x, eps)
        w = weight.detach().numpy()
        z, at = _aten.max_pool2d_with_indices(x, *pool)
        z.sub_(over(mean, x)).mul_(over(r, x))
        out = torch.addcmul(over(bias.detach().numpy(), x), z, over(w, x)).clamp_min_(0)
        ctx.save_for_backward(x, weight, z, at, out)
        ctx.figures, ctx.pool = (w, mean, r), pool
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return *_BlockBackward.apply(gradients[0], *ctx.saved_tensors, ctx.figures, ctx.pool), None, None


class _BlockBackward(torch.autograd.Function):
    """The first derivative, and in its backward the second.

    They are batch norm's (`batch_norm.py`, whose names these are), with a g that is zero but for the pixels that were
    the largest of their window and larger than zero. P(g) is kept, as w r P(g), for the weight is not zero here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        z: Tensor,
        at: Tensor,
        out: Tensor,
        figures: tuple[Figures, ...],
        pool: _Pool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        w, mean, r = figures
        g = _aten.threshold_backward(g, out, 0)
        n, dw, db = values(x), total(g * z), total(g)
        with np.errstate(all="ignore"):  # as in PyTorch: what is not finite is seen in the loss
            along_x = dw.numpy() * w * r * r / -n
            constant = db.numpy() * w * r / n + mean * along_x
            dx: Tensor = _aten.max_pool2d_with_indices_backward(g * over(w * r, x), x, *pool, at)
        dx.addcmul_(x, over(along_x, x)).sub_(over(constant, x))
        ctx.save_for_backward(g, x, weight, z, at, out, dx)
        ctx.figures = w, mean, r, dw.numpy()
        ctx.set_materialize_grads(False)
        return dx, dw, db

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, t: Tensor | None) -> Any:
        g, x, weight, z, at, out, first = ctx.saved_tensors
        w, mean, r, sum_gz = ctx.figures
        u, n = torch.zeros_like(x) if u is None else u, values(x)
        p, sum_uz, _ = derivative(u, x, weight, mean, r)
        dg = _largest(p, at)
        sum_gp = total(dg * g).numpy()
        if v is not None:
            dg.addcmul_(z, over(v.numpy(), x))
        if t is not None:
            dg.add_(over(t.numpy(), x))
        with np.errstate(all="ignore"):
            c = (0 if v is None else v.numpy()) - sum_uz.numpy() * w * r / n
            along_x = r * r * sum_gp / -n
            dx = p.mul_(over(sum_gz * r / -n, x)).addcmul_(first, over(c / w, x)).addcmul_(x, over(along_x, x))
            dx.sub_(over(mean * along_x, x))
            dw = torch.from_numpy(sum_gp / w)
        return _aten.threshold_backward(dg, out, 0), dx, dw, None, None, None, None, None
