"""MAML with a trust region on 2D navigation, by learn2learn and cherry, the library of its authors for RL.

It computes what learn2learn's own example does (examples/rl/maml_trpo.py), by the same parts of both libraries:
environments in processes (`AsyncVectorEnv`), `Runner`, `LinearValue`, `generalized_advantage`, `clone_module`,
`maml_update`, and `trpo`'s loss, Hessian-vector product and conjugate gradients. The example itself does not start with
the versions of today. What is other here, and does not make it slower:

- cherry's recorder of videos, which imports what gym 0.26 no longer has, is left out;
- environments are not seeded by `AsyncVectorEnv.seed`, which gym 0.26 took away;
- the limit of steps is the environment's own, as gym's wrapper refuses environments with four values a step;
- the line search makes one try, the least that it can, and the policy stays as it is;
- the baseline has its own default ridge (the example gives it the number of actions), and is not asked for the values
  of the states that follow; the policy begins as PyTorch's layers do.

As there, tasks are looped over, all share one baseline, which is fitted anew in each surrogate, the logarithm of the
probability is the mean over the dimensions of the action, and every surrogate is recorded for differentiation.

Legend: B rollouts of a task.
"""

from __future__ import annotations

import copy
import importlib
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.speed.peers import UnavailableError
from dmaml_pl import _learn2learn


class Settings(NamedTuple):
    """Of the inner loop and the step.

    Attributes:
        rollouts: B.
        horizon: steps of an episode at most.
        processes: that step the environments.
        hidden: widths of the policy's layers.
        inner_lr: step size of the inner loop.
        discount: of rewards.
        gae_lambda: of the advantages.
        max_kl: of a step.
    """

    rollouts: int
    horizon: int
    processes: int
    hidden: tuple[int, ...] = (100, 100)
    inner_lr: float = 0.1
    discount: float = 0.99
    gae_lambda: float = 1.0
    max_kl: float = 0.01


class Sampled(NamedTuple):
    """Of one task.

    Attributes:
        before: episodes of the meta-policy.
        after: episodes of the adapted policy.
        adapted: that policy.
    """

    before: Any
    after: Any
    adapted: Any

    @property
    def steps(self) -> int:
        """Of the environments."""
        return len(self.before) + len(self.after)


