"""What data modules of environments share: tasks from seeds, rollouts by how the networks act, and their evaluation.

Legend: T tasks, B rollouts of a task, L time steps (horizon), I adaptation steps.
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmaml_pl.checks import require_at_most, require_counts
from dmaml_pl.data import LARGEST_COUNT, Split, TaskDataModule
from dmaml_pl.errors import ConfigError
from dmaml_pl.rollouts.environments import Environments, Task
from dmaml_pl.rollouts.sampling import Rollouts, Weighed, sample_rollouts, weigh
from dmaml_pl.runs import ENV_STEPS, SAMPLING_SECONDS
from dmaml_pl.tasks import Act, TaskBatch, derive_seed, derive_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COMPARED_EVERY = 10
"""So often a step of a rollout is looked at to tell how far adaptation moves a policy; some hundreds for each task."""


class EnvironmentTasks(NamedTuple):
    """Tasks to be evaluated on by acting in them, and not by samples that are there.

    Attributes:
        data: the data module.
        chosen: T tasks.
        seeds: of each one's random numbers, T.
        numbers: of each task, (T,).
    """

    data: EnvironmentDataModule
    chosen: list[Task]
    seeds: list[int]
    numbers: Tensor

    @property
    def tasks(self) -> int:
        """T."""
        return len(self.chosen)

    def returns(self, act: Act) -> Tensor:
        """Undiscounted return of each task's policy, a mean over rollouts, after 0 .. `act.steps` steps, (T, I + 1)."""
        return torch.stack([made.returns.mean(1) for made in self.rollouts(act)], dim=1)

    def rollouts(self, act: Act) -> list[Rollouts]:
        """Rollouts after 0 .. `act.steps` steps, each step by the rollouts before it."""
        return self.data.adapt_by_rollouts(act, self.chosen, self.seeds)[0]

    def film(self, act: Act, place: int) -> NDArray[np.uint8] | None:
        """Pictures of the policy adapted to the task at a place, over an episode; None where none are drawn."""
        return self.data.film(act, self.chosen[place], self.seeds[place])

    def best_returns(self) -> Tensor | None:
        """The return of whoever knows each task, (T,), where somebody can tell."""
        return self.data.environments.best_return(self.chosen, self.data.horizon)


