"""What an environment is here: a family of them, one for each task, of which as many as are asked for step together.

Legend: T tasks, B rollouts of a task, O observation, A action dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Task = dict[str, Any]
"""What tells one environment of a family from another, by name, such as a goal; numbers and lists of them."""


class Step(NamedTuple):
    """What became of T x B environments by one action each.

    Attributes:
        state: of them, a value: what `step` is given next.
        observation: (T, B, O) float32.
        reward: (T, B) float32.
        terminated: whether the episode has ended by itself, (T, B) bool; never because of the horizon.

    Examples:
        >>> environments = Navigation2D(meta_batch=2).make_environments()
        >>> tasks = [environments.sample_task(torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        >>> state, observation = environments.reset(tasks, 3, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
        >>> environments.step(state, torch.zeros(2, 3, 2)).reward.shape
        torch.Size([2, 3])
    """

    state: Any
    observation: Tensor
    reward: Tensor
    terminated: Tensor


class Environments(ABC):
    """A family of environments. T x B of them are stepped as one, and hold nothing: their state is a value.

    Whatever is drawn at random comes from the generators that `reset` is given, one a task, so that a task's rollouts
    are the same whichever other tasks are beside it.

    Attributes:
        observations: O, size of an observation.
        actions: A, dimensions of an action; where there are actions to choose among, how many.
        discrete: whether an action is one of so many, and its tensors hold their numbers, (T, B, 1).
        broken: how often the physics broke down in this process, which ended the episode; None where it cannot.

    Examples:
        >>> data = Navigation2D(meta_batch=2)
        >>> isinstance(data.make_environments(), Environments)
        True
    """

    observations: int
    actions: int
    discrete: bool = False
    broken: int | None = None

    @abstractmethod
    def sample_task(self, generator: torch.Generator) -> Task:
        """A task of the distribution."""

    @abstractmethod
    def reset(self, tasks: Sequence[Task], rollouts: int, generators: Sequence[torch.Generator]) -> tuple[Any, Tensor]:
        """The beginning of B episodes of each task.

        Args:
            tasks: T.
            rollouts: B.
            generators: of each task's random numbers, T.

        Returns:
            The state, and the first observations (T, B, O).
        """

    @abstractmethod
    def step(self, state: Any, action: Tensor) -> Step:
        """One step of all episodes, also of those that have ended, whose steps do not count.

        Args:
            state: of the step before; it is left as it was.
            action: (T, B, A); of discrete ones (T, B, 1).
        """

    def best_return(self, tasks: Sequence[Task], horizon: int) -> Tensor | None:
        """The undiscounted return of whoever knows each task, (T,), to compare with; None where nobody can tell."""
        return None

    def draw(self, states: Sequence[Any]) -> NDArray[np.uint8] | None:
        """Pictures of the first environment in each state, (n, height, width, 3); None where none are drawn."""
        return None

    def check(self, tasks: Sequence[Task]) -> None:  # noqa: B027 - most have nothing to check
        """Check tasks that a user has given.

        Raises:
            ConfigError: names what is wrong with them.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Give back what is held beside states, such as threads."""
