"""Environments of MuJoCo: gymnasium's physics, the same bits on any number of threads, and states that are values."""

from __future__ import annotations

import importlib
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from data_modules.ant import AntDirection, AntDirections
from data_modules.half_cheetah import (
    CheetahDirections,
    Cheetahs,
    CheetahVelocities,
    HalfCheetahDirection,
    HalfCheetahVelocity,
)
from dmaml_pl import MAML, GaussianMLP, MetaLearning, PolicyGradient
from dmaml_pl.engines.threads import limited_threads
from dmaml_pl.errors import ConfigError
from dmaml_pl.rollouts.environments import Task
from dmaml_pl.rollouts.mujoco import MODELS, MujocoEnvironments, MujocoState
from tests.workers import in_workers

pytest.importorskip("mujoco", reason="mujoco is not installed: pip install 'dmaml_pl[mujoco]'")

FORWARD, BACKWARD = {"direction": 1}, {"direction": -1}
FAMILIES: dict[str, Callable[[], MujocoEnvironments]] = {
    "HalfCheetah-v5": lambda: CheetahDirections(1.0),
    "Ant-v5": lambda: AntDirections(1.0),
}


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def actions(seed: int, rollouts: int, environments: MujocoEnvironments) -> Tensor:
    """Of one task, (B, A)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rollouts, environments.actions, generator=generator)


def walk(environments: MujocoEnvironments, tasks: list[Task], seeds: list[int], steps: int = 8) -> Tensor:
    """Everything seen and earned in a few steps, each task's actions from its own seed: (steps, T, B, O + 1)."""
    state, _ = environments.reset(tasks, 6, generators(seeds))
    made = []
    for number in range(steps):
        action = torch.stack([actions(1000 * seed + number, 6, environments) for seed in seeds])
        state, seen, reward, _ = environments.step(state, action)
        made.append(torch.cat([seen, reward.unsqueeze(-1)], dim=-1))
    environments.close()
    return torch.stack(made)


@pytest.fixture
def one_thread() -> Iterator[None]:
    with limited_threads(1):
        yield


