"""A user's own environments: a `gymnasium.Env` that says what its tasks are."""

from __future__ import annotations

from typing import Any

from dmaml_pl.checks import require_not_negative
from dmaml_pl.rollouts.data import EnvironmentDataModule
from dmaml_pl.rollouts.environments import Environments
from dmaml_pl.rollouts.stepping import EnvironmentMaker


class GymnasiumTasks(EnvironmentDataModule):
    """Tasks of a `gymnasium.Env` with two methods more: one gives a task, one takes it.

    A task is a dict of numbers and lists, such as a goal. `set_task(task)` is called before each
    `reset(seed=...)`. Observations are a Box of one axis, float32 for the network; actions a Box, to which they are
    clipped, or Discrete. One environment is tried before the work begins: it must repeat itself.

    Args:
        environment: class path of a `gymnasium.Env`, or of a function that makes one, such as my_module.MyEnv; or an id
            that gymnasium knows, such as my_module:MyEnv-v0.
        environment_args: arguments of the class or function, by name.
        sample_task: name of the method that gives a task from a `numpy.random.Generator`.
        set_task: name of the method that takes a task.
        processes: so many further processes for each worker step the environments; with 0 the worker does. That is
            faster below about 1 ms a step, and everything is the same to the bit.
        settings: those of `EnvironmentDataModule`.

    Raises:
        ConfigError: `processes` is less than 0.

    Attributes:
        names_code: the setting that says where code is to be found, which a checkpoint of somebody else is not to.

    Examples:
        >>> data = GymnasiumTasks(environment="mine:Arm-v0", horizon=50)
        >>> data.horizon
        50
    """

    names_code = ("environment",)

    def __init__(
        self,
        *,
        environment: str,
        environment_args: dict[str, Any] | None = None,
        sample_task: str = "sample_task",
        set_task: str = "set_task",
        processes: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        require_not_negative(**{"data.processes": processes})
        self.environment = environment
        self.environment_args = dict(environment_args or {})
        self.sampled_by = sample_task
        self.set_by = set_task
        self.processes = processes

    def make_environments(self) -> Environments:
        """The user's environments, once they have been tried."""
        from dmaml_pl.rollouts.vector import VectorEnvironments  # noqa: PLC0415 - it is for those who have an environment

        return VectorEnvironments(
            EnvironmentMaker(self.environment, self.environment_args),
            sample_task=self.sampled_by,
            set_task=self.set_by,
            processes=self.processes,
        )
