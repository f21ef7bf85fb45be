"""Rollouts and advantages: held to what is written out step by step, and to the seeds that they follow from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_modules import Navigation2D
from data_modules.navigation2d import PointEnvironments
from dmaml_pl import CategoricalMLP, GaussianMLP
from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.policies.distributions import Gaussian
from dmaml_pl.rollouts.advantages import (
    discounted_sums,
    explained_variance,
    generalized_advantages,
    linear_baseline,
    normalized,
)
from dmaml_pl.rollouts.environments import Environments, Step, Task
from dmaml_pl.rollouts.sampling import Rollouts, sample_rollouts, weigh

CPU = torch.device("cpu")


def towards(x: Tensor) -> Gaussian:
    """A policy that walks to the right, and looks where it is."""
    return Gaussian(0.3 - 0.1 * x, torch.full_like(x, -1.0))


def sampled(
    tasks: list[Task],
    seeds: list[int],
    policy: Callable[[Tensor], Any] = towards,
    environments: Environments | None = None,
    **settings: Any,
) -> Rollouts:
    given: dict[str, Any] = {"rollouts": 3, "horizon": 12, "device": CPU} | settings
    return sample_rollouts(environments or PointEnvironments(), policy, tasks, seeds, **given)


GOALS: list[Task] = [{"goal": [0.3, 0.0]}, {"goal": [-0.2, 0.4]}, {"goal": [0.1, 0.05]}]


def test_a_tasks_rollouts_are_the_same_to_the_bit_alone_and_beside_others() -> None:
    together = sampled(GOALS, [1, 2, 3])
    for number, goal in enumerate(GOALS):
        alone = sampled([goal], [number + 1])
        for mine, all_of_them in zip(alone[:4], together[:4], strict=True):
            assert torch.equal(mine[0], all_of_them[number])


def test_rollouts_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = sampled(GOALS, [1, 2, 3])
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(first.actions, sampled(GOALS, [1, 2, 3]).actions)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first.actions, sampled(GOALS, [4, 5, 6]).actions)


def test_an_episode_that_ends_counts_no_further_step_and_its_last_reward_does() -> None:
    made = sampled([{"goal": [0.1, 0.0]}], [0], lambda x: Gaussian(torch.tensor([1.0, 0.0]).expand_as(x), x * 0 - 20))
    assert made.alive[0, :, 0].tolist() == [1.0] * 3
    assert made.alive[0, :, 1:].sum() == 0
    assert made.rewards.shape == (1, 3, 12)
    assert float(made.rewards[0, :, 0].abs().max()) < 1e-6
    assert made.steps == 3
    weighed = weigh(made, 0.99, 1.0).samples
    assert isinstance(weighed.y, dict)
    assert weighed.y["weight"].sum() == pytest.approx(1.0)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weighed.tensors())


def test_what_the_policy_was_is_kept_beside_each_action() -> None:
    made = sampled(GOALS, [1, 2, 3])
    again = towards(made.observations)
    assert isinstance(made.acting, Gaussian)
    torch.testing.assert_close(made.acting.mean, again.mean)
    torch.testing.assert_close(made.acting.log_std, again.log_std)


def test_sums_and_advantages_are_those_of_the_loop_written_out() -> None:
    torch.manual_seed(0)
    rewards, expected = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    alive = (torch.arange(5) < torch.tensor([[5, 3, 1], [4, 5, 2]])[..., None]).float()
    rewards *= alive
    found = generalized_advantages(rewards, expected, alive, 0.9, 0.8)
    sums = discounted_sums(rewards, 0.9)
    for task, rollout in np.ndindex(2, 3):
        length = int(alive[task, rollout].sum())
        following_sum = advantage = following = 0.0
        for step in reversed(range(5)):
            if step >= length:
                assert float(found[task, rollout, step]) == 0.0
                continue
            value = float(expected[task, rollout, step])
            reward = float(rewards[task, rollout, step])
            advantage = reward + 0.9 * following - value + 0.9 * 0.8 * advantage
            following, following_sum = value, reward + 0.9 * following_sum
            assert float(found[task, rollout, step]) == pytest.approx(advantage, abs=1e-5)
            assert float(sums[task, rollout, step]) == pytest.approx(following_sum, abs=1e-5)


def test_the_baseline_is_the_least_squares_fit_of_each_tasks_own_returns() -> None:
    torch.manual_seed(0)
    observations, alive = torch.randn(2, 4, 6, 3), torch.ones(2, 4, 6)
    alive[1, 2, 3:] = 0
    returns = torch.randn(2, 4, 6) * alive
    found = linear_baseline(observations, returns, alive)
    for task in range(2):
        rows, wanted, places = [], [], []
        for rollout, step in np.ndindex(4, 6):
            if alive[task, rollout, step]:
                seen, time = observations[task, rollout, step].double().numpy(), step / 100
                rows.append([*seen, *seen**2, time, time**2, time**3, 1.0])
                wanted.append(float(returns[task, rollout, step]))
                places.append((task, rollout, step))
        matrix = np.array(rows)
        solved = np.linalg.solve(matrix.T @ matrix + 1e-5 * np.eye(matrix.shape[1]), matrix.T @ np.array(wanted))
        for place, value in zip(places, matrix @ solved, strict=True):
            assert float(found[place]) == pytest.approx(value, abs=1e-4)


def test_normalized_advantages_have_mean_zero_and_deviation_one_among_the_steps_that_count() -> None:
    torch.manual_seed(0)
    alive = (torch.rand(2, 4, 6) > 0.3).float()
    found = normalized(torch.randn(2, 4, 6) * 3 + 1, alive)
    for task in range(2):
        counted = found[task][alive[task] > 0]
        assert float(counted.mean()) == pytest.approx(0, abs=1e-5)
        assert float(counted.std(unbiased=False)) == pytest.approx(1, abs=1e-4)
    assert float(found[alive == 0].abs().sum()) == 0


def test_explained_variance_is_one_for_what_was_foreseen_and_zero_for_the_mean() -> None:
    torch.manual_seed(0)
    returns, alive = torch.randn(2, 4, 6), torch.ones(2, 4, 6)
    torch.testing.assert_close(explained_variance(returns, returns, alive), torch.ones(2))
    mean = returns.mean((1, 2), keepdim=True).expand_as(returns)
    torch.testing.assert_close(explained_variance(returns, mean, alive), torch.zeros(2), atol=1e-6, rtol=0)


class Broken(PointEnvironments):
    """Gives a reward that is not finite in step 2 of rollout 1 of the second task."""

    def step(self, state: Any, action: Tensor) -> Step:
        made = super().step(state, action)
        self.count = getattr(self, "count", -1) + 1
        if self.count == 2:
            made.reward[1, 1] = torch.nan
        return made


def test_a_reward_that_is_not_finite_is_told_with_its_place() -> None:
    with pytest.raises(DataError, match=r"a reward that is not finite, in step 2 of rollout 1 of the task .*-0.2, 0.4"):
        sampled(GOALS, [1, 2, 3], environments=Broken())


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (torch.nn.Linear(2, 2), "model.network gives a Tensor, but environments need a policy"),
        (CategoricalMLP(2, 2), "gives a Categorical distribution, but an action is 2 numbers: .* dmaml_pl.GaussianMLP"),
        (GaussianMLP(2, 3), "model.network.actions is 3, but an action is 2 numbers: set it to 2"),
    ],
)
def test_a_policy_that_does_not_fit_the_actions_is_refused_by_the_setting(policy: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sampled(GOALS, [1, 2, 3], policy)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rollouts": 0}, "data.rollouts is 0"),
        ({"horizon": 0}, "data.horizon is 0"),
        ({"discount": 0.0}, "data.discount is 0.0"),
        ({"gae_lambda": 1.5}, "data.gae_lambda is 1.5"),
        ({"rollouts": 1, "horizon": 1}, "at least two steps"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Navigation2D(**settings)


def test_who_knows_the_goal_walks_straight_and_as_fast_as_it_goes() -> None:
    best = PointEnvironments().best_return([{"goal": [0.25, 0.0]}, {"goal": [0.0, -0.05]}], 100)
    assert best.tolist() == pytest.approx([-(0.15 + 0.05), 0.0], abs=1e-6)


def test_goals_are_uniform_in_the_square_and_training_and_evaluation_have_others() -> None:
    data = Navigation2D(half_width=2.0, seed=3)
    goals = np.array([data.environment_task(seed)["goal"] for seed in range(500)])
    assert np.abs(goals).max() <= 2.0
    assert np.abs(goals.mean(0)).max() < 0.2
    assert np.abs(goals.std(0) - 4 / np.sqrt(12)).max() < 0.1
    assert data.evaluation_tasks("val", [0]).chosen != data.evaluation_tasks("test", [0]).chosen