@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_is_that_of_gymnasium(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where MuJoCo writes what it thinks of gymnasium's model
    monkeypatch.setitem(sys.modules, "imageio", ModuleType("imageio"))  # gymnasium's, for videos
    without = {"include_cfrc_ext_in_observation": False} if name == "Ant-v5" else {}
    theirs: Any = gymnasium.make(name, **without).unwrapped
    ours = FAMILIES[name]()
    state, seen = ours.reset([FORWARD], 5, generators([3]))
    action = actions(0, 5, ours)
    following, after, reward, _ = ours.step(state, action.unsqueeze(0))
    for number in range(5):
        nq = theirs.model.nq
        theirs.set_state(*np.split(state.physics[number, 1 : 1 + nq + theirs.model.nv], [nq]))
        assert theirs._get_obs() == pytest.approx(seen[0, number].numpy(), abs=1e-6)
        wanted, _, _, _, told = theirs.step(np.clip(action[number].numpy(), -1, 1))
        assert after[0, number].numpy() == pytest.approx(wanted, abs=1e-5, rel=1e-6)
        assert following.physics[number, 1] == pytest.approx(told["x_position"], abs=1e-6)
        effort = np.square(action[number].clamp(-1, 1).numpy()).sum()
        earned = (
            (0.05 + told["x_velocity"] - 0.005 * effort) if name == "Ant-v5" else told["x_velocity"] - 0.05 * effort
        )
        assert float(reward[0, number]) == pytest.approx(earned, abs=1e-2 if name == "Ant-v5" else 1e-4)
    theirs.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_two_threads_give_the_bits_of_one(name: str, two_threads: None) -> None:
    both = walk(FAMILIES[name](), [FORWARD, BACKWARD], [1, 2])
    torch.set_num_threads(1)
    assert torch.equal(both, walk(FAMILIES[name](), [FORWARD, BACKWARD], [1, 2]))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_task_alone_gives_the_bits_that_it_gives_beside_others(name: str, one_thread: None) -> None:
    tasks, seeds = [FORWARD, BACKWARD, FORWARD], [1, 2, 3]
    together = walk(FAMILIES[name](), tasks, seeds)
    alone = [walk(FAMILIES[name](), [task], [seed]) for task, seed in zip(tasks, seeds, strict=True)]
    assert torch.equal(together, torch.cat(alone, dim=1))


def test_a_state_is_a_value_from_which_the_same_step_follows_twice(one_thread: None) -> None:
    environments = CheetahDirections(0.3)
    state, _ = environments.reset([FORWARD, BACKWARD], 3, generators([1, 2]))
    kept = state.physics.copy()
    action = actions(0, 6, environments).view(2, 3, -1)
    first = environments.step(state, action)
    environments.step(first.state, action)
    again = environments.step(state, action)
    assert np.array_equal(state.physics, kept)
    assert np.array_equal(first.state.physics, again.state.physics)
    assert torch.equal(first.observation, again.observation)
    assert torch.equal(first.reward, again.reward)


def test_the_beginning_of_a_task_follows_from_its_generator() -> None:
    environments = CheetahDirections(0.3)
    both = environments.reset([FORWARD, BACKWARD], 3, generators([1, 2]))[1]
    assert torch.equal(environments.reset([BACKWARD], 3, generators([2]))[1], both[1:])
    assert not torch.equal(environments.reset([BACKWARD], 3, generators([3]))[1], both[1:])


def test_opposite_directions_earn_opposite_rewards_but_for_the_effort(one_thread: None) -> None:
    environments = CheetahDirections(1.0)
    state, _ = environments.reset([FORWARD, BACKWARD], 4, generators([5, 5]))
    action = actions(0, 4, environments).expand(2, 4, 6)
    reward = environments.step(state, action).reward
    effort = action[0].clamp(-1, 1).square().sum(-1)
    torch.testing.assert_close(reward.sum(0), -0.1 * effort)


def test_a_velocity_earns_most_where_it_is_the_task(one_thread: None) -> None:
    environments = CheetahVelocities(2.0, 1.0)
    tasks: list[Task] = [{"velocity": value} for value in (0.0, 0.5, 1.0)]
    state, _ = environments.reset(tasks, 1, generators([5, 5, 5]))
    still = state._replace(physics=state.physics * 0)
    after = still.physics.copy()
    after[:, 1] = 0.5 * environments.seconds
    reward = environments.reward(still.physics, after, np.zeros((3, 6)), state.parameters)
    assert reward == pytest.approx([-0.5, 0.0, -0.5])


def test_the_scale_of_actions_comes_before_the_clipping(one_thread: None) -> None:
    state, _ = CheetahDirections(1.0).reset([FORWARD], 1, generators([5]))
    scaled = CheetahDirections(0.5).step(state, torch.full((1, 1, 6), 1.5))
    plain = CheetahDirections(1.0).step(state, torch.full((1, 1, 6), 0.75))
    beyond = CheetahDirections(1.0).step(state, torch.full((1, 1, 6), 7.0))
    full = CheetahDirections(1.0).step(state, torch.full((1, 1, 6), 1.0))
    assert torch.equal(scaled.observation, plain.observation)
    assert torch.equal(beyond.observation, full.observation)


def test_the_ant_has_fallen_when_its_torso_is_too_low_or_too_high() -> None:
    environments = AntDirections(0.3)
    physics = environments.reset([FORWARD], 3, generators([5]))[0].physics
    physics[:, 3] = [0.1, 0.6, 1.1]
    assert environments.ended(physics).tolist() == [True, False, True]


def test_physics_that_breaks_down_ends_the_episode_and_is_counted_but_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], one_thread: None
) -> None:
    monkeypatch.chdir(tmp_path)
    environments = CheetahDirections(0.3)
    state, _ = environments.reset([FORWARD], 3, generators([1]))
    state.physics[1, 12] = 1e12
    step = environments.step(state, torch.zeros(1, 3, 6))
    assert step.terminated.tolist() == [[False, True, False]]
    assert step.reward[0, 1] == 0
    assert torch.isfinite(step.observation).all()
    assert environments.broken == 1
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_a_meta_batch_tells_how_often_its_physics_broke_down(one_thread: None) -> None:
    data = HalfCheetahDirection(rollouts=2, horizon=3, meta_batch=1)
    data.setup("fit")
    data.environments.broken = 7  # those of before count no more
    module = MetaLearning(GaussianMLP(17, 6, (4,)), MAML(inner_steps=1), PolicyGradient())
    reset = data.environments.reset

    def blow_up(tasks: Any, rollouts: int, generators: Any) -> Any:
        state, seen = reset(tasks, rollouts, generators)
        state.physics[1, 12] = 1e12
        return state, seen

    data.environments.reset = blow_up  # type: ignore[method-assign]
    batch = data.sample(worker=0, run=0, iteration=0, act=module.act_of(module.learner))
    assert batch.metrics is not None
    assert batch.metrics["broken"] == 2  # before adaptation, and after it
    assert batch.metrics["episode_length"] == (3 + 1) / 2


def test_loading_says_nothing_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for family in (HalfCheetahDirection, HalfCheetahVelocity, AntDirection):
        family().setup("fit")
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def threads() -> int:
    """Of this process, as the system sees them."""
    return len(list(Path("/proc/self/task").iterdir()))


def test_close_ends_the_threads(two_threads: None) -> None:
    environments = CheetahDirections(0.3)
    state, _ = environments.reset([FORWARD], 6, generators([1]))
    before = threads()
    environments.step(state, torch.zeros(1, 6, 6))
    assert threads() == before + 2
    environments.close()
    assert threads() == before


def walk_with_two_threads(*given: Any) -> Tensor:
    torch.set_num_threads(2)
    return walk(*given)


