"""The ant of the MAML paper (Finn et al. 2017, section 5.3): to walk in one direction, which it is not told.

It needs mujoco: pip install 'dmaml_pl[mujoco]'.

Legend: N environments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmaml_pl.checks import require_positive
from dmaml_pl.rollouts.data import EnvironmentDataModule
from dmaml_pl.rollouts.directions import TwoDirections
from dmaml_pl.rollouts.environments import Environments
from dmaml_pl.rollouts.mujoco import MODELS, Array, MujocoEnvironments

EFFORT = 0.005
"""What the square of a control costs."""

ALIVE = 0.05
"""What each step earns."""

LOWEST, HIGHEST = 0.2, 1.0
"""Where the torso is above the ground, in m, as long as the ant has not fallen over or taken off."""


class AntDirection(EnvironmentDataModule):
    """Forward or backward: the reward is the velocity that way, less 0.005 times the square of the controls, plus 0.05.

    Directions and reward are those of the MAML paper's code (`ant_env_rand_direc.py` of maml_rl), and not the angles in
    the plane of ProMP's: two tasks tell at a glance whether an ant has adapted, and standing still is worth little.
    Contact forces are left out, of the observations and of the reward. 27 observations (positions but for where it is,
    and velocities), 8 actions, 0.05 s a step. An episode ends when the torso leaves 0.2 .. 1 m above the ground.

    Args:
        action_scale: of actions, before controls are clipped to -1 .. 1; see `HalfCheetahDirection`.
        settings: those of `EnvironmentDataModule`.

    Raises:
        ConfigError: a value out of its range.

    Examples:
        >>> AntDirection(horizon=100).horizon
        100
    """

    def __init__(self, *, action_scale: float = 0.1, **settings: Any) -> None:
        super().__init__(**settings)
        require_positive(**{"data.action_scale": action_scale})
        self.action_scale = action_scale

    def make_environments(self) -> Environments:
        """Ants that are to walk in a direction."""
        return AntDirections(self.action_scale)


class AntDirections(TwoDirections, MujocoEnvironments):
    """A task is a direction, 1 forward and -1 backward.

    Args:
        action_scale: see `AntDirection`.
    """

    unseen = 2

    def __init__(self, action_scale: float) -> None:
        super().__init__(MODELS / "ant.xml", frame_skip=5, action_scale=action_scale)

    def reward(self, before: Array, after: Array, control: Array, parameters: Mapping[str, Array]) -> Array:
        """The velocity that way, less the effort, and something for being alive."""
        reward: Array = (
            parameters["direction"] * self.velocity(before, after) - EFFORT * np.square(control).sum(1) + ALIVE
        )
        return reward

    def ended(self, physics: Array) -> NDArray[np.bool_]:
        """By the height of the torso."""
        height = self.positions(physics)[:, 2]
        return (height < LOWEST) | (height > HIGHEST)
