"""Convolution whose second derivative is three convolutions.

A convolution is linear in the samples and in the weights. PyTorch 2.15 composes its second derivative of convolutions
with samples and channels swapped, whose kernels are as large as the images, and makes two of what can be one.

Legend: B samples, C channels, H W pixels.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_aten: Any = torch.ops.aten


class _Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What the layer gives of samples x (B, C, H, W)."""
    weight, bias = layer.weight, layer.bias
    known = layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and x.ndim == 4
    # Autocast would cast what is kept for the derivatives once more, and to something else.
    alike = x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)
    if not (known and alike):
        return nn.Conv2d.forward(layer, x)
    geometry = _Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)  # type: ignore[arg-type]
    out: Tensor = _Convolution.apply(x, weight, bias, geometry)
    return out


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, at: _Geometry) -> Tensor:
    out: Tensor = _aten.convolution(x, weight, bias, at.stride, at.padding, at.dilation, False, [0, 0], at.groups)
    return out


def _backward(g: Tensor, x: Tensor, weight: Tensor, at: _Geometry, wanted: tuple[bool, bool, bool]) -> list[Tensor]:
    """The gradients by samples, weights and bias, of those that are wanted."""
    found: list[Tensor] = _aten.convolution_backward(
        g, x, weight, [len(weight)], at.stride, at.padding, at.dilation, False, [0, 0], at.groups, wanted
    )
    return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return _forward(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        found = _ConvolutionBackward.apply(gradients[0], *ctx.saved_tensors, ctx.geometry, ctx.needs_input_grad[:3])
        return *found, None


class _ConvolutionBackward(torch.autograd.Function):
    """The first derivative, and in its backward the second.

    Let x * w be the convolution, g the gradient of its output, and u, v, t those of what follows by the gradients of x,
    w and the bias. As x * w is linear in both, the gradients are

        by g: u * w + x * v + t,    by x: that of x * v by x at g,    by w: that of u * w by w at g
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(g, x, weight)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        return tuple(_backward(g, x, weight, geometry, wanted))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, t: Tensor | None) -> Any:
        g, x, weight = ctx.saved_tensors
        at: _Geometry = ctx.geometry
        by_g = by_x = by_weight = None
        if u is not None and v is not None and at.groups == 1:
            by_g = _forward(torch.cat([u, x], dim=1), torch.cat([weight, v], dim=1), t, at)
        elif v is not None:
            by_g = _forward(x, v, t, at)
            by_g = by_g if u is None else by_g.add_(_forward(u, weight, None, at))
        elif u is not None:
            by_g = _forward(u, weight, t, at)
        elif t is not None:
            by_g = t.view(1, -1, 1, 1).expand_as(g)
        if v is not None and ctx.needs_input_grad[1]:
            by_x = _backward(g, x, v, at, (True, False, False))[0]
        if u is not None and ctx.needs_input_grad[2]:
            by_weight = _backward(g, u, weight, at, (False, True, False))[1]
        return by_g, by_x, by_weight, None, None
