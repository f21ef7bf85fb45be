"""Policies: networks that give a distribution of actions for each observation.

Legend: `...` any axes, O observation, A action dimensions, N actions to choose among.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from dmaml_pl.checks import require_all_counts, require_counts, require_one_of, require_positive
from dmaml_pl.policies.distributions import Categorical, Gaussian

Activation = Literal["relu", "tanh"]


class GaussianPolicy(nn.Module):
    """Normally distributed actions, the mean by a network, the standard deviations the same for all observations.

    Args:
        network: any network from observations (B, O) to means (B, A).
        actions: A.
        init_std: standard deviation of every dimension at the beginning, in the units of the action.
        min_std: the least that it may become.

    Attributes:
        log_std: (A,); learned, and adapting as a weight where an algorithm adapts it.

    Raises:
        ConfigError: a value that is not greater than zero.

    Examples:
        >>> policy = GaussianPolicy(nn.Linear(3, 2), actions=2)
        >>> policy(torch.rand(10, 3)).mean.shape
        torch.Size([10, 2])
    """

    def __init__(self, network: nn.Module, actions: int, init_std: float = 1.0, min_std: float = 1e-6) -> None:
        super().__init__()
        require_positive(
            **{
                "model.network.actions": actions,
                "model.network.init_std": init_std,
                "model.network.min_std": min_std,
            }
        )
        self.network = network
        self.actions = actions
        self.least = math.log(min_std)
        self.log_std = nn.Parameter(torch.full((actions,), math.log(init_std)))

    def forward(self, x: Tensor) -> Gaussian:
        """The distribution of actions (..., A) for observations (..., O)."""
        mean = _of_flat(self.network, x)
        return Gaussian(mean, self.log_std.clamp(min=self.least).expand(mean.shape))


class CategoricalPolicy(nn.Module):
    """A choice among N actions, whose logits a network gives.

    Args:
        network: any network from observations (B, O) to logits (B, N).

    Examples:
        >>> policy = CategoricalPolicy(nn.Linear(4, 2))
        >>> policy(torch.rand(10, 4)).logits.shape
        torch.Size([10, 2])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Categorical:
        """The distribution of actions for observations (..., O)."""
        return Categorical(_of_flat(self.network, x))


class GaussianMLP(GaussianPolicy):
    """A `GaussianPolicy` of linear layers, initialised as in the field: Xavier-uniform weights, biases zero.

    Args:
        observations: O, size of an observation.
        actions: A.
        hidden: widths of the hidden layers; 100 and 100 in the MAML paper, 64 and 64 in ProMP.
        activation: "relu", as in the MAML paper, or "tanh", as in ProMP.
        init_std: standard deviation of every dimension at the beginning.
        min_std: the least that it may become.

    Raises:
        ConfigError: a value that is not greater than zero, or an activation that there is not.

    Examples:
        >>> policy = GaussianMLP(observations=3, actions=2)
        >>> policy(torch.rand(10, 3)).mean.shape
        torch.Size([10, 2])
    """

    def __init__(
        self,
        observations: int,
        actions: int,
        hidden: Sequence[int] = (100, 100),
        activation: Activation = "relu",
        init_std: float = 1.0,
        min_std: float = 1e-6,
    ) -> None:
        super().__init__(_layers(observations, hidden, actions, activation), actions, init_std, min_std)


class CategoricalMLP(CategoricalPolicy):
    """A `CategoricalPolicy` of linear layers; see `GaussianMLP`.

    Args:
        observations: O, size of an observation.
        actions: N.
        hidden: widths of the hidden layers.
        activation: "relu" or "tanh".

    Raises:
        ConfigError: a value that is not greater than zero, or an activation that there is not.

    Examples:
        >>> policy = CategoricalMLP(observations=4, actions=2)
        >>> policy(torch.rand(10, 4)).logits.shape
        torch.Size([10, 2])
    """

    def __init__(
        self, observations: int, actions: int, hidden: Sequence[int] = (100, 100), activation: Activation = "relu"
    ) -> None:
        super().__init__(_layers(observations, hidden, actions, activation))


def _layers(observations: int, hidden: Sequence[int], outputs: int, activation: Activation) -> nn.Sequential:
    require_one_of("model.network.activation", activation, ("relu", "tanh"))
    require_counts(**{"model.network.observations": observations, "model.network.actions": outputs})
    require_all_counts("model.network.hidden", hidden)
    between = nn.ReLU if activation == "relu" else nn.Tanh
    layers: list[nn.Module] = []
    for before, after in pairwise([observations, *hidden, outputs]):
        layer = nn.Linear(before, after)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, between()]
    return nn.Sequential(*layers[:-1])


def _of_flat(network: nn.Module, x: Tensor) -> Tensor:
    """What a network of samples (B, ...) gives for observations (..., O)."""
    out: Tensor = network(x) if x.ndim == 2 else network(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
    return out
