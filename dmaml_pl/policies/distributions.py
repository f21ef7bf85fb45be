"""Distributions of actions, as tuples of tensors, so that a network that gives one can be run on many tasks at once.

Legend: `...` any axes (tasks, rollouts, time steps), A action dimensions, N actions to choose among.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor


@runtime_checkable
class ActionDistribution(Protocol):
    """What a policy says of observations (..., O)."""

    def log_prob(self, action: Tensor) -> Tensor:
        """Logarithm of the probability (density) of each action, (...), over all its dimensions together."""
        ...

    def kl_to(self, other: Any) -> Tensor:
        """The Kullback-Leibler divergence KL(self || other), (...)."""
        ...

    def entropy(self) -> Tensor:
        """In nats, (...)."""
        ...

    def sample(self, noise: Tensor) -> Tensor:
        """The action that follows from random numbers of the shape and kind of `noise`."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """Its tensors by name; `type(self)(**parameters)` is the same distribution."""
        ...


class Gaussian(NamedTuple):
    """Independent normal distributions of the A dimensions of an action.

    Attributes:
        mean: (..., A).
        log_std: logarithm of the standard deviations, (..., A), or what expands to it.

    Examples:
        >>> from dmaml_pl.policies.distributions import Gaussian
        >>> narrow, wide = Gaussian(torch.zeros(2), torch.zeros(2)), Gaussian(torch.zeros(2), torch.ones(2))
        >>> round(float(narrow.kl_to(wide)), 4), round(float(narrow.entropy()), 4)
        (1.1353, 2.8379)
    """

    mean: Tensor
    log_std: Tensor

    def log_prob(self, action: Tensor) -> Tensor:
        """The sum over the dimensions of -((a - mean) / std)² / 2 - log std - log(2 pi) / 2."""
        scaled = (action - self.mean) * torch.exp(-self.log_std)
        constant = 0.5 * math.log(2 * math.pi) * self.mean.shape[-1]
        return -0.5 * scaled.square().sum(-1) - self.log_std.sum(-1) - constant

    def kl_to(self, other: Gaussian) -> Tensor:
        """The sum over the dimensions, in closed form."""
        square = torch.exp(2 * self.log_std) + (self.mean - other.mean).square()
        return (other.log_std - self.log_std + 0.5 * square * torch.exp(-2 * other.log_std) - 0.5).sum(-1)

    def entropy(self) -> Tensor:
        """The sum over the dimensions of log std + log(2 pi e) / 2."""
        each = self.log_std + 0.5 * math.log(2 * math.pi * math.e)
        return each.expand_as(self.mean).sum(-1)

    def sample(self, noise: Tensor) -> Tensor:
        """The mean plus standard normal noise (..., A) times the standard deviation."""
        return torch.addcmul(self.mean, torch.exp(self.log_std), noise)

    def parameters(self) -> dict[str, Tensor]:
        """Mean and log_std, (..., A) both."""
        return {"mean": self.mean, "log_std": self.log_std.expand_as(self.mean)}


class Categorical(NamedTuple):
    """A distribution over N actions.

    Attributes:
        logits: logarithms of their probabilities but for a constant, (..., N).

    Examples:
        >>> from dmaml_pl.policies.distributions import Categorical
        >>> even = Categorical(torch.zeros(4))
        >>> round(float(even.log_prob(torch.tensor([2])).exp()), 4)
        0.25
    """

    logits: Tensor

    def log_prob(self, action: Tensor) -> Tensor:
        """Of the numbers of actions, (..., 1)."""
        return F.log_softmax(self.logits, dim=-1).gather(-1, action.long()).squeeze(-1)

    def kl_to(self, other: Categorical) -> Tensor:
        """The sum over the actions of p (log p - log q)."""
        own, others = F.log_softmax(self.logits, dim=-1), F.log_softmax(other.logits, dim=-1)
        return (own.exp() * (own - others)).sum(-1)

    def entropy(self) -> Tensor:
        """Minus the sum over the actions of p log p."""
        own = F.log_softmax(self.logits, dim=-1)
        return -(own.exp() * own).sum(-1)

    def sample(self, noise: Tensor) -> Tensor:
        """The number of an action, (..., 1), from one standard normal number (..., 1): where its quantile falls."""
        quantile = 0.5 * (1 + torch.erf(noise / math.sqrt(2)))
        below = torch.softmax(self.logits, dim=-1).cumsum(-1)[..., :-1]  # the last action takes what is left
        return (quantile > below).sum(-1, keepdim=True).to(noise.dtype)

    def parameters(self) -> dict[str, Tensor]:
        """Logits, (..., N)."""
        return {"logits": self.logits}
