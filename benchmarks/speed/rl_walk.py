"""A small `gymnasium.Env` as a user might write one: what it costs to have it sampled is measured by it."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np


def walk() -> Any:
    """A point on the plane that is to walk to a goal; it never arrives."""
    gymnasium: Any = importlib.import_module("gymnasium")

    class Walk(gymnasium.Env):  # type: ignore[misc]  # where it is not installed it has no types
        """Tasks are goals."""

        def __init__(self) -> None:
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
            self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
            self.goal = self.place = np.zeros(2, np.float32)

        def sample_task(self, generator: np.random.Generator) -> dict[str, Any]:
            """A goal in a square."""
            return {"goal": generator.uniform(-0.5, 0.5, 2).tolist()}

        def set_task(self, task: dict[str, Any]) -> None:
            """Take a goal."""
            self.goal = np.array(task["goal"], np.float32)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            """Begin close to the middle."""
            super().reset(seed=seed)
            self.place = self.np_random.uniform(-0.01, 0.01, 2).astype(np.float32)
            return self.place, {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            """Walk."""
            self.place = self.place + np.float32(0.1) * action
            return self.place, -float(np.linalg.norm(self.place - self.goal)), False, False, {}

    return Walk()
