"""A module's state as one flat vector, so that a merge is one all-reduce.

Floating-point parameters and buffers are averaged. Integer and boolean buffers (counters) cannot be: they are taken
from worker 0, carried as single bytes, which every floating-point type holds and adds to zeros exactly. Frozen
parameters are left out: all workers hold worker 0's from the start on.

Legend: P floating-point values, D bytes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def pack(tensors: Iterable[Tensor], like: Tensor) -> Tensor:
    """All values of some tensors, (P,), in the type and on the device of `like`."""
    return torch.cat([like.new_empty(0), *(tensor.detach().reshape(-1).to(like) for tensor in tensors)])


@torch.no_grad()
def unpack(flat: Tensor, tensors: list[Tensor]) -> None:
    """Write (P,) values back into the tensors, in their own types."""
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


class FlatState:
    """Packs the parameters and buffers of a module into vectors, and unpacks merged vectors back into them.

    Args:
        module: the module.
        parameters: whether its parameters that require gradients are packed, too, or only its buffers.

    Attributes:
        like: a tensor of the vectors' type, which is float32, or float64 where the module has any, and device.
        parameter_size: how many of the values are of parameters, which come first.
    """

    def __init__(self, module: nn.Module, *, parameters: bool = True) -> None:
        weights = [p for p in module.parameters() if p.requires_grad] if parameters else []
        state = [*weights, *module.buffers()]
        self._floats = [tensor for tensor in state if tensor.is_floating_point()]
        self._integers = [tensor for tensor in state if not tensor.is_floating_point()]
        self.parameter_size = sum(weight.numel() for weight in weights if weight.is_floating_point())
        wide = any(tensor.dtype == torch.float64 for tensor in self._floats)
        device = state[0].device if state else None
        self.like = torch.empty(0, dtype=torch.float64 if wide else torch.float32, device=device)

    def pack_floats(self) -> Tensor:
        """All floating-point values, (P,)."""
        return pack(self._floats, self.like)

    def unpack_floats(self, flat: Tensor) -> None:
        """Write (P,) values back into the module."""
        unpack(flat, self._floats)

    def pack_integers(self) -> Tensor:
        """All integer values as bytes, (D,)."""
        return pack(self._integers, self.like.to(torch.int64)).view(torch.uint8).to(self.like)

    def unpack_integers(self, digits: Tensor) -> None:
        """Write (D,) bytes back into the module's integer buffers."""
        unpack(digits.to(torch.uint8).view(torch.int64), self._integers)
