"""The baseline of environments: the same policy trained on all tasks without adaptation, then fine-tuned to each.

It is what the MAML paper calls "pretrained" (Finn et al. 2017, section 5.3): from the same initial weights, by the same
meta-optimizer, on the same tasks, but for the return of the policy as it is, so that it learns what is good on average.
It is fine-tuned by policy gradient steps as the meta-trained policy is, whose size is chosen on validation tasks.

Legend: T tasks, B rollouts of a task, I adaptation steps.
"""

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmaml_pl.algorithms import MAML, Algorithm
from dmaml_pl.algorithms.base import Weights
from dmaml_pl.engines import EngineChoice
from dmaml_pl.engines.asked import MetaIteration
from dmaml_pl.engines.base import Engine, Of
from dmaml_pl.engines.threads import limited_threads
from dmaml_pl.errors import DataError
from dmaml_pl.evaluation.baseline import STREAM, Baseline
from dmaml_pl.learner import MetaLearner
from dmaml_pl.optimizers import AskingOptimizer
from dmaml_pl.tasks import TaskBatch, derive_seed

STEP_SIZES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Of the fine-tuning, among which validation tasks choose; few, as each costs rollouts."""

TUNING_TASKS = 10
"""Validation tasks by which the step size is chosen, at most."""


@dataclass(frozen=True)
class PolicyBaseline(Baseline):
    """A policy trained without adaptation, ready to be fine-tuned; its samples are steps in environments."""

    def about(self) -> str:
        """What it is, in words."""
        return (
            f"the same policy trained on all tasks without adaptation by the same meta-optimizer ({self.steps} steps, "
            f"{self.samples} steps in environments), then fine-tuned to each task with the step size that is best on "
            f"validation tasks ({self.step_size:g})"
        )


class Unadapted(Algorithm):
    """No inner loop: the weights are trained as they are."""

    def __init__(self) -> None:
        super().__init__(inner_steps=0)

    def step(self, meta: Weights, fast: Weights, gradients: Weights, number: int) -> Weights:
        """Never asked for."""
        return {}


class PolicyBaselineTraining:
    """Trains a policy without adaptation, and chooses the step size of its fine-tuning; the workers share the work.

    All that is sampled follows from the data module's seed, and global random generators are left as they were.

    Args:
        module: the trained module, whose initial policy, meta-optimizer and objective are taken; it stays as it is.
        data: the data module, of environments.
        strategy: of the Trainer, by which the workers are known.

    Attributes:
        refusal: why there is no such baseline: there always is.
    """

    refusal: str | None = None

    def __init__(self, module: Any, data: Any, strategy: Any) -> None:
        self._module = module
        self._data = data
        self._strategy = strategy
        self._device: torch.device = strategy.root_device
        self._worker: int = getattr(strategy, "global_rank", 0)
        self._workers: int = getattr(strategy, "world_size", 1)
        self._clip: float | None = module.gradient_clip

    def steps_for(self, env_steps: float) -> int:
        """The whole of a budget of steps in environments; 0 where it is less than a meta-batch may take."""
        least = self._workers * self._data.meta_batch * self._data.rollouts * self._data.horizon
        return int(env_steps) if env_steps >= least else 0

    def make(
        self, env_steps: int, adaptation_steps: int, on_step: Callable[[int, float], None] = lambda done, value: None
    ) -> Baseline:
        """Train for so many steps in environments, and choose the step size for I steps; a collective call.

        `on_step` is told the number of steps in environments, and the mean return.
        """
        initial, devices = self._module.untrained.network, [self._device] if self._device.type == "cuda" else []
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(derive_seed(STREAM, self._data.seed))  # of dropout
            learner = MetaLearner(copy.deepcopy(initial).to(self._device).train(), Unadapted())
            name, steps, seen = self._train(learner, env_steps, on_step)
            learner.network.train(initial.training)
            step_size = self._best_step_size(learner, name, adaptation_steps)
            tuned, engine = self._fine_tuned_by(step_size, learner, name, adaptation_steps)
        return PolicyBaseline(tuned, engine, step_size, steps, seen, None)

    def _train(self, learner: MetaLearner, budget: int, on_step: Callable[[int, float], None]) -> tuple[Any, int, int]:
        """Returns the name of the engine, the steps made, and the steps in environments."""
        optimizer = self._module.meta_optimizer(learner.param_groups())
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        choice = EngineChoice("auto", self._module.objective)
        act = self._module.act_of(learner, engine=choice)
        engine: Engine | None = None
        number, seen, last = 0, 0, False
        with ExitStack() as surroundings:
            while not last:
                batch = self._data.sample(worker=self._worker, run=0, iteration=number, act=act).to(self._device)
                if engine is None:
                    engine = choice.for_training(learner, batch)
                    surroundings.enter_context(limited_threads(engine.threads(learner, batch)))
                own = torch.tensor([batch.metrics["env_steps"], batch.metrics["return_before"]], dtype=torch.double)
                made, value = self._mean(own.to(self._device)).tolist()
                if isinstance(optimizer, AskingOptimizer):
                    optimizer.problem = MetaIteration(learner, engine, batch, parameters, self._mean)
                optimizer.step(self._closure(learner, engine, batch, parameters))
                made = round(made * self._workers)
                number, seen = number + 1, seen + made
                last = seen + made > budget or not math.isfinite(value)
                on_step(budget if last else seen, value)
        assert engine is not None, "there is at least one step"  # noqa: S101
        return engine.name, number, seen

    def _closure(
        self, learner: MetaLearner, engine: Engine, batch: TaskBatch, parameters: list[Tensor]
    ) -> Callable[..., Tensor]:
        def evaluated(of: Of = "loss") -> Tensor:
            for parameter in parameters:
                parameter.grad = None
            loss = engine.meta_gradient(learner, batch, Tensor.backward, of).loss.detach()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            together = self._mean(torch.cat([loss.reshape(1), *(g.flatten() for g in gradients)]))
            for parameter, mean in zip(parameters, together[1:].split([p.numel() for p in parameters]), strict=True):
                parameter.grad = mean.view_as(parameter).clone()
            if self._clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, self._clip)
            return together[0]

        return evaluated

    def _mean(self, own: Tensor) -> Tensor:
        """The mean over the workers."""
        if self._workers == 1:
            return own
        mean: Tensor = self._strategy.reduce(own, reduce_op="mean")
        return mean

    def _best_step_size(self, trained: MetaLearner, name: Any, adaptation_steps: int) -> float:
        """By the mean return over 1 .. I steps on validation tasks; each worker tries some of the step sizes."""
        tasks = self._data.evaluation_tasks("val", range(min(int(self._data.val_tasks), TUNING_TASKS)))
        values = dict[float, float]()
        for step_size in STEP_SIZES[self._worker :: self._workers]:
            learner, engine = self._fine_tuned_by(step_size, trained, name, adaptation_steps)
            try:
                with limited_threads(1):
                    returns = tasks.returns(self._module.act_of(learner, adaptation_steps, engine))
                value = float(returns[:, 1:].mean())
            except DataError:  # such as of actions that are not finite, after too large a step
                value = math.nan
            values[step_size] = value if math.isfinite(value) else -math.inf
        for share in self._strategy.gather(values) if self._workers > 1 else ():
            values |= share
        return max(values, key=lambda step_size: (values[step_size], -step_size))

    def _fine_tuned_by(
        self, step_size: float, trained: MetaLearner, name: Any, adaptation_steps: int
    ) -> tuple[MetaLearner, EngineChoice]:
        optimizer = copy.deepcopy(self._module.algorithm.inner_optimizer)
        tuning = MAML(step_size, inner_steps=adaptation_steps, first_order=True, inner_optimizer=optimizer)
        return MetaLearner(trained.network, tuning), EngineChoice(name, self._module.objective)
