"""Distributions of actions, and the surrogates: held to PyTorch's own, and to expectations over all trajectories.

Legend: `...` any axes, L time steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from dmaml_pl import ANIL, CategoricalMLP, ContextMLP, GaussianMLP, GaussianPolicy, PolicyGradient
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.policies.distributions import Categorical, Gaussian
from dmaml_pl.policies.objective import Surrogate


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gaussian() -> tuple[Gaussian, torch.distributions.Distribution]:
    mean, log_std = torch.randn(3, 4, 2), 0.3 * torch.randn(2)
    return Gaussian(mean, log_std), torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)


def categorical() -> tuple[Categorical, torch.distributions.Distribution]:
    logits = torch.randn(3, 4, 5)
    return Categorical(logits), torch.distributions.Categorical(logits=logits)


def test_a_gaussian_has_the_log_probability_entropy_and_kl_of_pytorchs() -> None:
    (one, reference), (other, other_reference) = gaussian(), gaussian()
    action = torch.randn(3, 4, 2)
    torch.testing.assert_close(one.log_prob(action), reference.log_prob(action))
    torch.testing.assert_close(one.entropy(), reference.entropy())
    torch.testing.assert_close(one.kl_to(other), torch.distributions.kl_divergence(reference, other_reference))


def test_a_categorical_has_the_log_probability_entropy_and_kl_of_pytorchs() -> None:
    (one, reference), (other, other_reference) = categorical(), categorical()
    action = torch.randint(5, (3, 4))
    torch.testing.assert_close(one.log_prob(action.unsqueeze(-1)), reference.log_prob(action))
    torch.testing.assert_close(one.entropy(), reference.entropy())
    torch.testing.assert_close(one.kl_to(other), torch.distributions.kl_divergence(reference, other_reference))


def test_actions_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    noise = torch.randn(20_000, 1)
    actions = Categorical(logits.expand(20_000, 4)).sample(noise)
    found = torch.bincount(actions.long().flatten(), minlength=4) / 20_000
    torch.testing.assert_close(found, logits.softmax(0), atol=0.01, rtol=0)
    drawn = Gaussian(torch.tensor([1.0]).expand(20_000, 1), torch.tensor([math.log(0.5)])).sample(noise)
    assert abs(float(drawn.mean()) - 1.0) < 0.02
    assert abs(float(drawn.std()) - 0.5) < 0.02


def test_a_policy_gives_the_same_for_any_axes_of_observations_also_on_many_tasks_at_once() -> None:
    for policy in (GaussianMLP(3, 2, [4]), CategoricalMLP(3, 2, [4]), GaussianPolicy(ContextMLP(3, [4], 2), 2)):
        x = torch.randn(5, 4, 6, 3)
        whole, flat = policy(x)[0], policy(x.flatten(0, 2))[0]
        torch.testing.assert_close(whole.flatten(0, 2), flat)
        torch.testing.assert_close(vmap(policy)(x)[0], whole)


def test_anil_adapts_the_last_layer_of_a_policy_and_maml_its_standard_deviations_too() -> None:
    policy = GaussianMLP(3, 2, [4])
    assert MetaLearner(policy, ANIL()).algorithm.adapts == ["network.2.weight", "network.2.bias"]


def test_standard_deviations_do_not_fall_below_the_least() -> None:
    policy = GaussianMLP(1, 1, [2], init_std=0.5, min_std=0.1)
    with torch.no_grad():
        policy.log_std.fill_(-100.0)
    assert float(policy(torch.zeros(1, 1)).log_std.detach()) == pytest.approx(math.log(0.1))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"observations": 0}, "model.network.observations is 0"),
        ({"actions": 0}, "model.network.actions is 0"),
        ({"init_std": 0.0}, "model.network.init_std is 0.0"),
        ({"activation": "elu"}, "model.network.activation"),
        ({"hidden": [0]}, r"model.network.hidden\[0\] is 0"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_by_the_setting(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        GaussianMLP(**{"observations": 2, "actions": 2} | settings)


@pytest.mark.parametrize("settings", [{"surrogate": "reinforce"}, {"clip": 0.0}, {"inner_penalty": -1.0}])
def test_an_objective_that_cannot_be_is_refused_by_the_setting(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"model.objective.{next(iter(settings))}"):
        PolicyGradient(**settings)


def test_the_clipped_loss_is_that_of_ppo() -> None:
    clip, policy = 0.2, gaussian()[0]
    old = Gaussian(policy.mean + 0.5 * torch.randn_like(policy.mean), policy.log_std)
    y = targets(old, action=old.sample(torch.randn_like(old.mean)))
    ratio = (policy.log_prob(y["action"]) - old.log_prob(y["action"])).exp()
    bounded = torch.where(
        y["advantage"] > 0, ratio.clamp(max=1 + clip) * y["advantage"], ratio.clamp(min=1 - clip) * y["advantage"]
    )
    assert (bounded - ratio * y["advantage"]).abs().max() > 0.01
    torch.testing.assert_close(PolicyGradient(clip=clip).query_loss(policy, y), -(bounded * y["weight"]).sum())


def targets(old: Gaussian | Categorical, action: Tensor) -> dict[str, Tensor]:
    shape = action.shape[:-1]
    return {
        "action": action,
        "advantage": torch.randn(shape),
        "weight": torch.full(shape, 1 / math.prod(shape)),
        "reward": torch.randn(shape),
        **{f"old_{name}": tensor for name, tensor in old.parameters().items()},
    }


@pytest.mark.parametrize("surrogate", ["likelihood_ratio", "log_prob", "dice"])
def test_all_surrogates_have_the_gradient_of_the_log_probability_times_the_advantage(surrogate: Surrogate) -> None:
    policy = gaussian()[0]
    mean = policy.mean.clone().requires_grad_()
    y = targets(policy, action=policy.sample(torch.randn_like(policy.mean)))
    now = Gaussian(mean, policy.log_std)
    (found,) = torch.autograd.grad(PolicyGradient(surrogate).support_loss(now, y), mean)
    (expected,) = torch.autograd.grad(-(now.log_prob(y["action"]) * y["advantage"] * y["weight"]).sum(), mean)
    torch.testing.assert_close(found, expected)


# -- all trajectories of a tabular MDP: two states, two actions, three steps -----------------------------------------

LENGTH = 3


class Enumerated:
    """Every trajectory as a rollout, with the probability that the environment lends to it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(2, 2, generator=generator)
        self.rewards = torch.randn(2, 2, generator=generator)
        self.to_state_1 = torch.rand(2, 2, generator=generator)
        pairs = itertools.product(itertools.product((0, 1), repeat=LENGTH), itertools.product((0, 1), repeat=LENGTH))
        found = [(states, actions) for states, actions in pairs if states[0] == 0]
        self.states = torch.tensor([states for states, _ in found])
        self.actions = torch.tensor([actions for _, actions in found])
        moved = self.to_state_1[self.states[:, :-1], self.actions[:, :-1]]
        self.by_environment = torch.where(self.states[:, 1:] == 1, moved, 1 - moved).prod(-1)
        self.reward = self.rewards[self.states, self.actions]
        self.to_go = self.reward.flip(-1).cumsum(-1).flip(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        log_prob = Categorical(logits[self.states]).log_prob(self.actions.unsqueeze(-1))
        return self.by_environment * log_prob.sum(-1).exp()

    def expected_return(self, logits: Tensor) -> Tensor:
        return (self.probabilities(logits) * self.reward.sum(-1)).sum()

    def expected_surrogate(self, surrogate: Surrogate, logits: Tensor) -> Tensor:
        """What is differentiated of samples, on average: the probabilities with which they are drawn stay."""
        likely, objective = self.probabilities(self.logits), PolicyGradient(surrogate)
        total = torch.zeros(())
        for number in range(len(self.states)):
            output = Categorical(logits[self.states[number]].unsqueeze(0))
            y = {
                "action": self.actions[number].view(1, LENGTH, 1),
                "advantage": self.to_go[number].unsqueeze(0),
                "weight": torch.ones(1, LENGTH),
                "old_logits": self.logits[self.states[number]].unsqueeze(0),
            }
            total = total - likely[number] * objective.support_loss(output, y)
        return total


@pytest.mark.parametrize(
    ("surrogate", "least", "most"), [("dice", 0.0, 1e-6), ("likelihood_ratio", 0.01, 0.1), ("log_prob", 1.0, 100.0)]
)
def test_on_all_trajectories_dice_has_the_true_hessian_lvc_nearly_and_log_prob_a_wrong_one(
    surrogate: Surrogate, least: float, most: float
) -> None:
    mdp = Enumerated()
    slope, bend = slope_and_bend(mdp.expected_return, mdp)
    found_slope, found_bend = slope_and_bend(lambda logits: mdp.expected_surrogate(surrogate, logits), mdp)
    torch.testing.assert_close(found_slope, slope)
    error = float((found_bend - bend).norm() / bend.norm())
    assert least <= error <= most


def slope_and_bend(of: Callable[[Tensor], Tensor], mdp: Enumerated) -> tuple[Tensor, Tensor]:
    """The first and second derivative at the policy that acts."""
    logits = mdp.logits.clone().requires_grad_()
    (slope,) = torch.autograd.grad(of(logits), logits, create_graph=True)
    return slope.detach(), torch.stack(
        [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in slope.flatten()]
    )
