"""Tasks that are a direction, forward or backward, whoever is to run that way."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dmaml_pl.errors import ConfigError
from dmaml_pl.rollouts.environments import Task


class TwoDirections:
    """A task is a direction, 1 forward and -1 backward; stands before a class of environments as its base."""

    def sample_task(self, generator: torch.Generator) -> Task:
        """One of the two directions."""
        return {"direction": 2 * int(torch.randint(0, 2, (), generator=generator)) - 1}

    def check(self, tasks: Sequence[Task]) -> None:
        """Check that the direction is 1 or -1.

        Raises:
            ConfigError: names the task that is none.
        """
        for task in tasks:
            if task.keys() != {"direction"} or task["direction"] not in (1, -1):
                raise ConfigError(f"A task is {task}, but must be direction: 1 (forward) or direction: -1 (backward).")
