"""2D navigation of the MAML paper (Finn et al. 2017, section 5.3): a point walks to a goal that it is not told.

Legend: T tasks, B rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dmaml_pl.checks import require_positive
from dmaml_pl.errors import ConfigError
from dmaml_pl.rollouts.data import EnvironmentDataModule
from dmaml_pl.rollouts.environments import Environments, Step, Task
from dmaml_pl.rollouts.sampling import Rollouts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REACH = 0.01
"""So near, in both directions, the goal is reached, and the episode ends."""

WAYS = 2
"""Of a task, drawn at most."""

STRIDE = 0.1
"""The furthest that one action leads in each direction."""


class Navigation2D(EnvironmentDataModule):
    """Goals are uniform in a square around the start, the reward is minus the distance to the goal.

    Observations are the position, actions the velocity, 1 being the fastest, which they are clipped to. An episode ends
    at the goal.

    Args:
        half_width: of the square.
        settings: those of `EnvironmentDataModule`.

    Examples:
        >>> Navigation2D(rollouts=10, horizon=50, meta_batch=4).horizon
        50
    """

    def __init__(self, *, half_width: float = 0.5, **settings: Any) -> None:
        super().__init__(**settings)
        require_positive(**{"data.half_width": half_width})
        self.half_width = half_width

    def make_environments(self) -> Environments:
        """Points on the plane."""
        return PointEnvironments(self.half_width)

    def plot_rollouts(self, tasks: Sequence[Task], rollouts: Mapping[str, Rollouts], figure: Figure) -> str:
        """The ways of some points on the map, and where they should have gone."""
        panels = figure.subplots(1, len(tasks), sharex=True, sharey=True, squeeze=False)[0]
        for number, (task, axes) in enumerate(zip(tasks, panels, strict=True)):
            for place, (when, made) in enumerate(rollouts.items()):
                for rollout in range(min(WAYS, made.returns.shape[1])):
                    going = made.alive[number, rollout] > 0
                    x, y = made.observations[number, rollout, going].cpu().T
                    axes.plot(x, y, color=f"C{place}", linewidth=0.9, label=when if rollout == 0 else None)
            axes.scatter(0, 0, color="black", s=14, zorder=5, label="start")
            axes.scatter(*task["goal"], color="tab:red", marker="*", s=90, zorder=6, label="goal")
            axes.set_title(f"task {number}", fontsize=9)
            axes.set_aspect("equal")
            axes.spines[["top", "right"]].set_visible(False)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
        return "Some tasks: where the point went, before and after adaptation, and where its goal is"


class PointState(NamedTuple):
    """Points on the plane, T x B.

    Attributes:
        position: (T, B, 2).
        goal: (T, 1, 2).
    """

    position: Tensor
    goal: Tensor


class PointEnvironments(Environments):
    """Points that walk on the plane, on the device of their actions.

    Args:
        half_width: of the square in which goals lie.
    """

    observations = 2
    actions = 2

    def __init__(self, half_width: float = 0.5) -> None:
        self.half_width = half_width

    def sample_task(self, generator: torch.Generator) -> Task:
        """A goal."""
        place = self.half_width * (2 * torch.rand(2, generator=generator) - 1)
        return {"goal": place.tolist()}

    def reset(self, tasks: Sequence[Task], rollouts: int, generators: Sequence[torch.Generator]) -> tuple[Any, Tensor]:
        """All begin at the origin."""
        goal = torch.tensor([task["goal"] for task in tasks], dtype=torch.float32).unsqueeze(1)
        position = torch.zeros(len(tasks), rollouts, 2)
        return PointState(position, goal), position

    def step(self, state: PointState, action: Tensor) -> Step:
        """Walk."""
        goal = state.goal.to(action.device)
        position = state.position.to(action.device) + STRIDE * action.clamp(-1, 1)
        away = position - goal
        return Step(
            PointState(position, goal),
            position,
            -away.square().sum(-1).sqrt(),
            (away.abs() < REACH).all(-1),
        )

    def check(self, tasks: Sequence[Task]) -> None:
        """A goal is two numbers."""
        for task in tasks:
            goal = task.get("goal")
            fits = task.keys() == {"goal"} and isinstance(goal, list | tuple) and len(goal) == 2
            if not fits or not all(isinstance(each, int | float) and math.isfinite(each) for each in goal or ()):
                raise ConfigError(
                    f"A task is {task}, but must be goal: [x, y], two numbers; those of training are from "
                    f"{-self.half_width:g} to {self.half_width:g}."
                )

    def best_return(self, tasks: Sequence[Task], horizon: int) -> Tensor:
        """Straight to the goal: in each direction as fast as it goes, and no further than the goal."""
        goal = torch.tensor([task["goal"] for task in tasks], dtype=torch.float32)
        position, total = torch.zeros_like(goal), torch.zeros(len(goal))
        for _ in range(horizon):
            reached = ((position - goal).abs() < REACH).all(-1)
            position = position + (goal - position).clamp(-STRIDE, STRIDE)
            total -= torch.where(reached, 0.0, (position - goal).norm(dim=-1))
        return total