def test_a_forked_process_steps_with_threads_of_its_own(two_threads: None) -> None:
    environments = CheetahDirections(0.3)
    here = walk(environments, [FORWARD], [1])
    environments.step(environments.reset([FORWARD], 6, generators([1]))[0], torch.zeros(1, 6, 6))  # threads are there
    torch.set_num_threads(1)
    (there,) = in_workers(walk_with_two_threads, 1, environments, [FORWARD], [1])
    assert torch.equal(here, there)


def test_a_data_module_is_kept_without_native_threads(one_thread: None) -> None:
    data = HalfCheetahDirection()
    data.setup("fit")
    again = pickle.loads(pickle.dumps(data))  # noqa: S301 - our own
    assert again._environments is None
    assert again.environment_task(3) == data.environment_task(3)
    data.teardown("fit")


@pytest.mark.parametrize(
    ("data", "key", "values"),
    [
        (HalfCheetahDirection(), "direction", {1, -1}),
        (AntDirection(), "direction", {1, -1}),
        (HalfCheetahVelocity(fastest=2.0), "velocity", None),
    ],
)
def test_tasks_follow_from_seeds_and_cover_their_range(data: Any, key: str, values: set[int] | None) -> None:
    drawn = [data.environment_task(seed)[key] for seed in range(100)]
    assert drawn == [data.environment_task(seed)[key] for seed in range(100)]
    if values is None:
        assert 0 <= min(drawn) < 0.2
        assert 1.8 < max(drawn) < 2
    else:
        assert set(drawn) == values
        assert 30 < drawn.count(1) < 70
    data.environments.check([{key: value} for value in drawn])


@pytest.mark.parametrize(
    ("environments", "task", "message"),
    [
        (CheetahDirections(0.3), {"direction": 2}, r"must be direction: 1 \(forward\)"),
        (CheetahDirections(0.3), {"velocity": 1}, r"must be direction: 1 \(forward\)"),
        (AntDirections(0.3), {"direction": [1]}, r"must be direction: 1 \(forward\)"),
        (CheetahVelocities(2.0, 0.1), {"velocity": "fast"}, "must be velocity: a number, in m/s"),
    ],
)
def test_a_task_that_there_is_not_is_refused_in_one_line(
    environments: MujocoEnvironments, task: Task, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        environments.check([task])
    assert "\n" not in str(error.value)


def test_without_mujoco_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(
        ConfigError, match=r"CheetahDirections needs mujoco: install it with  pip install '\w+\[mujoco\]'\."
    ):
        HalfCheetahDirection().setup("fit")


def test_an_old_mujoco_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import mujoco

    monkeypatch.delattr(mujoco, "MjLogConfig")
    with pytest.raises(ConfigError, match="AntDirections needs mujoco 4 or newer, and"):
        AntDirection().setup("fit")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale: float) -> None:
    for family in (HalfCheetahDirection, HalfCheetahVelocity, AntDirection):
        with pytest.raises(ConfigError, match=r"data\.action_scale is .*, but must be greater than 0"):
            family(action_scale=scale)


def test_a_clip_has_a_picture_of_every_state(one_thread: None) -> None:
    environments = CheetahDirections(1.0)
    state, _ = environments.reset([FORWARD], 2, generators([1]))
    made = environments.frames(state.physics, 64, 48)
    if made is None:
        pytest.skip("there is no EGL here")
    assert made.shape == (2, 48, 64, 3)
    assert made.std() > 10
    assert not np.array_equal(made[0], made[1])


def test_the_package_ships_its_models() -> None:
    assert {path.name for path in MODELS.iterdir()} == {"LICENSE-gymnasium.txt", "ant.xml", "half_cheetah.xml"}
    assert issubclass(CheetahDirections, Cheetahs)
    assert MujocoState._fields == ("physics", "parameters", "tasks")


def test_the_documented_family_of_ones_own_steps(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (repository / "docs" / "data.md").read_text(), re.DOTALL)
    (tmp_path / "swimmers.py").write_text(next(block for block in blocks if "class Swimmers(" in block))
    assets = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
    (tmp_path / "swimmer.xml").write_bytes((assets / "swimmer.xml").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = importlib.import_module("swimmers").SwimmerDirection()
    data.setup("fit")
    seen = walk(data.environments, [data.environment_task(1), data.environment_task(2)], [1, 2])
    assert seen.shape == (8, 2, 6, data.environments.observations + 1)
    assert data.environments.observations == 8


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("half_cheetah_dir", HalfCheetahDirection),
        ("half_cheetah_vel", HalfCheetahVelocity),
        ("ant_dir", AntDirection),
    ],
)
def test_the_policy_of_a_shipped_config_fits_its_environments(name: str, kind: Any, repository: Path) -> None:
    config = yaml.safe_load((repository / "configs" / f"{name}.yaml").read_text())
    assert config["data"]["class_path"] == f"data_modules.{kind.__name__}"
    environments = kind(**config["data"]["init_args"]).environments
    policy = config["model"]["init_args"]["network"]["init_args"]
    assert (policy["observations"], policy["actions"]) == (environments.observations, environments.actions)
