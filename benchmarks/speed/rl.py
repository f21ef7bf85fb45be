"""Reinforcement learning: sampling and whole meta-iterations, beside learn2learn's, and beside the environments alone.

Everything is processor time of one thread, that of learn2learn's environment processes included, and runs in a process
of its own; what a ratio is of takes turns in it. learn2learn loops over the tasks, so one task is measured and
multiplied.

python -m benchmarks.speed.rl navigation

Legend: T tasks, B rollouts of a task, L time steps.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.alone import alone
from benchmarks.speed.peers import UnavailableError
from benchmarks.speed.rl_reference import Reference, Settings, particles
from benchmarks.speed.rl_walk import walk
from benchmarks.speed.timing import Ratio, Times
from data_modules.navigation2d import Navigation2D, PointEnvironments
from dmaml_pl import MAML, GaussianMLP, MetaLearning, PolicyGradient, TrustRegion
from dmaml_pl.engines.asked import MetaIteration
from dmaml_pl.launching.memory import keep_freed
from dmaml_pl.rollouts.data import EnvironmentDataModule
from dmaml_pl.tasks import Samples, TaskBatch, derive_seed, derive_seeds

TASKS, ROLLOUTS, HORIZON, HIDDEN = 20, 20, 100, (100, 100)
"""The MAML paper's settings of 2D navigation, which is what learn2learn is measured on."""

REFERENCE_TASKS, PROCESSES = 1, 10
CHEETAH_TASKS, CHEETAH_HORIZON = 4, 200
OWN_TASKS = 2
"""Of an environment of one's own, with as many rollouts as above: 40 of them."""

ROUNDS = 3
PARTS = ("navigation", "cheetah", "own")

Seconds = dict[str, list[float]]


class Found(NamedTuple):
    """What a part found.

    Attributes:
        seconds: by what was done, one figure a round, of T tasks.
        steps: of the environments in the sampling of a round.
        tries: of the line search, by the kind of meta-iteration, one figure a round.
        skipped: why nothing was measured; empty where it was.
    """

    seconds: Seconds
    steps: list[int]
    tries: dict[str, list[int]]
    skipped: str = ""

    def ratio(self, reference: str, own: str) -> Ratio:
        """How many times the one's time is the other's, round by round."""
        return Ratio.between(Times(self.seconds[reference]), Times(self.seconds[own]))

    def median(self, what: str) -> float:
        """Seconds of the median round."""
        return Times(self.seconds[what]).median

    def microseconds(self, what: str) -> float:
        """Of a step of the environments, median."""
        return Times([1e6 * s / n for s, n in zip(self.seconds[what], self.steps, strict=True)]).median


def measure(part: str) -> Found:
    """One part, in a process of its own."""
    return Found(**alone("benchmarks.speed.rl", part))


class Ours:
    """Meta-iterations as `dmaml fit` makes them, without a Trainer.

    Args:
        data: the environments.
        sizes: of an observation and an action.
        hidden: widths of the policy's layers.
        first_order: of the inner loop.
        optimizer: settings of the trust region.
    """

    def __init__(
        self,
        data: EnvironmentDataModule,
        sizes: tuple[int, int],
        *,
        hidden: tuple[int, ...] = HIDDEN,
        first_order: bool = False,
        **optimizer: Any,
    ) -> None:
        torch.manual_seed(0)
        algorithm = MAML(inner_lr=0.1, inner_steps=1, first_order=first_order)
        self.data = data
        self.module = MetaLearning(GaussianMLP(*sizes, hidden), algorithm, PolicyGradient())
        self.learner = self.module.learner
        self.optimizer = TrustRegion(self.learner.parameters(), **optimizer)

    def sample(self, iteration: int) -> TaskBatch:
        """The policy, baselines, advantages and steps of adaptation of a meta-batch."""
        return self.data.sample(worker=0, run=0, iteration=iteration, act=self.module.act_of(self.learner))

    def step(self, batch: TaskBatch) -> None:
        """The meta-gradient and the step of the trust region."""
        engine = self.module.engine.for_training(self.learner, batch)
        self.optimizer.zero_grad()
        outcome = engine.meta_gradient(self.learner, batch)
        self.optimizer.problem = MetaIteration(
            self.learner, engine, batch, self.optimizer.parameters(), lambda values: values
        )
        self.optimizer.step(lambda: outcome.loss)

    @property
    def tries(self) -> int:
        """Of the last line search; 0 stands for all, none of which was taken."""
        return int(self.optimizer.metrics["line_search_tries"])


KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "exact": {"metric": "exact", "metric_every": 1},
    "first order": {"first_order": True},
}
"""Of the meta-iterations on 2D navigation, with what they are set to."""


def navigation() -> Found:
    """2D navigation, beside learn2learn's; each kind of ours is trained in its own rounds."""
    data = Navigation2D(rollouts=ROLLOUTS, horizon=HORIZON, meta_batch=TASKS, seed=0)
    ours = {name: Ours(data, (2, 2), **settings) for name, settings in KINDS.items()}
    try:
        reference = Reference(Settings(ROLLOUTS, HORIZON, PROCESSES, HIDDEN))
    except UnavailableError as reason:
        return Found({}, [], {}, str(reason))
    seconds: Seconds = {name: [] for name in ("sampling", *KINDS, "reference sampling", "reference")}
    found = Found(seconds, [], {name: [] for name in KINDS})
    for own in ours.values():  # warm, and with the first, widest steps behind it
        own.step(own.sample(0))
    reference.step(reference.sample(REFERENCE_TASKS))
    theirs = []
    for number in range(1, ROUNDS + 1):
        for name, own in ours.items():
            began = time.process_time()
            batch = own.sample(number)
            sampled = time.process_time()
            own.step(batch)
            seconds[name].append(time.process_time() - began)
            found.tries[name].append(own.tries)
            if name == "default":
                seconds["sampling"].append(sampled - began)
                found.steps.append(_steps_of(batch))
        began = reference.clock()
        replays = reference.sample(REFERENCE_TASKS)
        sampled = reference.clock()
        reference.step(replays)
        times = TASKS / REFERENCE_TASKS
        seconds["reference sampling"].append(times * (sampled - began))
        seconds["reference"].append(times * (reference.clock() - began))
        theirs.append(int(times * sum(each.steps for each in replays)))
    _check_alike(ours["default"], reference, sum(found.steps), sum(theirs))
    reference.close()
    return found


def _check_alike(ours: Ours, reference: Reference, steps: int, theirs: int) -> None:
    """That both did the same work: networks, environments, and how many steps.

    Raises:
        AssertionError: they did not.
    """
    sizes = [sum(p.numel() for p in of.parameters()) for of in (ours.learner, reference.policy)]
    goal = [0.3, -0.2]
    state, seen = PointEnvironments().reset([{"goal": goal}], 1, [torch.Generator()])
    particle = particles(HORIZON)()
    particle.set_task({"goal": goal})
    particle.reset()
    generator, apart, ends = torch.Generator().manual_seed(0), 0.0, []
    for _ in range(HORIZON - 1):
        # Towards the goal, with noise that the limits cut off, so that it is reached.
        action = (10 * (torch.tensor(goal) - seen[0, 0]) + 0.1 * torch.randn(2, generator=generator)).clamp(-1, 1)
        state, seen, reward, ended = PointEnvironments().step(state, action.view(1, 1, 2))
        place, their_reward, done, _ = particle.step((0.1 * action).numpy())
        apart = max(apart, float((seen[0, 0] - torch.from_numpy(place)).abs().max()), abs(reward.item() - their_reward))
        ends.append((bool(ended), done))
    if sizes[0] != sizes[1] or apart > 1e-5 or not any(ours for ours, _ in ends) or any(a != b for a, b in ends):
        raise AssertionError(f"not the same problem: {sizes} parameters, environments {apart} apart, ends {ends}")
    if abs(steps / theirs - 1) > 0.1:
        raise AssertionError(f"not the same amount of work: {steps} and {theirs} steps of the environments")


def _steps_of(batch: TaskBatch) -> int:
    """Of the environments, before and after adaptation."""
    metrics: Any = batch.metrics
    return int(metrics["env_steps"])


def _actions(samples: Samples) -> Tensor:
    """Of all environments, (T * B, L, A)."""
    targets: Any = samples.y
    actions: Tensor = targets["action"].flatten(0, 1)
    return actions


