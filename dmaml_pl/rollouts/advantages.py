"""Advantages: how much better an action was than what was to be expected, by a linear baseline and GAE.

Legend: T tasks, B rollouts, L time steps, O observation, F features.
"""

import torch
from torch import Tensor

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Added to the diagonal of the normal equations; the next one where they cannot be solved."""


def linear_baseline(observations: Tensor, returns: Tensor, alive: Tensor) -> Tensor:
    """The linear feature baseline of Duan et al. 2016 (arXiv:1604.06778): expected returns, fitted to each task's own.

    Features of a step are the observation, clipped to -10 .. 10, its squares, the time, its square and cube, and one.

    Args:
        observations: (T, B, L, O).
        returns: discounted sums of the rewards from each step on, (T, B, L).
        alive: one where the episode goes on, else zero, (T, B, L).

    Returns:
        Expected returns (T, B, L) of the same type.
    """
    tasks, rollouts, length, _ = observations.shape
    seen = observations.clamp(-10, 10).double()
    time = (torch.arange(length, device=seen.device, dtype=seen.dtype) / 100).view(1, 1, length, 1)
    powers = torch.cat([time, time**2, time**3, torch.ones_like(time)], dim=-1).expand(tasks, rollouts, length, 4)
    features = torch.cat([seen, seen.square(), powers], dim=-1) * alive.unsqueeze(-1)
    flat = features.flatten(1, 2)
    products = flat.mT @ flat
    wanted = flat.mT @ (returns * alive).double().reshape(tasks, -1, 1)
    identity = torch.eye(products.shape[-1], dtype=products.dtype, device=products.device)
    for ridge in RIDGES:
        coefficients, failed = torch.linalg.solve_ex(products + ridge * identity, wanted)
        if not bool(failed.any()) and bool(torch.isfinite(coefficients).all()):
            break
    else:
        coefficients = torch.zeros_like(wanted)  # such as of rewards that are not finite, which are told of elsewhere
    expected: Tensor = (features @ coefficients.unsqueeze(1)).squeeze(-1)
    return expected.to(returns.dtype)


def discounted_sums(values: Tensor, discount: float) -> Tensor:
    """At each of L time steps the sum of the values from it on, the later ones discounted, (..., L)."""
    sums, following = list[Tensor](), torch.zeros_like(values[..., 0])
    for value in reversed(values.unbind(-1)):
        following = torch.add(value, following, alpha=discount)
        sums.append(following)
    return torch.stack(sums[::-1], dim=-1)


def generalized_advantages(
    rewards: Tensor, expected: Tensor, alive: Tensor, discount: float, gae_lambda: float
) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438), zero after an episode's end.

    Nothing is expected after the last step, whether the episode ended or the horizon was reached, as in the MAML
    paper's code.

    Args:
        rewards: (T, B, L).
        expected: returns, (T, B, L).
        alive: one where the episode goes on, else zero, (T, B, L).
        discount: gamma.
        gae_lambda: from 0, the one-step advantage, to 1, the whole return less what was expected.
    """
    expected = expected * alive
    following = torch.cat([expected[..., 1:], torch.zeros_like(expected[..., :1])], dim=-1)
    surprise = (rewards + discount * following - expected) * alive
    return discounted_sums(surprise, discount * gae_lambda) * alive


def normalized(advantages: Tensor, alive: Tensor) -> Tensor:
    """Each task's advantages less their mean, over their standard deviation; zero after an episode's end."""
    steps = alive.sum((1, 2), keepdim=True).clamp(min=1)
    centred = (advantages - (advantages * alive).sum((1, 2), keepdim=True) / steps) * alive
    deviation = (centred.square().sum((1, 2), keepdim=True) / steps).sqrt()
    return centred / (deviation + 1e-8)


def explained_variance(returns: Tensor, expected: Tensor, alive: Tensor) -> Tensor:
    """The share of the variance of the returns that was expected, (T,): 1 is all, 0 no better than their mean."""
    steps = alive.sum((1, 2)).clamp(min=1)

    def variance(values: Tensor) -> Tensor:
        mean = (values * alive).sum((1, 2)) / steps
        return ((values - mean[:, None, None]).square() * alive).sum((1, 2)) / steps

    return 1 - variance(returns - expected) / variance(returns).clamp(min=1e-8)