class EnvironmentDataModule(TaskDataModule):
    """Base of the data modules of environments: a subclass makes them (`make_environments`).

    Args:
        rollouts: B, of a task at each step of adaptation, and after the last.
        horizon: L, steps of an episode at most.
        meta_batch: T, tasks in the meta-batch of one worker.
        discount: gamma, of the rewards by which advantages are estimated; returns are shown without.
        gae_lambda: of generalized advantages; 1 takes whole returns, as the MAML paper does; less has less variance.
        runs_per_epoch: runs that Lightning counts as one epoch.
        val_tasks: validation tasks, the same at every validation.
        test_tasks: tasks of a meta-test.
        seed: seed of the training tasks; by default that of `seed_everything`, or 0.
        evaluation_seed: seed of validation and test tasks.

    Raises:
        ConfigError: a value out of its range.

    Examples:
        >>> data: EnvironmentDataModule = Navigation2D(rollouts=10, horizon=50)
        >>> data.rollouts, data.horizon
        (10, 50)
    """

    evaluation_chunk = 20

    def __init__(
        self,
        *,
        rollouts: int = 20,
        horizon: int = 100,
        meta_batch: int = 20,
        discount: float = 0.99,
        gae_lambda: float = 1.0,
        runs_per_epoch: int = 10,
        val_tasks: int = 40,
        test_tasks: int = 100,
        seed: int | None = None,
        evaluation_seed: int = 0,
    ) -> None:
        counts = {"data.rollouts": rollouts, "data.horizon": horizon}
        require_counts(**counts)
        require_at_most(LARGEST_COUNT, **counts)
        if rollouts * horizon < 2:
            raise ConfigError(
                "data.rollouts and data.horizon are 1, but advantages need at least two steps to compare."
            )
        for name, value in (("discount", discount), ("gae_lambda", gae_lambda)):
            if not 0 < value <= 1:
                raise ConfigError(f"data.{name} is {value}, but must be greater than 0 and at most 1.")
        super().__init__(
            shots=rollouts,
            queries=rollouts,
            meta_batch=meta_batch,
            runs_per_epoch=runs_per_epoch,
            val_tasks=val_tasks,
            test_tasks=test_tasks,
            seed=seed,
            evaluation_seed=evaluation_seed,
        )
        self.rollouts = rollouts
        self.horizon = horizon
        self.discount = discount
        self.gae_lambda = gae_lambda
        self._environments: Environments | None = None
        self._made_in = 0

    @abstractmethod
    def make_environments(self) -> Environments:
        """The family of environments."""

    @property
    def environments(self) -> Environments:
        """The family of environments, made when it is first asked for."""
        if self._environments is None or self._made_in != os.getpid():  # a forked worker has none of the threads
            self._environments, self._made_in = self.make_environments(), os.getpid()
        return self._environments

    def __getstate__(self) -> dict[str, Any]:
        """All but what threads and native libraries hold: each process makes its own."""
        return self.__dict__ | {"_environments": None}

    def setup(self, stage: str) -> None:
        """Make the environments, so that what they lack is told of before the training."""
        _ = self.environments

    def teardown(self, stage: str) -> None:
        """Close them."""
        if self._environments is not None:
            self._environments.close()
            self._environments = None

    def sample_task(self, split: Split, seed: int) -> TaskBatch:
        """Environments have no samples before someone acts."""
        raise ConfigError(
            f"{type(self).__name__} has environments, which have no samples before a policy acts in them."
        )

    def environment_task(self, seed: int) -> Task:
        """The task that follows from a seed."""
        return self.environments.sample_task(torch.Generator().manual_seed(seed))

    def sample(self, *, worker: int, run: int, iteration: int, act: Act | None = None) -> TaskBatch:
        """The training meta-batch: rollouts before each step of adaptation, and after the last, as query set."""
        if act is None:
            raise ConfigError(f"{type(self).__name__} has environments, which must be told how to act in them.")
        seeds = derive_seeds("train", self.seed, worker, run, iteration, count=self.meta_batch)
        return self._batch(act, [self.environment_task(seed) for seed in seeds], seeds)

    def trial(self, act: Act) -> TaskBatch:
        """A meta-batch of one training task, by which a network is tried before the training; with T axis."""
        seed = derive_seed("train", self.seed, "trial")
        return self._batch(act, [self.environment_task(seed)], [seed])

    def adapt_by_rollouts(
        self,
        act: Act,
        tasks: Sequence[Task],
        seeds: Sequence[int],
        rollouts: int | None = None,
        kls: list[float] | None = None,
    ) -> tuple[list[Rollouts], list[Weighed]]:
        """Rollouts after 0 .. `act.steps` steps of adaptation, and as samples those that are adapted to.

        Args:
            act: how the networks act when they are adapted to samples; how many steps there are.
            tasks: T.
            seeds: of each one's random numbers, T.
            rollouts: B, if other than in training.
            kls: is given how far each step of adaptation moves the policies, a mean KL.
        """
        made, weighed = list[Rollouts](), list[Weighed]()
        for step in range(act.steps + 1):
            policy = act(tuple(each.samples for each in weighed))
            if weighed and kls is not None:
                kls.append(_moved(policy, made[-1]))
            made.append(
                sample_rollouts(
                    self.environments,
                    policy,
                    tasks,
                    [derive_seed("rollouts", seed, step) for seed in seeds],
                    rollouts=rollouts or self.rollouts,
                    horizon=self.horizon,
                    device=act.device,
                )
            )
            if step < act.steps:
                weighed.append(weigh(made[-1], self.discount, self.gae_lambda))
        return made, weighed

    def film(self, act: Act, task: Task, seed: int) -> NDArray[np.uint8] | None:
        """Pictures of an episode of the policy that is adapted to a task, (L, height, width, 3).

        Args:
            act: how the networks act when they are adapted to samples; how many steps there are.
            task: one.
            seed: of its random numbers.

        Returns:
            None where the environments draw no pictures, or cannot here.
        """
        _, weighed = self.adapt_by_rollouts(act, [task], [seed])
        states: list[Any] = []
        sample_rollouts(
            self.environments,
            act(tuple(each.samples for each in weighed)),
            [task],
            [derive_seed("film", seed)],
            rollouts=1,
            horizon=self.horizon,
            device=act.device,
            watch=states.append,
        )
        return self.environments.draw(states)

    def plot_rollouts(self, tasks: Sequence[Task], rollouts: Mapping[str, Rollouts], figure: Figure) -> str:
        """Draw rollouts of some tasks for the report of a meta-test; a family that can show what it does overrides it.

        Args:
            tasks: T, such as four of the meta-test.
            rollouts: of these tasks, by when that was, such as "before adaptation" and "after 1 step"; "C0", "C1" and
                so on are colours for them.
            figure: empty, with a constrained layout; its size may be changed.

        Returns:
            A caption; nothing where nothing was drawn, as by default.
        """
        return ""

    def _batch(self, act: Act, tasks: list[Task], seeds: Sequence[int]) -> TaskBatch:
        kls, began, broken = list[float](), time.perf_counter(), self.environments.broken
        made, weighed = self.adapt_by_rollouts(act, tasks, seeds, kls=kls)
        query = weigh(made[-1], self.discount, self.gae_lambda)
        steps = sum(each.steps for each in made)
        metrics = {
            "return_before": float(made[0].returns.mean()),
            "explained_variance": float(torch.stack([each.explained_variance for each in (*weighed, query)]).mean()),
            "entropy": float(made[-1].acting.entropy().mean()),
            "inner_kl": sum(kls) / max(len(kls), 1),
            "episode_length": steps / sum(each.returns.numel() for each in made),
            ENV_STEPS: float(steps),
        }
        if broken is not None:
            metrics["broken"] = float((self.environments.broken or 0) - broken)
        metrics[SAMPLING_SECONDS] = time.perf_counter() - began
        supports = tuple(each.samples for each in weighed) or (query.samples,)  # without adaptation none is looked at
        return TaskBatch(supports, query.samples, metrics=metrics)

    def evaluation_tasks(self, split: Split, indices: Sequence[int]) -> Any:
        """Tasks of a split as they are evaluated on, with their numbers; the same in every training."""
        seeds = [derive_seed(split, self.evaluation_seed, index) for index in indices]
        return self.tasks_of([self.environment_task(seed) for seed in seeds], seeds, indices)

    def tasks_of(self, tasks: list[Task], seeds: list[int], numbers: Sequence[int]) -> EnvironmentTasks:
        """Given tasks, to be evaluated on."""
        return EnvironmentTasks(self, tasks, seeds, torch.tensor(list(numbers), dtype=torch.int64))


def _moved(policy: Callable[[Tensor], Any], made: Rollouts) -> float:
    """The mean KL from the policies that acted to others, on every so many-th step of their rollouts."""
    seen = made.observations[:, :, ::COMPARED_EVERY].flatten(1, 2)
    with torch.no_grad():
        now = policy(seen)
    kind: Any = type(now)
    before = {name: values[:, :, ::COMPARED_EVERY].flatten(1, 2) for name, values in made.acting.parameters().items()}
    alive = made.alive[:, :, ::COMPARED_EVERY].flatten(1, 2)
    return float((kind(**before).kl_to(now) * alive).sum() / alive.sum())
