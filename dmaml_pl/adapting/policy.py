"""A policy that was adapted to one environment by acting in it, and goes on acting there.

Legend: B observations or rollouts, O observation, A action dimensions, L time steps, I adaptation steps.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmaml_pl.adapting.adapted import ADAPTED_KEY, AdaptedLearner, Values, as_tensor
from dmaml_pl.engines.per_task import weights_adapted_to
from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.evaluation.curves import half_width
from dmaml_pl.modules import MetaLearning
from dmaml_pl.policies.distributions import ActionDistribution
from dmaml_pl.rollouts.data import EnvironmentDataModule
from dmaml_pl.rollouts.environments import Task
from dmaml_pl.tasks import TaskBatch, derive_seed


@dataclass(eq=False)
class AdaptedPolicy(AdaptedLearner):
    """A policy that is adapted to an environment.

    Attributes:
        task: what tells the environment from others of its family.
        returns: mean undiscounted return of the rollouts after 0 .. I steps of adaptation.
        ci95: half the width of their 95 % confidence intervals, over the rollouts.
        best: the return of whoever knows the task, where somebody can tell.

    Examples:
        >>> module = MetaLearning(GaussianMLP(2, 2), MAML(), PolicyGradient())
        >>> learner = FewShotLearner(module, data=Navigation2D(rollouts=4, horizon=5))
        >>> learner.adapt_to({"goal": [0.3, 0.4]}).act(torch.zeros(1, 2)).shape
        torch.Size([1, 2])
    """

    task: Task
    returns: list[float]
    ci95: list[float]
    best: float | None

    def act(self, observations: Values, generator: torch.Generator | None = None) -> Tensor:
        """Actions, drawn as in training.

        Args:
            observations: (B, O), or one (O,).
            generator: of the random numbers; by default PyTorch's own.

        Returns:
            (B, A), or (A,) for one observation; of discrete actions their numbers, (B, 1) or (1,). On the CPU, or on
            the device of `observations` if that is a tensor.

        Raises:
            DataError: the observations do not fit the policy.
        """
        device = observations.device if isinstance(observations, Tensor) else torch.device("cpu")
        x = as_tensor(observations, "observations")
        distribution = self.distribution(x.unsqueeze(0) if x.ndim == 1 else x)
        first = next(iter(distribution.parameters().values()))
        noise = torch.randn(len(first), *self.shapes["output"], generator=generator, dtype=first.dtype)
        actions = distribution.sample(noise.to(first.device)).to(device)
        return actions[0] if x.ndim == 1 else actions

    def distribution(self, observations: Values) -> ActionDistribution:
        """The distribution of actions for observations (B, O), such as its `mean`; errors as those of `act`."""
        said: Any = self._ask(self._samples(observations))
        distribution: ActionDistribution = said
        return distribution

    def predict(self, x: Values) -> Tensor:
        """Policies predict nothing.

        Raises:
            DataError: always.
        """
        raise DataError("This is a policy, which predicts nothing: ask it for actions, act(observations).")

    def to_onnx(self, path: str | Path) -> None:
        """A distribution is no tensor.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("Policies are not written as ONNX: keep this one by save (dmaml adapt --save).")

    def _own(self) -> dict[str, Any]:
        own = super()._own()[ADAPTED_KEY]
        of_policy = {"task": self.task, "returns": self.returns, "ci95": self.ci95, "best": self.best}
        return {ADAPTED_KEY: own | of_policy}


def adapt_by_acting(
    module: MetaLearning,
    config: dict[str, Any] | None,
    data: Any,
    task: Task,
    *,
    steps: int,
    rollouts: int | None,
    seed: int,
) -> AdaptedPolicy:
    """Adapt a policy to an environment; see `FewShotLearner.adapt_to`."""
    if not isinstance(data, EnvironmentDataModule):
        raise ConfigError(
            "The environments that this policy was trained in are not known: load a checkpoint of dmaml fit, or set "
            "the attribute data to their data module."
        )
    if not isinstance(task, dict):
        raise DataError(f"A task is {task!r}, but must be a dict, such as {{'goal': [0.3, -0.2]}}.")
    data.environments.check([task])
    learner, objective = module.learner, module.objective
    with torch.inference_mode(False):
        act = module.act_of(learner, steps)
        made, weighed = data.adapt_by_rollouts(act, [task], [derive_seed("adapt", seed)], rollouts)
        adapted = copy.deepcopy(module.network)
        if steps:
            batch = TaskBatch(tuple(each.samples for each in weighed), weighed[-1].samples)
            with torch.enable_grad():
                weights = weights_adapted_to(learner, objective, batch, steps)
            adapted.load_state_dict(adapted.state_dict() | weights)
    if not all(bool(weight.isfinite().all()) for weight in adapted.parameters()):
        raise DataError(f"The weights are not finite after {steps} adaptation steps: ask for fewer steps.")
    returns = torch.stack([each.returns[0] for each in made], dim=1).cpu()
    best = data.environments.best_return([task], data.horizon)
    shapes = {"sample": [made[0].observations.shape[-1]], "output": [made[0].actions.shape[-1]]}
    return AdaptedPolicy(
        adapted,
        objective,
        shapes,
        None,
        config,
        data,
        classes=(),
        steps=steps,
        support=len(returns),
        task=task,
        returns=returns.mean(0).tolist(),
        ci95=half_width(returns).tolist(),
        best=None if best is None else float(best[0]),
    )
