"""What becomes of the workers' own optimizer moments at a merge.

Legend: Z floating-point values of all optimizers' states, flattened.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

Moments = Literal["keep", "average", "reset"]


class FlatMoments:
    """The floating-point state of optimizers (momenta, second moments, step counts) as one flat vector.

    Args:
        optimizers: of the same kind and over the same parameters on every worker.
        dtype: of the vector.
        device: of the vector.
    """

    def __init__(self, optimizers: Sequence[Optimizer], dtype: torch.dtype, device: torch.device) -> None:
        self._optimizers = optimizers
        self._dtype = dtype
        self._device = device

    def pack(self) -> Tensor:
        """All values, (Z,); a worker that has made no step yet packs zeros, in the same order and number."""
        values = [tensor.detach().reshape(-1).to(self._device, self._dtype) for tensor in self._tensors(made=True)]
        return torch.cat(values) if values else torch.empty(0, dtype=self._dtype, device=self._device)

    def unpack(self, flat: Tensor) -> None:
        """Write (Z,) values back."""
        tensors = list(self._tensors(made=False))
        for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(values.view_as(tensor))

    def _tensors(self, *, made: bool) -> Iterator[Tensor]:
        for optimizer in self._optimizers:
            if not optimizer.state:
                trial = _after_a_trial_step(optimizer)
                if not made:
                    optimizer.load_state_dict(trial.state_dict())
                yield from _state_tensors(trial if made else optimizer)
            else:
                yield from _state_tensors(optimizer)


def _state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for _, value in sorted(optimizer.state.get(parameter, {}).items()):
                if isinstance(value, Tensor) and value.is_floating_point():
                    yield value


def _after_a_trial_step(optimizer: Optimizer) -> Optimizer:
    """A copy with the state that a step would have made, at zero."""
    trial = copy.deepcopy(optimizer)
    for group in trial.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    trial.step()
    for tensor in _state_tensors(trial):
        tensor.zero_()
    return trial


def reset(optimizers: Sequence[Optimizer]) -> None:
    """Forget all moments, as at the start of a training; learning rates and other settings stay."""
    for optimizer in optimizers:
        optimizer.state.clear()
