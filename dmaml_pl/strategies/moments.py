"""The workers' own optimizer moments, for a merge that averages them."""

import copy

import torch
from torch import Tensor
from torch.optim import Optimizer


def moments_of(optimizer: Optimizer) -> list[Tensor]:
    """The floating-point state (momenta, second moments, step counts), in the same order on every worker.

    An optimizer that has made no step yet gets its state here, at zero, by a step of a copy. One that leaves its steps
    to another names that one as `stepper`, or None where it has no state.
    """
    stepper: Optimizer | None = getattr(optimizer, "stepper", optimizer)
    if stepper is None:
        return []
    optimizer = stepper
    if optimizer.state:
        return _state(optimizer)
    trial = copy.deepcopy(optimizer)
    for group in trial.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    trial.step()
    optimizer.load_state_dict(trial.state_dict())
    moments = _state(optimizer)
    for moment in moments:
        moment.zero_()
    return moments


def _state(optimizer: Optimizer) -> list[Tensor]:
    return [
        value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for _, value in sorted(optimizer.state.get(parameter, {}).items())
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
