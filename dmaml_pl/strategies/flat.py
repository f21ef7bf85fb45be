"""A module's state as one flat vector, so that a merge is one all-reduce.

Floating-point parameters and buffers are averaged. Integer and boolean buffers (counters) cannot be: they are taken
from worker 0, carried as 16-bit digits, which float32 holds and adds exactly.

Legend: P floating-point values, D digits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

DIGITS = 4
BASE = 1 << 16


class FlatState:
    """Packs the parameters and buffers of a module into vectors, and unpacks merged vectors back into them.

    Args:
        module: the module.
        parameters: whether its parameters are packed, too, or only its buffers.
    """

    def __init__(self, module: nn.Module, *, parameters: bool = True) -> None:
        state = [*(module.parameters() if parameters else ()), *module.buffers()]
        self.floats = [tensor for tensor in state if tensor.is_floating_point()]
        self.parameter_size = sum(p.numel() for p in module.parameters() if p.is_floating_point()) if parameters else 0
        self.integers = [tensor for tensor in state if not tensor.is_floating_point()]
        wide = any(tensor.dtype == torch.float64 for tensor in self.floats)
        self.dtype = torch.float64 if wide else torch.float32

    def pack_floats(self) -> Tensor:
        """All floating-point values, (P,), in float32, or in float64 where the module has any."""
        return _concatenate((tensor.detach().to(self.dtype) for tensor in self.floats), self.dtype, self._device())

    def unpack_floats(self, flat: Tensor) -> None:
        """Write (P,) values back into the module, in its own types."""
        with torch.no_grad():
            for tensor, values in zip(self.floats, flat.split([t.numel() for t in self.floats]), strict=True):
                tensor.copy_(values.view_as(tensor))

    def pack_integers(self) -> Tensor:
        """All integer values as digits, (D,)."""
        digits = []
        for tensor in self.integers:
            value = tensor.detach().to(torch.int64)
            digits.append(torch.stack([(value >> (16 * place)) & (BASE - 1) for place in range(DIGITS)]).to(self.dtype))
        return _concatenate(digits, self.dtype, self._device())

    def unpack_integers(self, digits: Tensor) -> None:
        """Write (D,) digits back into the module's integer buffers."""
        sizes = [DIGITS * tensor.numel() for tensor in self.integers]
        with torch.no_grad():
            for tensor, values in zip(self.integers, digits.split(sizes), strict=True):
                places = values.to(torch.int64).view(DIGITS, *tensor.shape)
                number = torch.zeros_like(places[0])
                for place in range(DIGITS):
                    number |= places[place] << (16 * place)
                tensor.copy_(number)

    def _device(self) -> torch.device:
        tensors = [*self.floats, *self.integers]
        return tensors[0].device if tensors else torch.device("cpu")


def _concatenate(tensors: Iterable[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    parts = [tensor.reshape(-1) for tensor in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)
