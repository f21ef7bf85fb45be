"""A user's own `gymnasium.Env` as a family of environments: its tasks are what one of its methods takes.

Legend: T tasks, B rollouts of a task, N = T x B, O observation, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray
from torch import Tensor

from dmaml_pl.errors import ConfigError
from dmaml_pl.rollouts.environments import Environments, Step, Task
from dmaml_pl.rollouts.stepping import EnvironmentGroup, EnvironmentMaker, HereGroup, ThereGroup

TRIED_STEPS = 10
"""So many steps are compared to see whether an environment repeats itself."""


class VectorState(NamedTuple):
    """Where N environments are; it is held by them, so that only their last state can be stepped.

    Attributes:
        number: of resets and steps so far.
        going: which episodes have not ended, (N,).
        tasks: T.
    """

    number: int
    going: NDArray[np.bool_]
    tasks: int


class VectorEnvironments(Environments):
    """N environments of a user's own class, made once and kept.

    Each episode begins with the task, then `reset(seed=...)`, whose seed follows from the task's generator. Ended
    episodes are not stepped any more. Actions for a Box are clipped to it; for a Discrete they are its numbers.

    Args:
        make: makes one environment.
        sample_task: name of its method that gives a task, a dict, from a `numpy.random.Generator`.
        set_task: name of its method that takes a task.
        processes: so many further processes step them; with 0 this one does.

    Raises:
        ConfigError: what is made is no such environment, or does not repeat itself.
    """

    def __init__(
        self,
        make: EnvironmentMaker,
        *,
        sample_task: str = "sample_task",
        set_task: str = "set_task",
        processes: int = 0,
    ) -> None:
        self.name = make.environment
        self._here = HereGroup(make, set_task)
        environment = make()
        for setting, method, use in (
            ("sample_task", sample_task, "gives a task, a dict, from a numpy.random.Generator"),
            ("set_task", set_task, "takes a task"),
        ):
            if not callable(_found(environment, method)):
                raise ConfigError(
                    f"data.{setting} is {method}, but {self.name} has no such method: set it to the name of one that "
                    f"{use}."
                )
        self._sample_task: Callable[[np.random.Generator], Any] = environment.get_wrapper_attr(sample_task)
        self._take_task: Callable[[Task], Any] = environment.get_wrapper_attr(set_task)
        self._read_spaces(environment)
        self._environment = environment
        self._set_by = set_task
        self._try()
        self._groups: list[EnvironmentGroup] = [self._here]
        if processes:
            self._here.close()
            self._groups = [ThereGroup(make, set_task) for _ in range(processes)]
        self._asked: list[tuple[EnvironmentGroup, slice]] = []
        self._number = 0

    def sample_task(self, generator: torch.Generator) -> Task:
        """What the environment's own method gives.

        Raises:
            ConfigError: it gives no dict.
        """
        task = self._sample_task(np.random.default_rng(_seeds(generator, 1)[0]))
        if not isinstance(task, dict):
            raise ConfigError(
                f"{self.name} gave the task {task!r}, but data.sample_task must name a method that gives a dict, such "
                "as {'goal': [0.5, 0.1]}."
            )
        return task

    def reset(self, tasks: Sequence[Task], rollouts: int, generators: Sequence[torch.Generator]) -> tuple[Any, Tensor]:
        """Set the tasks, then begin episodes with seeds that follow from the generators."""
        seeds = [seed for generator in generators for seed in _seeds(generator, rollouts)]
        each = [task for task in tasks for _ in range(rollouts)]
        shares = _shares(len(each), len(self._groups))
        self._asked = [(group, share) for group, share in zip(self._groups, shares, strict=True) if each[share]]
        for group, share in self._asked:
            group.ask_reset(each[share], seeds[share])
        seen = np.concatenate([group.answer() for group, _ in self._asked])
        self._number += 1
        state = VectorState(self._number, np.ones(len(each), bool), len(tasks))
        return state, self._by_task(seen, state)

    def step(self, state: VectorState, action: Tensor) -> Step:
        """Step those that have not ended."""
        if state.number != self._number:
            raise RuntimeError("These environments hold their state: only what the last step gave can be stepped.")
        actions = self._actions(action)
        for group, share in self._asked:
            group.ask_step(actions[share], state.going[share])
        answers = [group.answer() for group, _ in self._asked]
        seen, reward, ended = (np.concatenate(parts) for parts in zip(*answers, strict=True))
        self._number += 1
        following = VectorState(self._number, ~ended, state.tasks)
        return Step(
            following,
            self._by_task(seen, state),
            torch.from_numpy(reward).view(state.tasks, -1),
            torch.from_numpy(ended).view(state.tasks, -1),
        )

    def check(self, tasks: Sequence[Task]) -> None:
        """Have an environment take each."""
        for task in tasks:
            try:
                self._take_task(task)
            except Exception as error:
                said = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise ConfigError(f"{self.name} does not take the task {task}: {said}") from error

    def close(self) -> None:
        """Close all environments, and the processes."""
        self._environment.close()
        for group in self._groups:
            group.close()

    def _by_task(self, seen: NDArray[np.float32], state: VectorState) -> Tensor:
        return torch.from_numpy(seen.reshape(state.tasks, -1, self.observations))

    def _actions(self, action: Tensor) -> NDArray[Any]:
        """As the environments take them, (N, ...)."""
        raw = action.detach().cpu().numpy()
        if isinstance(self._space, Discrete):
            numbers: NDArray[Any] = raw.reshape(-1).astype(np.int64) + self._space.start
            return numbers
        clipped: NDArray[Any] = raw.reshape(-1, *self._space.shape).clip(self._space.low, self._space.high)
        return clipped.astype(self._space.dtype)

    def _read_spaces(self, environment: gymnasium.Env[Any, Any]) -> None:
        seen, space = environment.observation_space, environment.action_space
        if not isinstance(seen, Box) or len(seen.shape) != 1:
            raise ConfigError(
                f"data.environment is {self.name}, whose observations are {seen}, but they must be a Box of one axis: "
                "wrap it in gymnasium.wrappers.FlattenObservation."
            )
        if not isinstance(space, Box | Discrete):
            raise ConfigError(
                f"data.environment is {self.name}, whose actions are {space}, but they must be a Box or Discrete."
            )
        self._space = space
        self.observations = seen.shape[0]
        self.discrete = isinstance(space, Discrete)
        self.actions = int(space.n) if isinstance(space, Discrete) else int(np.prod(space.shape))

    def _try(self) -> None:
        """One task three times with the same seed and actions, the third time in another environment."""
        generator = torch.Generator().manual_seed(0)
        task = self.sample_task(generator)
        self.check([task])
        self._here.grow(1)
        noise = torch.randn(TRIED_STEPS, 1 if self.discrete else self.actions, generator=generator)
        if self.discrete:
            noise = (10 * noise).abs().floor() % self.actions
        both = (self._environment, self._environment, self._here.environments[0])
        first, *others = [self._episode(environment, task, self._actions(noise)) for environment in both]
        if any(not np.array_equal(first, other, equal_nan=True) for other in others):
            raise ConfigError(
                f"data.environment is {self.name}, which does not repeat itself: reset(seed=...) must lead to the same "
                "observations and rewards for the same actions, so draw everything from self.np_random."
            )

    def _episode(self, environment: gymnasium.Env[Any, Any], task: Task, actions: NDArray[Any]) -> NDArray[np.float64]:
        """Observations and rewards; each step's in a row."""
        environment.get_wrapper_attr(self._set_by)(task)
        try:
            begun: Any = environment.reset(seed=0)
        except TypeError as error:
            if "seed" not in str(error):
                raise
            raise self._outdated("reset", "takes no seed", "take it: reset(seed=..., options=...)") from error
        if not isinstance(begun, tuple) or len(begun) != 2:
            raise self._outdated("reset", f"gives {_described(begun)}", "give (observation, info)")
        made = [np.append(self._checked(begun[0]), 0.0)]
        for action in actions.tolist() if self.discrete else actions:
            after: Any = environment.step(action)
            if not isinstance(after, tuple) or len(after) != 5:
                wanted = "give (observation, reward, terminated, truncated, info)"
                raise self._outdated("step", f"gives {_described(after)}", wanted)
            if np.ndim(after[1]):
                raise self._outdated("step", f"gives a reward of the shape {np.shape(after[1])}", "give a number")
            if np.asarray(after[1]).dtype.kind not in "biuf":
                raise self._outdated("step", f"gives the reward {after[1]!r}", "give a number")
            made.append(np.append(self._checked(after[0]), float(after[1])))
            if after[2] or after[3]:
                break
        return np.array(made)

    def _checked(self, seen: Any) -> NDArray[np.float64]:
        if np.shape(seen) != (self.observations,):
            raise ConfigError(
                f"data.environment is {self.name}, which gave an observation of the shape {np.shape(seen)}, but its "
                f"observation_space says {(self.observations,)}."
            )
        return np.asarray(seen, dtype=np.float64)

    def _outdated(self, method: str, found: str, wanted: str) -> ConfigError:
        return ConfigError(
            f"data.environment is {self.name}, whose {method} {found}, but must {wanted}, as gymnasium's environments "
            "do (gym's before 0.26 did not)."
        )


def _described(given: Any) -> str:
    return f"{len(given)} values" if isinstance(given, tuple) else f"a {type(given).__name__}"


def _found(environment: gymnasium.Env[Any, Any], name: str) -> Any:
    try:
        return environment.get_wrapper_attr(name)
    except AttributeError:
        return None


def _seeds(generator: torch.Generator, count: int) -> list[int]:
    """As gymnasium takes them, which is from 0 to 2**31 - 1."""
    return torch.randint(0, 2**31 - 1, (count,), generator=generator).tolist()


def _shares(count: int, groups: int) -> list[slice]:
    """Whole numbers of environments, as equal as can be."""
    bounds = [count * number // groups for number in range(groups + 1)]
    return [slice(first, last) for first, last in pairwise(bounds)]
