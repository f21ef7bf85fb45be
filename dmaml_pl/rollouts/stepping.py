"""Many `gymnasium.Env` stepped one after another, in this process or in one of their own. Does without PyTorch.

Legend: n environments of a process, O observation, A action dimensions.
"""

from __future__ import annotations

import multiprocessing
import pkgutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

from dmaml_pl.errors import ConfigError, DataError

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class EnvironmentMaker:
    """Makes a user's environments, in any process.

    Attributes:
        environment: class path of a `gymnasium.Env`, or of a function that makes one, or an id that gymnasium knows.
        arguments: of the class or function, by name.
    """

    environment: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> gymnasium.Env[Any, Any]:
        """One environment.

        Raises:
            ConfigError: there is no such thing, or it makes no environment.
        """
        try:
            made = self._make()(**self.arguments)
        except Exception as error:
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            using = f" with data.environment_args {self.arguments}" if self.arguments else ""
            raise ConfigError(f"data.environment cannot be {self.environment}{using}: {said}") from error
        if not isinstance(made, gymnasium.Env):
            kind = f"{type(made).__module__}.{type(made).__name__}"
            raise ConfigError(
                f"data.environment is {self.environment}, which makes a {kind}, but must make a gymnasium.Env (which a "
                "gym.Env is not)."
            )
        return made

    def _make(self) -> Callable[..., Any]:
        if "." in self.environment and all(part.isidentifier() for part in self.environment.split(".")):
            found: Callable[..., Any] = pkgutil.resolve_name(self.environment)
            return found
        return lambda **arguments: gymnasium.make(self.environment, disable_env_checker=True, **arguments)


class Stepped(NamedTuple):
    """What became of n environments.

    Attributes:
        observation: (n, O).
        reward: (n,).
        ended: which episodes are over, by their end or by the environment's own limit of steps, (n,).
    """

    observation: Floats
    reward: Floats
    ended: NDArray[np.bool_]


class EnvironmentGroup(Protocol):
    """Environments that are asked for something together, and answer later."""

    def ask_reset(self, tasks: Sequence[dict[str, Any]], seeds: Sequence[int]) -> None:
        """Begin an episode in as many environments as there are tasks."""
        ...

    def ask_step(self, actions: NDArray[Any], going: NDArray[np.bool_]) -> None:
        """Step those that are going."""
        ...

    def answer(self) -> Any:
        """To the last question: first observations (n, O), or what `Stepped` says."""
        ...

    def close(self) -> None:
        """Close the environments."""
        ...


class HereGroup:
    """Environments in this process; as many as were ever asked for are kept.

    Args:
        make: makes one.
        set_task: the name of the method that takes a task.
    """

    def __init__(self, make: Callable[[], gymnasium.Env[Any, Any]], set_task: str) -> None:
        self._make = make
        self._set_task = set_task
        self.environments: list[gymnasium.Env[Any, Any]] = []
        self._setters: list[Callable[[dict[str, Any]], Any]] = []
        self._steppers: list[Callable[[Any], Any]] = []
        self._observation: Floats = np.empty((0, 0), np.float32)
        self._answer: Any = None

    def ask_reset(self, tasks: Sequence[dict[str, Any]], seeds: Sequence[int]) -> None:
        """Set the tasks, then begin episodes with the seeds."""
        self.grow(len(tasks))
        seen = []
        for number, (task, seed) in enumerate(zip(tasks, seeds, strict=True)):
            self._setters[number](task)
            seen.append(self.environments[number].reset(seed=seed)[0])
        self._observation = np.asarray(seen, dtype=np.float32)
        self._answer = self._observation

    def ask_step(self, actions: NDArray[Any], going: NDArray[np.bool_]) -> None:
        """Step those that are going, one after another; the others are seen as they ended."""
        seen, rewards, ended = self._observation.copy(), np.zeros(len(going), np.float32), ~going
        chosen = actions.tolist() if actions.ndim == 1 else actions
        for number in going.nonzero()[0].tolist():
            seen[number], rewards[number], terminated, truncated, _ = self._steppers[number](chosen[number])
            if terminated or truncated:
                ended[number] = True
        self._observation = seen
        self._answer = Stepped(seen, rewards, ended)

    def answer(self) -> Any:
        """To the last question."""
        return self._answer

    def grow(self, count: int) -> None:
        """Make environments until there are so many."""
        while len(self.environments) < count:
            made = self._make()
            self.environments.append(made)
            self._setters.append(made.get_wrapper_attr(self._set_task))
            self._steppers.append(made.step)

    def close(self) -> None:
        """Close the environments."""
        for environment in self.environments:
            environment.close()
        self.environments, self._setters, self._steppers = [], [], []


class ThereGroup:
    """Environments in a process of their own, which ends with this one.

    Args:
        make: makes one, there.
        set_task: the name of the method that takes a task.
    """

    def __init__(self, make: Callable[[], gymnasium.Env[Any, Any]], set_task: str) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would have the locks of this process's threads
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, set_task), daemon=True, name="environments")
        self._process.start()
        there.close()

    def ask_reset(self, tasks: Sequence[dict[str, Any]], seeds: Sequence[int]) -> None:
        """Begin episodes."""
        self._ask("ask_reset", list(tasks), list(seeds))

    def ask_step(self, actions: NDArray[Any], going: NDArray[np.bool_]) -> None:
        """Step those that are going."""
        self._ask("ask_step", actions, going)

    def answer(self) -> Any:
        """To the last question.

        Raises:
            DataError: the process has ended, or an environment raised an exception there.
        """
        try:
            failure, answer = self._here.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        if failure:
            sys.stderr.write(failure)
            raise DataError(f"An environment of data.environment failed: {failure.strip().splitlines()[-1]}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._here.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, *question: Any) -> None:
        try:
            self._here.send(question)
        except OSError as error:
            raise self._lost() from error

    def _lost(self) -> DataError:
        self._process.join(5)
        return DataError(
            f"A process of data.processes has ended (exit code {self._process.exitcode}): set data.processes to 0 to "
            "see what its environments do."
        )


def _serve(questions: Connection, make: Callable[[], gymnasium.Env[Any, Any]], set_task: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training, which then ends this
    group = HereGroup(make, set_task)
    while True:
        try:
            name, *arguments = questions.recv()
        except EOFError:
            break
        try:
            getattr(group, name)(*arguments)
            reply = ("", group.answer())
        except Exception:
            reply = (traceback.format_exc(), None)
        questions.send(reply)
    group.close()
