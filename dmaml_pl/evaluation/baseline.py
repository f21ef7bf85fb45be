"""The field's baseline: the same network trained without meta-learning, and then fine-tuned to each task.

What meta-learning gains shows beside a network of the same architecture, from the same initial weights, on the same
data, that has never seen an inner loop:

- Regression: all training tasks jointly, as in the MAML paper (Finn et al. 2017, section 5.1).
- Classification: to tell all classes of the training split apart, through an output layer for them, which then gives
  way to a new one for the ways of a task: the "Baseline" of Chen et al. 2019 (arXiv:1904.04232), here fine-tuned as a
  whole. The new layer begins at zero, so that no class is preferred before the first step.

It is fine-tuned by gradient descent whose step size is chosen on validation tasks, as in the MAML paper.

Legend: T tasks, S support and Q query samples of a task, B samples, I adaptation steps, N ways.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dmaml_pl.algorithms import MAML
from dmaml_pl.data import TaskDataModule
from dmaml_pl.engines import EngineChoice
from dmaml_pl.errors import reason_of
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import LabelledSource, derive_seed, derive_seeds

BATCH = 128
"""Samples of a step of its training, of all workers together, or a few more."""

LEARNING_RATE = 3e-3
"""Of Adam, at the first step; it falls to zero along a cosine."""

STEP_SIZES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Of the fine-tuning, among which validation tasks choose."""

STREAM = "plain"
"""The name of its random numbers, as it was when the results in configs/README.md were made."""

TUNING_TASKS = 25
"""Validation tasks by which the step size is chosen, at most."""


@dataclass(frozen=True)
class Baseline:
    """A network trained without meta-learning, ready to be fine-tuned.

    Attributes:
        learner: it, and its fine-tuning.
        engine: chooses what executes them.
        step_size: of the fine-tuning, chosen on validation tasks.
        steps: of its training.
        samples: that it saw.
        classes: that it was trained to tell apart; None for a regression.
    """

    learner: MetaLearner
    engine: EngineChoice
    step_size: float
    steps: int
    samples: int
    classes: int | None

    def about(self) -> str:
        """What it is, in words."""
        task = "on all training tasks jointly" if self.classes is None else f"to tell {self.classes} classes apart"
        return (
            f"the same network trained without meta-learning, {task} ({self.steps} steps, {self.samples} samples), "
            f"then fine-tuned to each task with the step size that is best on validation tasks ({self.step_size:g})"
        )


