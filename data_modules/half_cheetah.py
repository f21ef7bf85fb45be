"""The half-cheetah of the MAML paper (Finn et al. 2017, section 5.3): to run in one direction, or at one velocity.

Both are not told to it. It needs mujoco: pip install 'dmaml_pl[mujoco]'.

Legend: N environments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dmaml_pl.checks import require_positive
from dmaml_pl.errors import ConfigError
from dmaml_pl.rollouts.data import EnvironmentDataModule
from dmaml_pl.rollouts.directions import TwoDirections
from dmaml_pl.rollouts.environments import Environments, Task
from dmaml_pl.rollouts.mujoco import MODELS, Array, MujocoEnvironments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dmaml_pl.rollouts.sampling import Rollouts

EFFORT = 0.05
"""What the square of a torque costs."""

FORWARD, SECONDS, RUNS = 8, 0.05, 5
"""Of observations, which is the velocity forward; of a step; and rollouts that are plotted of a task."""


class _CheetahTasks(EnvironmentDataModule):
    """What the families of half-cheetahs share: a plot of how far they run."""

    def plot_rollouts(self, tasks: Sequence[Task], rollouts: Mapping[str, Rollouts], figure: Figure) -> str:
        """Where some cheetahs are over time, by the sum of their velocities, which are observed."""
        panels = figure.subplots(1, len(tasks), sharex=True, sharey=True, squeeze=False)[0]
        for number, (task, axes) in enumerate(zip(tasks, panels, strict=True)):
            for place, (when, made) in enumerate(rollouts.items()):
                way = SECONDS * made.observations[number, :RUNS, :, FORWARD].cumsum(-1).cpu()
                seconds = SECONDS * torch.arange(1, way.shape[-1] + 1)
                for rollout, each in enumerate(way):
                    label = when if rollout == 0 else None
                    axes.plot(seconds, each, color=f"C{place}", linewidth=0.9, label=label)
            axes.set_title(", ".join(f"{name} {value:.3g}" for name, value in task.items()), fontsize=9)
            axes.set_xlabel("time (s)")
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("way (m)")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
        return "Some tasks: how far cheetahs run over time, before and after adaptation"


class HalfCheetahDirection(_CheetahTasks):
    """Forward or backward: the reward is the velocity that way, less 0.05 times the square of the torques.

    17 observations (positions but for where it is, and velocities), 6 actions, 0.05 s a step; episodes never end by
    themselves. The reward is that of the MAML paper's code (`half_cheetah_env_rand_direc.py` of maml_rl), the
    observations are ProMP's.

    Args:
        action_scale: of actions, before torques are clipped to -1 .. 1. Policies begin with standard deviations of one;
            at full scale the cheetah then thrashes, and nothing is learned in 3 million steps.
        settings: those of `EnvironmentDataModule`.

    Raises:
        ConfigError: a value out of its range.

    Examples:
        >>> HalfCheetahDirection(rollouts=20, horizon=100).horizon
        100
    """

    def __init__(self, *, action_scale: float = 0.3, **settings: Any) -> None:
        super().__init__(**settings)
        require_positive(**{"data.action_scale": action_scale})
        self.action_scale = action_scale

    def make_environments(self) -> Environments:
        """Cheetahs that are to run in a direction."""
        return CheetahDirections(self.action_scale)


class HalfCheetahVelocity(_CheetahTasks):
    """At a velocity, uniform in 0 .. `fastest`: the reward is minus the difference from it, less 0.05 times the square.

    The square is that of the torques; else as `HalfCheetahDirection`.

    Args:
        fastest: in m/s; 2 in the MAML paper, 3 in ProMP.
        action_scale: of actions, before torques are clipped to -1 .. 1; smaller than for directions, since the cheetah
            is to run less fast than it can.
        settings: those of `EnvironmentDataModule`.

    Raises:
        ConfigError: a value out of its range.

    Examples:
        >>> HalfCheetahVelocity(fastest=2.0).horizon
        100
    """

    def __init__(self, *, fastest: float = 2.0, action_scale: float = 0.1, **settings: Any) -> None:
        super().__init__(**settings)
        require_positive(**{"data.fastest": fastest, "data.action_scale": action_scale})
        self.fastest = fastest
        self.action_scale = action_scale

    def make_environments(self) -> Environments:
        """Cheetahs that are to run at a velocity."""
        return CheetahVelocities(self.fastest, self.action_scale)


class Cheetahs(MujocoEnvironments):
    """Half-cheetahs, whatever they are to do.

    Args:
        action_scale: see `HalfCheetahDirection`.
    """

    unseen = 1

    def __init__(self, action_scale: float) -> None:
        super().__init__(MODELS / "half_cheetah.xml", frame_skip=5, action_scale=action_scale)


class CheetahDirections(TwoDirections, Cheetahs):
    """A task is a direction, 1 forward and -1 backward."""

    def reward(self, before: Array, after: Array, control: Array, parameters: Mapping[str, Array]) -> Array:
        """The velocity that way, less the effort."""
        reward: Array = parameters["direction"] * self.velocity(before, after) - EFFORT * np.square(control).sum(1)
        return reward


class CheetahVelocities(Cheetahs):
    """A task is a velocity, in m/s.

    Args:
        fastest: see `HalfCheetahVelocity`.
        action_scale: see `HalfCheetahDirection`.
    """

    def __init__(self, fastest: float, action_scale: float) -> None:
        super().__init__(action_scale)
        self.fastest = fastest

    def sample_task(self, generator: torch.Generator) -> Task:
        """A velocity, uniform."""
        return {"velocity": self.fastest * float(torch.rand((), generator=generator, dtype=torch.float64))}

    def reward(self, before: Array, after: Array, control: Array, parameters: Mapping[str, Array]) -> Array:
        """Minus the difference of the velocities, less the effort."""
        reward: Array = -np.abs(self.velocity(before, after) - parameters["velocity"])
        reward -= EFFORT * np.square(control).sum(1)
        return reward

    def check(self, tasks: Sequence[Task]) -> None:
        """The velocity is a number."""
        for task in tasks:
            if task.keys() != {"velocity"} or not isinstance(task["velocity"], int | float):
                raise ConfigError(f"A task is {task}, but must be velocity: a number, in m/s.")