def cheetah() -> Found:
    """Half-cheetahs that run in a direction, beside the physics of the same trajectories."""
    try:
        kind = importlib.import_module("data_modules.half_cheetah").HalfCheetahDirection
        rollout = importlib.import_module("mujoco.rollout")
    except ImportError as error:
        return Found({}, [], {}, f"skipped, as {error.name} is missing: pip install 'dmaml_pl[mujoco]'")
    data: EnvironmentDataModule = kind(
        rollouts=ROLLOUTS, horizon=CHEETAH_HORIZON, meta_batch=CHEETAH_TASKS, val_tasks=1, test_tasks=1, seed=0
    )
    sizes = (data.environments.observations, data.environments.actions)
    ours = Ours(data, sizes, metric="first_order")  # as the configs of half-cheetahs have it
    found = Found({"sampling": [], "default": [], "floor": []}, [], {"default": []})
    ours.step(ours.sample(0))
    for number in range(1, ROUNDS + 1):
        began = time.process_time()
        batch = ours.sample(number)
        sampled = time.process_time()
        ours.step(batch)
        found.seconds["default"].append(time.process_time() - began)
        found.seconds["sampling"].append(sampled - began)
        found.tries["default"].append(ours.tries)
        found.steps.append(_steps_of(batch))
        found.seconds["floor"].append(_physics(rollout, data, number, batch))
    data.teardown("fit")
    return found


def _physics(rollout: Any, data: EnvironmentDataModule, iteration: int, batch: TaskBatch) -> float:
    """Seconds of the physics alone, one step of all environments after another, on the actions that were taken."""
    environments: Any = data.environments
    mujoco = importlib.import_module("mujoco")
    seeds = derive_seeds("train", data.seed, 0, 0, iteration, count=data.meta_batch)
    tasks = [data.environment_task(seed) for seed in seeds]
    low, high = environments.model.actuator_ctrlrange.T
    own, thread = mujoco.MjData(environments.model), rollout.Rollout(nthread=0)
    passed = 0.0
    for step, samples in enumerate((batch.support[0], batch.query)):
        generators = [torch.Generator().manual_seed(derive_seed("rollouts", seed, step)) for seed in seeds]
        states = [environments.reset(tasks, data.rollouts, generators)[0].physics]
        actions = _actions(samples).double().numpy()
        held = (environments.action_scale * actions).clip(low, high)[:, :, None].repeat(environments.frame_skip, 2)
        controls = [held[:, number].copy() for number in range(data.horizon)]
        models = [environments.model] * len(actions)
        passing = np.empty((len(actions), environments.frame_skip, states[0].shape[-1]))
        sensors = np.empty((len(actions), environments.frame_skip, environments.model.nsensordata))
        began = time.process_time()
        for control in controls:
            thread.rollout(
                models,
                [own],
                states[-1],
                control,
                skip_checks=True,
                nstep=environments.frame_skip,
                state=passing,
                sensordata=sensors,
            )
            states.append(passing[:, -1].copy())
        passed += time.process_time() - began
        if not np.array_equal(environments.observe(states[-2]).astype(np.float32), samples.x[:, :, -1].flatten(0, 1)):
            raise AssertionError("the physics alone went elsewhere than the rollouts")
    return passed


def own() -> Found:
    """A `gymnasium.Env` of one's own, beside a loop that steps the same environments with the same actions."""
    try:
        kind = importlib.import_module("data_modules.gymnasium_tasks").GymnasiumTasks
    except ImportError as error:
        return Found({}, [], {}, f"skipped, as {error.name} is missing")
    data: EnvironmentDataModule = kind(
        environment="benchmarks.speed.rl_walk.walk", rollouts=ROLLOUTS, horizon=HORIZON, meta_batch=OWN_TASKS, seed=0
    )
    ours = Ours(data, (2, 2))
    environments = [walk() for _ in range(OWN_TASKS * ROLLOUTS)]
    found = Found({"sampling": [], "floor": []}, [], {})
    ours.sample(0)
    for number in range(1, 3 * ROUNDS + 1):
        began = time.process_time()
        batch = ours.sample(number)
        found.seconds["sampling"].append(time.process_time() - began)
        found.steps.append(_steps_of(batch))
        passed = 0.0
        for samples in (batch.support[0], batch.query):
            for environment in environments:
                environment.reset(seed=0)
            actions = list(_actions(samples).clamp(-1, 1).transpose(0, 1).numpy())
            began = time.process_time()
            for of_all in actions:
                for environment, action in zip(environments, of_all, strict=True):
                    environment.step(action)
            passed += time.process_time() - began
        found.seconds["floor"].append(passed)
    data.teardown("fit")
    return found


def main(part: str) -> None:
    """Print what a part found."""
    keep_freed()  # as `dmaml` does
    torch.set_num_threads(1)
    measured: Callable[[], Found] = {"navigation": navigation, "cheetah": cheetah, "own": own}[part]
    print(json.dumps(measured()._asdict()))


if __name__ == "__main__":
    main(*sys.argv[1:])