class BaselineTraining:
    """Trains a network without meta-learning, and chooses the step size of its fine-tuning; the workers share the work.

    All that is sampled follows from the data module's seed, and global random generators are left as they were.

    Args:
        network: initial weights; they stay as they are.
        objective: of the training.
        data: the data module.
        strategy: of the Trainer, by which the workers are known.

    Attributes:
        refusal: why there is no such baseline for this network and data; None if there is.
    """

    def __init__(self, network: nn.Module, objective: Objective, data: Any, strategy: Any) -> None:
        self._network = network
        self._objective = objective
        self._data = data
        self._strategy = strategy
        self._device: torch.device = strategy.root_device
        self._worker: int = getattr(strategy, "global_rank", 0)
        self._workers: int = getattr(strategy, "world_size", 1)
        self._classifies = objective.name == "classification"
        self.refusal = _refusal(network, objective, data)

    def steps_for(self, tasks: float) -> int:
        """Gradient steps that see as many samples as so many tasks have, none of them more."""
        return int(tasks * self._task_samples // (self._workers * self._own_samples))

    def make(
        self, steps: int, adaptation_steps: int, on_step: Callable[[int, float], None] = lambda done, loss: None
    ) -> Baseline:
        """Train for `steps` gradient steps, and choose the step size for I adaptation steps; a collective call.

        `on_step` is told the number of steps made, and the loss.
        """
        trained = self._train(steps, on_step)
        step_size = self._best_step_size(trained, adaptation_steps)
        learner, engine = _fine_tuned_by(step_size, trained, self._objective, adaptation_steps)
        classes = self._data.sample_labelled(1, 0).classes if self._classifies else None
        samples = steps * self._workers * self._own_samples
        return Baseline(learner, engine, step_size, steps, samples, classes)

    @cached_property
    def _task_samples(self) -> int:
        """S + Q of a task."""
        task = self._data.sample_task("train", 0)
        return len(task.support_x) + len(task.query_x)

    @property
    def _own_samples(self) -> int:
        """Samples of one worker at one step: its share of `BATCH`, or a few more; of whole tasks in a regression."""
        each = 1 if self._classifies else self._task_samples
        return math.ceil(BATCH / self._workers / each) * each

    def _sample(self, step: int) -> tuple[Tensor, Tensor]:
        parts = (STREAM, self._data.seed, step, self._worker)
        if self._classifies:
            samples = self._data.sample_labelled(self._own_samples, derive_seed(*parts))
            return samples.x, samples.y
        seeds = derive_seeds(*parts, count=self._own_samples // self._task_samples)
        tasks = self._data.sample_tasks("train", seeds)
        x, y = torch.cat([tasks.support_x, tasks.query_x], dim=1), torch.cat([tasks.support_y, tasks.query_y], dim=1)
        return x.flatten(0, 1), y.flatten(0, 1)

    def _train(self, steps: int, on_step: Callable[[int, float], None]) -> nn.Module:
        """By Adam; the output layer of a classification is exchanged before and after."""
        device = self._device
        devices = [device] if device.type == "cuda" else []
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(derive_seed(STREAM, self._data.seed))  # of the new layer, and of dropout
            trained, ways = copy.deepcopy(self._network).to(device).train(), 0
            if self._classifies:
                ways = _exchange_head(trained, self._data.sample_labelled(1, 0).classes)
            parameters = [p for p in trained.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
            for step in range(steps):
                x, y = (_like(tensor.to(device), parameters[0]) for tensor in self._sample(step))
                loss = self._objective.query_loss(trained(x), y)
                optimizer.zero_grad(set_to_none=False)
                loss.backward()
                self._average(parameters)
                optimizer.step()
                schedule.step()
                on_step(step + 1, float(loss.detach()))
            if self._classifies:
                _exchange_head(trained, self._data.evaluation_task("val", 0).ways or ways, to_zero=True)
        return trained.train(self._network.training)

    def _average(self, parameters: list[nn.Parameter]) -> None:
        """Make the mean of the workers' gradients everyone's."""
        if self._workers == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        mean = self._strategy.reduce(torch.cat([g.flatten() for g in gradients]), reduce_op="mean")
        for parameter, own in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = own.view_as(parameter)

    def _best_step_size(self, trained: nn.Module, adaptation_steps: int) -> float:
        """By the mean of the metric over 1 .. I steps on validation tasks; each worker tries some of the step sizes."""
        count = min(int(self._data.val_tasks), TUNING_TASKS)
        tasks = self._data.evaluation_tasks("val", range(count)).to(self._device)
        weight, values = next(trained.parameters()), dict[float, float]()
        with torch.inference_mode(False), torch.enable_grad():
            tasks = tasks.map(lambda tensor: _like(tensor, weight).clone())
            for step_size in STEP_SIZES[self._worker :: self._workers]:
                learner, engine = _fine_tuned_by(step_size, trained, self._objective, adaptation_steps)
                executing = engine.for_evaluation(learner, tasks)
                curve = executing.adaptation_curve(learner, tasks, adaptation_steps).metric
                value = float(curve[:, 1:].mean()) * (1 if self._objective.better == "max" else -1)
                values[step_size] = value if math.isfinite(value) else -math.inf
        for share in self._strategy.gather(values) if self._workers > 1 else ():
            values |= share
        return max(values, key=lambda step_size: (values[step_size], -step_size))


def _refusal(network: nn.Module, objective: Objective, data: Any) -> str | None:
    if not isinstance(data, TaskDataModule):
        return "it needs a data module of data_modules"
    if objective.name != "classification":
        return None
    if not isinstance(data, LabelledSource):
        return f"{type(data).__name__} does not say of which class a training sample is (sample_labelled)"
    samples, changed = data.sample_labelled(2, 0), copy.deepcopy(network)
    if not _exchange_head(changed, samples.classes):
        return f"{type(network).__name__} has no linear layer (nn.Linear) at its end to exchange"
    weight = next(changed.parameters())
    with torch.no_grad():
        output = changed(_like(samples.x.to(weight.device), weight))
        if tuple(output.shape) != (2, samples.classes):
            return f"the last linear layer of {type(network).__name__} is not its output"
    return _refusal_of_loss(objective, output, samples.y.to(weight.device))


def _refusal_of_loss(objective: Objective, output: Tensor, y: Tensor) -> str | None:
    try:
        objective.query_loss(output, y)
    except Exception as error:  # of a user's own, made for the ways of a task
        return f"{type(objective).__name__} has no loss for {output.shape[1]} classes at once ({reason_of(error)})"
    return None


def _fine_tuned_by(
    step_size: float, network: nn.Module, objective: Objective, adaptation_steps: int
) -> tuple[MetaLearner, EngineChoice]:
    fine_tuning = MAML(inner_lr=step_size, inner_steps=adaptation_steps, first_order=True)
    return MetaLearner(network, fine_tuning), EngineChoice("auto", objective)


def _like(tensor: Tensor, weight: Tensor) -> Tensor:
    """Real values in the type of a weight; class numbers as they are."""
    return tensor.to(weight.dtype) if tensor.is_floating_point() else tensor


def _exchange_head(network: nn.Module, outputs: int, *, to_zero: bool = False) -> int:
    """Put another linear layer in the place of the last; returns the outputs of the one before, 0 if there was none."""
    layers = [(name, layer) for name, layer in network.named_modules() if name and type(layer) is nn.Linear]
    if not layers:
        return 0
    name, old = layers[-1]
    new = nn.Linear(
        old.in_features, outputs, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype
    )
    if to_zero:
        for parameter in new.parameters():
            nn.init.zeros_(parameter)
    network.set_submodule(name, new)
    return old.out_features
