"""Samples rollouts: T tasks times B episodes step together, so that a policy is run once for all of them.

In the worker's own process and thread: there is no queue to wait for and nothing to close. Every random number follows
from the task's seed, so that chunks, threads and resuming give the same bits.

Legend: T tasks, B rollouts of a task, L time steps (horizon), O observation, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.policies.distributions import ActionDistribution, Categorical
from dmaml_pl.policies.objective import OLD
from dmaml_pl.rollouts.advantages import (
    discounted_sums,
    explained_variance,
    generalized_advantages,
    linear_baseline,
    normalized,
)
from dmaml_pl.rollouts.environments import Environments, Task
from dmaml_pl.tasks import Samples


class Rollouts(NamedTuple):
    """Episodes of T tasks, B of each, of at most L steps.

    Attributes:
        observations: before each step, (T, B, L, O).
        actions: (T, B, L, A).
        rewards: zero after an episode's end, (T, B, L).
        alive: one where the episode goes on, else zero, (T, B, L).
        acting: the distributions that the actions were drawn from, (T, B, L).
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    alive: Tensor
    acting: ActionDistribution

    @property
    def returns(self) -> Tensor:
        """Undiscounted return of each episode, (T, B)."""
        return self.rewards.sum(-1)

    @property
    def steps(self) -> int:
        """Steps of all episodes together."""
        return int(self.alive.sum())


def sample_rollouts(
    environments: Environments,
    policy: Callable[[Tensor], Any],
    tasks: Sequence[Task],
    seeds: Sequence[int],
    *,
    rollouts: int,
    horizon: int,
    device: torch.device,
    watch: Callable[[Any], object] | None = None,
) -> Rollouts:
    """Episodes of a policy; ended ones are masked, never begun again.

    Args:
        environments: the family.
        policy: from observations (T, B, O) to each task's distribution of actions.
        tasks: T.
        seeds: of each task's random numbers, T.
        rollouts: B.
        horizon: L.
        device: of the policy.
        watch: is given the state of the environments before each step.

    Raises:
        DataError: an observation or a reward is not finite; names the task and the step.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    dimensions = 1 if environments.discrete else environments.actions
    with torch.no_grad():
        state, seen = environments.reset(tasks, rollouts, generators)
        noise = torch.stack([torch.randn(horizon, rollouts, dimensions, generator=each) for each in generators], dim=1)
        noise = noise.to(device)
        going = torch.ones(len(tasks), rollouts, device=device)
        observed, actions, rewards, alive, acting = [], [], [], [], []
        for number in range(horizon):
            seen = seen.to(device)
            distribution = policy(seen)
            if watch is not None:
                watch(state)
            if not number:
                _check_fits(distribution, environments)
            action = distribution.sample(noise[number])
            state, following, reward, terminated = environments.step(state, action)
            observed.append(seen)
            actions.append(action)
            acting.append(distribution)
            alive.append(going)
            rewards.append(reward.to(device))
            seen = following
            if bool(terminated.any()):
                going = going * ~terminated.to(device)
                if not bool(going.any()):
                    break
    lived = _over_time(alive, horizon)
    made = Rollouts(
        _over_time(observed, horizon),
        _over_time(actions, horizon),
        _over_time(rewards, horizon) * lived,
        lived,
        _joined(acting, horizon),
    )
    _check_finite(made, tasks)
    return made


def _check_fits(distribution: Any, environments: Environments) -> None:
    """Check that a policy gives actions as the environments take them.

    Raises:
        ConfigError: names the setting of the policy.
    """
    kind = "CategoricalMLP" if environments.discrete else "GaussianMLP"
    wanted = f"one of {environments.actions} actions" if environments.discrete else f"{environments.actions} numbers"
    if not isinstance(distribution, ActionDistribution):
        raise ConfigError(
            f"model.network gives a {type(distribution).__name__}, but environments need a policy: set it to one, "
            f"such as dmaml_pl.{kind}."
        )
    if isinstance(distribution, Categorical) != environments.discrete:
        raise ConfigError(
            f"model.network gives a {type(distribution).__name__} distribution, but an action is {wanted}: set "
            f"model.network to a policy such as dmaml_pl.{kind}."
        )
    given = next(iter(distribution.parameters().values())).shape[-1]
    if given != environments.actions:
        raise ConfigError(
            f"model.network.actions is {given}, but an action is {wanted}: set it to {environments.actions}."
        )


def _joined(steps: list[ActionDistribution], horizon: int) -> ActionDistribution:
    """The distributions of all steps as one."""
    parts = [each.parameters() for each in steps]
    joined = {name: _over_time([part[name] for part in parts], horizon) for name in parts[0]}
    found: ActionDistribution = type(steps[0])(**joined)
    return found


def _over_time(steps: list[Tensor], horizon: int) -> Tensor:
    """(T, B, L, ...) of the steps' (T, B, ...); zero after the last where all episodes ended before the horizon."""
    stacked = torch.stack(steps, dim=2)
    if len(steps) == horizon:
        return stacked
    missing = stacked.new_zeros(*stacked.shape[:2], horizon - len(steps), *stacked.shape[3:])
    return torch.cat([stacked, missing], dim=2)


def _check_finite(made: Rollouts, tasks: Sequence[Task]) -> None:
    for name, values in (("observation", made.observations), ("reward", made.rewards)):
        if not bool(torch.isfinite(values.sum())) and bool((wrong := ~torch.isfinite(values)).any()):
            task, rollout, step = (int(place) for place in wrong.nonzero()[0][:3])
            raise DataError(
                f"The environment gave a {name} that is not finite, in step {step} of rollout {rollout} of the task "
                f"{tasks[task]}: smaller actions (data.action_scale, where there is one) or a smaller step of "
                "model.meta_optimizer may keep it in its range."
            )


class Weighed(NamedTuple):
    """Rollouts as samples to learn from, and how well their returns were foreseen.

    Attributes:
        samples: x is (T, B, L, O); y as `PolicyGradient` takes it.
        explained_variance: of each task's returns, (T,).
    """

    samples: Samples
    explained_variance: Tensor


def weigh(made: Rollouts, discount: float, gae_lambda: float) -> Weighed:
    """Advantages of the actions of rollouts, normalised for each task, by its own baseline."""
    returns = discounted_sums(made.rewards, discount)
    expected = linear_baseline(made.observations, returns, made.alive)
    advantages = generalized_advantages(made.rewards, expected, made.alive, discount, gae_lambda)
    targets = {
        "action": made.actions,
        "advantage": normalized(advantages, made.alive),
        "reward": made.rewards,
        "weight": made.alive / made.alive.sum((1, 2), keepdim=True).clamp(min=1),
        **{f"{OLD}{name}": values for name, values in made.acting.parameters().items()},
    }
    return Weighed(Samples(made.observations, targets), explained_variance(returns, expected, made.alive))