class NormalPolicy(nn.Module):
    """Normally distributed actions with standard deviations that do not depend on the state."""

    def __init__(self, states: int, actions: int, hidden: Iterable[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(states, width), nn.ReLU()]
            states = width
        self.mean = nn.Sequential(*layers, nn.Linear(states, actions))
        self.log_std = nn.Parameter(torch.zeros(actions))

    def density(self, states: Tensor) -> Normal:
        """Of the actions."""
        return Normal(self.mean(states), self.log_std.clamp(min=-13.8).exp())

    def forward(self, states: Tensor) -> Tensor:
        """Actions."""
        action: Tensor = self.density(states).sample()
        return action


class Reference:
    """Samples and steps, one task after another.

    Args:
        settings: of both.

    Raises:
        UnavailableError: cherry is not installed.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._learn2learn: Any = _learn2learn.load()
        self._cherry = _load_cherry()
        kind = particles(settings.horizon)
        scaled = self._cherry.envs.ActionSpaceScaler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # gym's, of the precision of a limit
            self._processes = self._learn2learn.gym.AsyncVectorEnv([lambda: scaled(kind())] * settings.processes)
        self._environments = self._cherry.envs.Torch(self._processes)
        self._baseline = self._cherry.models.robotics.LinearValue(self._environments.state_size)
        self.policy = NormalPolicy(self._environments.state_size, self._environments.action_size, settings.hidden)

    def clock(self) -> float:
        """Processor seconds of this process and those of the environments."""
        theirs = (psutil.Process(worker.pid).cpu_times() for worker in self._processes.workers)
        return time.process_time() + sum(times.user + times.system for times in theirs)

    def sample(self, tasks: int) -> list[Sampled]:
        """Episodes before and after the step of adaptation to each of so many tasks."""
        found = []
        for goal in self._environments.sample_tasks(tasks):
            self._environments.set_task(goal)
            self._environments.reset()
            runner = self._cherry.envs.Runner(self._environments)
            policy: Any = copy.deepcopy(self.policy)
            before = runner.run(policy, episodes=self.settings.rollouts)
            policy = self._adapted(policy, before, second_order=False)
            found.append(Sampled(before, runner.run(policy, episodes=self.settings.rollouts), policy))
        return found

    def step(self, sampled: list[Sampled]) -> Tensor:
        """The direction of the trust region's step, and one try of it; what the policy would move by, as a vector."""
        trpo, parameters = self._cherry.algorithms.trpo, list(self.policy.parameters())
        loss, kl = self._surrogate(sampled, self.policy)
        slope = parameters_to_vector(torch.autograd.grad(loss, parameters, retain_graph=True)).detach()
        product: Callable[[Tensor], Tensor] = trpo.hessian_vector_product(kl, parameters)
        direction = trpo.conjugate_gradient(product, slope)
        longest: Tensor = direction / torch.sqrt(direction @ product(direction) / (2 * self.settings.max_kl))
        tried = copy.deepcopy(self.policy)
        vector_to_parameters(parameters_to_vector(parameters).detach() - longest, tried.parameters())
        self._surrogate(sampled, tried)
        return longest

    def close(self) -> None:
        """End the processes."""
        self._processes.close()

    def _surrogate(self, sampled: list[Sampled], policy: nn.Module) -> tuple[Tensor, Tensor]:
        """Mean loss and KL after adaptation from a policy."""
        losses, kls = [], []
        for each in sampled:
            new: Any = self._adapted(self._learn2learn.clone_module(policy), each.before, second_order=True)
            states, actions = each.after.state(), each.after.action()
            old_density, density = each.adapted.density(states), new.density(states)
            kls.append(kl_divergence(density, old_density).mean())
            log_prob, old_log_prob = (of.log_prob(actions).mean(1, keepdim=True) for of in (density, old_density))
            losses.append(
                self._cherry.algorithms.trpo.policy_loss(log_prob, old_log_prob.detach(), self._advantages(each.after))
            )
        return torch.stack(losses).mean(), torch.stack(kls).mean()

    def _adapted(self, policy: Any, episodes: Any, *, second_order: bool) -> nn.Module:
        log_prob = policy.density(episodes.state()).log_prob(episodes.action()).mean(1, keepdim=True)
        loss = self._cherry.algorithms.a2c.policy_loss(log_prob, self._advantages(episodes))
        gradients = torch.autograd.grad(loss, list(policy.parameters()), create_graph=second_order)
        adapted: nn.Module = self._learn2learn.algorithms.maml.maml_update(policy, self.settings.inner_lr, gradients)
        return adapted

    def _advantages(self, episodes: Any) -> Tensor:
        """Normalised, by the baseline that is fitted to the same episodes."""
        gamma, states, rewards, dones = self.settings.discount, episodes.state(), episodes.reward(), episodes.done()
        self._baseline.fit(states, self._cherry.td.discount(gamma, rewards, dones))
        advantages = self._cherry.pg.generalized_advantage(
            gamma=gamma,
            tau=self.settings.gae_lambda,
            rewards=rewards,
            dones=dones,
            values=self._baseline(states),
            next_value=torch.zeros(1),
        )
        normalized: Tensor = self._cherry.normalize(advantages).detach()
        return normalized


def particles(horizon: int) -> type[Any]:
    """learn2learn's own 2D navigation, which ends after so many steps."""
    _learn2learn.load()
    from learn2learn.gym.envs.particles.particles_2d import Particles2DEnv  # noqa: PLC0415 - it imports gym

    class Limited(Particles2DEnv):  # type: ignore[misc]  # it has no types
        """With a limit of steps."""

        def reset(self, *_: Any, **__: Any) -> Any:
            """Begin an episode."""
            self.number = 0
            return super().reset()

        def step(self, action: Any) -> tuple[Any, float, bool, dict[str, Any]]:
            """Walk."""
            self.number += 1
            seen, reward, done, _ = super().step(action)
            return seen, reward, bool(done) or self.number >= horizon, {}

    return Limited


def _load_cherry() -> ModuleType:
    without = ModuleType("cherry.wrappers.recorder_wrapper")
    without.Recorder = object  # type: ignore[attr-defined]  # a module that is made here
    sys.modules[without.__name__] = without
    try:
        return importlib.import_module("cherry")  # installed by `make benchmark` alone
    except ImportError as error:
        raise UnavailableError(f"needs {error.name}, which is not installed: make benchmark installs it") from error
