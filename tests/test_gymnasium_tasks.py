"""A user's own `gymnasium.Env`, from a file outside the package: sampled from, seeded, and each mistake told before."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from torch import Tensor

from data_modules.gymnasium_tasks import GymnasiumTasks
from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.policies.distributions import Categorical, Gaussian
from dmaml_pl.rollouts.sampling import Rollouts, sample_rollouts

SOURCE = '''
import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary


class Walk(gym.Env):
    """A walk on a line to a goal that is not seen; it ends where |x| > far."""

    observation_space = Box(-np.inf, np.inf, (2,))
    action_space = Box(-1.0, 1.0, (1,))

    def __init__(self, far=1e9, noise=0.1):
        self.far, self.noise, self.taken = far, noise, []

    def sample_task(self, generator):
        return {"goal": float(generator.uniform(-1, 1))}

    def set_task(self, task):
        self.goal = float(task["goal"])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.taken = self.noise * self.np_random.standard_normal(), []
        return self.seen(), {}

    def seen(self):
        return np.array([self.x, self.np_random.standard_normal()])

    def step(self, action):
        assert self.action_space.contains(action), action
        self.taken.append(action)
        assert abs(self.x) <= self.far, "stepped after its end"
        self.x += 0.1 * float(np.asarray(action).reshape(-1)[0])
        return self.seen(), -abs(self.x - self.goal), abs(self.x) > self.far, False, {}


class Choose(Walk):
    action_space = Discrete(3, start=-1)


class Grid(Walk):
    action_space = Box(np.array([[-1, -2], [-3, -4]], np.float32), np.array([[1, 2], [3, 4]], np.float32))


class Limited(Walk):
    """Has a limit of steps of its own."""

    def reset(self, seed=None, options=None):
        self.left = 5
        return super().reset(seed=seed)

    def step(self, action):
        self.left -= 1
        assert self.left >= 0, "stepped after its limit"
        seen, reward, ended, _, told = super().step(action)
        return seen, reward, ended, self.left == 0, told


class Unseeded(Walk):
    def seen(self):
        return np.array([self.x, np.random.standard_normal()])


class Rewarding(Walk):
    def __init__(self, reward):
        super().__init__()
        self.reward = reward

    def step(self, action):
        seen, _, ended, limited, told = super().step(action)
        return seen, float("nan") if self.reward == "nan" and len(self.taken) > 12 else 0.0, ended, limited, told


class Failing(Walk):
    def step(self, action):
        if len(self.taken) > 12:
            raise ValueError("the motor is hot")
        return super().step(action)


class NoSetter(Walk):
    set_task = None


class ListTask(Walk):
    def sample_task(self, generator):
        return [1.0]


class OddTask(Walk):
    def sample_task(self, generator):
        return {"gaol": 1.0}


class OldStep(Walk):
    def step(self, action):
        return super().step(action)[:2] + (False, {})


class OldReset(Walk):
    def reset(self, seed=None, options=None):
        return super().reset(seed=seed)[0]


class SeedlessReset(Walk):
    def reset(self):
        return super().reset()


class Pictures(Walk):
    observation_space = Box(0, 255, (8, 8, 3), np.uint8)


class Named(Walk):
    observation_space = Dict({"x": Box(-1, 1, (1,))})


class Buttons(Walk):
    action_space = MultiBinary(3)


class WrongShape(Walk):
    observation_space = Box(-np.inf, np.inf, (5,))


class RewardArray(Walk):
    def step(self, action):
        seen, reward, *others = super().step(action)
        return seen, np.array([reward]), *others


def make_walk(far):
    return gym.wrappers.TimeLimit(Walk(far), 1000)


def make_nothing():
    return 3


gym.register("OwnWalk-v0", entry_point="own_walks:Walk")
'''


@pytest.fixture(autouse=True, scope="module")
def own_walks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A file of the user's, found as Python finds modules in the working folder."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_walks.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
    gymnasium.registry.pop("OwnWalk-v0", None)


@pytest.fixture
def tasks() -> Iterator[Callable[..., GymnasiumTasks]]:
    made = []

    def make(environment: str, **settings: Any) -> GymnasiumTasks:
        made.append(GymnasiumTasks(environment=environment, **settings))
        return made[-1]

    yield make
    for data in made:
        data.teardown("fit")


def lazy(data: GymnasiumTasks) -> Any:
    """A policy that follows the first observation, or chooses."""
    width = data.environments.actions

    def policy(seen: Tensor) -> Any:
        first = seen[..., :1].expand(*seen.shape[:-1], width)
        return Categorical(first * torch.arange(width)) if data.environments.discrete else Gaussian(first, first * 0)

    return policy


def rollouts(data: GymnasiumTasks, seeds: tuple[int, ...] = (1, 2, 3), horizon: int = 20) -> Rollouts:
    chosen = [data.environment_task(seed) for seed in seeds]
    device = torch.device("cpu")
    return sample_rollouts(data.environments, lazy(data), chosen, seeds, rollouts=4, horizon=horizon, device=device)


def same(first: Rollouts, second: Rollouts) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


@pytest.mark.parametrize("environment", ["own_walks.Walk", "own_walks:OwnWalk-v0", "own_walks.make_walk"])
def test_a_class_a_function_and_an_id_are_sampled_from(environment: str, tasks: Any) -> None:
    arguments = {"far": 1e9} if "make" in environment else {}
    data = tasks(environment, environment_args=arguments)
    data.setup("fit")
    made = rollouts(data)
    assert made.observations.shape == (3, 4, 20, 2)
    assert made.actions.shape == (3, 4, 20, 1)
    goals = torch.tensor([data.environment_task(seed)["goal"] for seed in (1, 2, 3)])
    there = made.observations[:, :, 1:, 0] - goals.view(3, 1, 1)
    torch.testing.assert_close(made.rewards[:, :, :-1], -there.abs())


def test_rollouts_follow_from_their_seeds_whatever_is_beside_them(tasks: Any) -> None:
    data = tasks("own_walks.Walk")
    together = rollouts(data)
    assert same(together, rollouts(data))
    alone = rollouts(data, (2,))
    assert torch.equal(alone.observations[0], together.observations[1])
    assert torch.equal(alone.rewards[0], together.rewards[1])
    assert len(together.observations[:, :, 0].unique(dim=0)) == 3


def test_arguments_reach_the_environment_and_ended_episodes_are_not_stepped(tasks: Any) -> None:
    made = rollouts(tasks("own_walks.Walk", environment_args={"far": 0.3, "noise": 0.0}), horizon=40)
    ended = made.alive[:, :, -1] == 0
    assert ended.any()
    assert bool((made.alive.diff(dim=2) <= 0).all())
    assert bool((made.rewards[made.alive == 0] == 0).all())


def test_an_episode_ends_at_the_environments_own_limit(tasks: Any) -> None:
    assert rollouts(tasks("own_walks.Limited")).alive.sum(2).unique().tolist() == [5]


def test_actions_for_a_box_are_clipped_to_it_and_have_its_shape(tasks: Any) -> None:
    data = tasks("own_walks.Grid")
    environments = data.environments
    state, _ = environments.reset([{"goal": 0.0}], 1, [torch.Generator().manual_seed(0)])
    environments.step(state, torch.tensor([[[5.0, -5.0, 0.5, -0.5]]]))
    taken = environments._here.environments[0].unwrapped.taken
    assert taken[0].tolist() == [[1.0, -2.0], [0.5, -0.5]]


def test_discrete_actions_are_chosen_among_and_begin_where_the_space_does(tasks: Any) -> None:
    data = tasks("own_walks.Choose")
    assert (data.environments.actions, data.environments.discrete) == (3, True)
    made = rollouts(data)
    assert set(made.actions.unique().tolist()) == {0.0, 1.0, 2.0}
    taken = data.environments._here.environments[0].unwrapped.taken
    assert taken == (made.actions[0, 0, :, 0].long() - 1).tolist()


def test_processes_give_the_same_bits_also_more_than_there_are_environments(tasks: Any) -> None:
    here, there = tasks("own_walks.Walk"), tasks("own_walks.Walk", processes=2)
    assert same(rollouts(here), rollouts(there))
    first, _ = there.environments.reset([{"goal": 0.5}], 1, [torch.Generator().manual_seed(0)])
    assert there.environments.step(first, torch.zeros(1, 1, 1)).reward.shape == (1, 1)


def test_an_exception_in_another_process_is_told_and_so_is_its_end(
    tasks: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    failing = tasks("own_walks.Failing", processes=1)
    with pytest.raises(DataError, match=r"An environment of data\.environment failed: ValueError: the motor is hot"):
        rollouts(failing)
    assert "Traceback" in capfd.readouterr().err
    group = failing.environments._groups[0]
    group._process.kill()
    with pytest.raises(DataError, match=r"A process of data.processes has ended \(exit code -9\)"):
        rollouts(failing)


def test_a_state_that_is_past_cannot_be_stepped(tasks: Any) -> None:
    environments = tasks("own_walks.Walk").environments
    state, _ = environments.reset([{"goal": 0.0}], 2, [torch.Generator().manual_seed(0)])
    environments.step(state, torch.zeros(1, 2, 1))
    with pytest.raises(RuntimeError, match="hold their state"):
        environments.step(state, torch.zeros(1, 2, 1))


def test_a_reward_that_is_not_finite_is_told_with_its_task(tasks: Any) -> None:
    data = tasks("own_walks.Rewarding", environment_args={"reward": "nan"})
    with pytest.raises(DataError, match=r"gave a reward that is not finite, in step 12 .*'goal'"):
        rollouts(data)


REFUSED = {
    "own_walks.Nothing": "data.environment cannot be own_walks.Nothing: module 'own_walks' has no attribute 'Nothing'",
    "no_such_walks.Walk": "data.environment cannot be no_such_walks.Walk: No module named 'no_such_walks'",
    "Nowhere-v1": "data.environment cannot be Nowhere-v1: Environment `Nowhere` doesn't exist",
    "HalfCheetah-v2": "data.environment cannot be HalfCheetah-v2: The mujoco v2 and v3 based environments",
    "Pendulum-v1": "data.sample_task is sample_task, but Pendulum-v1 has no such method: set it to the name",
    "own_walks.NoSetter": "data.set_task is set_task, but own_walks.NoSetter has no such method: set it to the name",
    "own_walks.make_nothing": "which makes a builtins.int, but must make a gymnasium.Env",
    "own_walks.ListTask": r"gave the task \[1.0\], but data.sample_task must name a method that gives a dict",
    "own_walks.OddTask": "own_walks.OddTask does not take the task {'gaol': 1.0}: KeyError: 'goal'",
    "own_walks.OldStep": r"whose step gives 4 values, but must give \(observation, reward, terminated, trunc",
    "own_walks.OldReset": r"whose reset gives a ndarray, but must give \(observation, info\), as gymnasium",
    "own_walks.SeedlessReset": r"whose reset takes no seed, but must take it: reset\(seed=..., options=...\)",
    "own_walks.RewardArray": r"whose step gives a reward of the shape \(1,\), but must give a number",
    "own_walks.Pictures": "but they must be a Box of one axis: wrap it in gymnasium.wrappers.FlattenObservation",
    "own_walks.Named": "but they must be a Box of one axis: wrap it in gymnasium.wrappers.FlattenObservation",
    "own_walks.Buttons": r"whose actions are MultiBinary\(3\), but they must be a Box or Discrete",
    "own_walks.WrongShape": r"observation of the shape \(2,\), but its observation_space says \(5,\)",
    "own_walks.Unseeded": "which does not repeat itself: reset.* must lead to the same observations and rewards",
    "own_walks.make_walk": r"cannot be own_walks.make_walk: make_walk\(\) missing 1 required positional argument",
}


@pytest.mark.filterwarnings("ignore:.*is out of date")  # gymnasium of ids -v2, before it refuses them
@pytest.mark.parametrize(("environment", "message"), REFUSED.items())
def test_what_cannot_be_trained_on_is_refused_before_the_work_in_one_line(
    environment: str, message: str, tasks: Any
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        tasks(environment).setup("fit")
    assert "\n" not in str(error.value)
    assert environment in str(error.value)


def test_arguments_that_there_are_not_are_refused_with_their_names(tasks: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"with data\.environment_args {'fear': 1}: .* unexpected keyword argument 'fear'"
    ):
        tasks("own_walks.Walk", environment_args={"fear": 1}).setup("fit")


def test_fewer_processes_than_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.processes is -1, but must be 0 or greater"):
        GymnasiumTasks(environment="own_walks.Walk", processes=-1)


def test_the_documented_example_is_sampled_from(
    tasks: Any, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (repository / "docs" / "data.md").read_text(), re.DOTALL)
    (tmp_path / "swing.py").write_text(next(block for block in blocks if "class Swing(" in block))
    monkeypatch.syspath_prepend(str(tmp_path))
    made = rollouts(tasks("swing.Swing"))
    assert made.observations.shape == (3, 4, 20, 3)
    assert made.rewards.max() < 0
