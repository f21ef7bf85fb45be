"""A meta-learned network, ready to be adapted to a user's own samples.

Legend: B samples (S of the support), N ways, D outputs of a regression, `...` the axes of one sample.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmaml_pl.adapting.adapted import AdaptedLearner, ClassName, Learner, Values, as_tensor, give_shapes
from dmaml_pl.adapting.policy import AdaptedPolicy, adapt_by_acting
from dmaml_pl.checks import require_counts
from dmaml_pl.engines.per_task import adapted_weights
from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.modules import MetaLearning
from dmaml_pl.rollouts.environments import Task


class FewShotLearner(Learner):
    """A trained module, ready to be adapted; it stays as it is, so it can be adapted to any number of tasks.

    Args:
        module: the trained module; it is put into evaluation mode, as validation and meta-test have evaluated it.
        config: configuration of "model" and "data" that it was built from.
        data: the data module of the training.

    Attributes:
        steps: adaptation steps where none are asked for: those of training.

    Examples:
        >>> learner = FewShotLearner(MetaLearning(MLP(), MAML()))
        >>> learner.adapt(torch.rand(10, 1), torch.rand(10, 1)).predict(torch.rand(3, 1)).shape
        torch.Size([3, 1])
    """

    def __init__(self, module: MetaLearning, config: dict[str, Any] | None = None, data: Any = None) -> None:
        super().__init__(module.network, module.objective, module.shapes, module.scaling, config, data)
        self.module = module.eval()
        self.steps: int = module.algorithm.steps

    def _weights(self) -> nn.Module:
        return self.module

    def adapt(self, x: Values, y: Values, steps: int | None = None) -> AdaptedLearner:
        """Adapt to a support set.

        Args:
            x: support samples (S, ...), like those of training: pictures as numbers from 0 to 1.
            y: for classification, the class of each sample (S,), by name or by number; there must be as many classes
                as in training, but for algorithms that take any number, such as `ProtoNet`. For regression, real
                targets (S, D), or (S,) where D is 1.
            steps: adaptation steps. By default those of training, because the meta-weights were learned to be good
                after just so many, and the best checkpoint was chosen by that. More often fit better still: the
                meta-test's table shows how far that goes.

        Raises:
            DataError: the samples do not fit the network, or there are more or fewer classes than in training.
            ConfigError: `steps` is not greater than zero, or the algorithm makes none.
        """
        if self.objective.acts:
            raise DataError("This policy was trained in environments, not on samples: adapt_to(task) adapts it.")
        if steps is not None and not self.module.algorithm.makes_steps:
            name = type(self.module.algorithm).__name__
            raise ConfigError(f"steps is {steps}, but {name} makes no adaptation steps: leave it out.")
        if steps is None:
            steps = self.steps
        else:
            require_counts(steps=steps)
        x = self._samples(x)
        output = self._ask(x)
        targets, classes = self._targets(y, x, output)
        with torch.inference_mode(False), torch.enable_grad():
            weights = adapted_weights(self.module.learner, self.objective, x.clone(), targets.clone(), steps)
        adapted = copy.deepcopy(self.network)
        give_shapes(adapted, weights)
        adapted.load_state_dict(adapted.state_dict() | weights)
        if not all(bool(weight.isfinite().all()) for weight in adapted.parameters()):
            raise DataError(f"The weights are not finite after {steps} adaptation steps: ask for fewer steps.")
        shapes = {"sample": list(x.shape[1:]), "output": [len(classes)] if classes else list(output.shape[1:])}
        return AdaptedLearner(
            adapted, self.objective, shapes, self.scaling, self.config, self.data, classes, steps, len(x)
        )

    def adapt_to(
        self, task: Task, steps: int | None = None, rollouts: int | None = None, seed: int = 0
    ) -> AdaptedPolicy:
        """Adapt a policy to an environment, by rollouts before each step.

        Args:
            task: what tells the environment from others of its family, such as `{"goal": [0.3, -0.2]}`.
            steps: adaptation steps; by default those of training.
            rollouts: before each step, and after the last; by default as many as in training.
            seed: of the rollouts.

        Raises:
            ConfigError: the environments take no such task, or are not known; or a number is not greater than zero.
            DataError: the network is no policy, or its weights did not stay finite.
        """
        if not self.objective.acts:
            raise DataError("This network was trained on samples, not in environments: adapt(x, y) adapts it.")
        require_counts(**{name: n for name, n in {"steps": steps, "rollouts": rollouts}.items() if n is not None})
        steps = self.steps if steps is None else steps
        return adapt_by_acting(self.module, self.config, self.data, task, steps=steps, rollouts=rollouts, seed=seed)

    def _targets(self, y: Values, x: Tensor, output: Tensor) -> tuple[Tensor, tuple[ClassName, ...]]:
        values = y.tolist() if isinstance(y, Tensor | np.ndarray) else list(y)
        if len(values) != len(x):
            raise DataError(f"x holds {len(x)} samples, but y {len(values)}: every sample needs one.")
        if self.objective.name == "classification":
            if {type(value) for value in values} not in ({str}, {int}):
                raise DataError("y must hold the class of each sample, all as names or all as whole numbers: (S,).")
            classes, ways = tuple(sorted(set(values))), output.shape[1]
            if self.module.algorithm.any_ways:
                ways = len(classes)
                if ways < 2:
                    raise DataError(
                        f"The support set has 1 class ({classes[0]}), but there must be 2 or more to tell apart."
                    )
            if len(classes) != ways:
                shown = ", ".join(str(name) for name in classes[:10]) + (", ..." if len(classes) > 10 else "")
                raise DataError(
                    f"The support set has {len(classes)} classes ({shown}), but the network was trained to tell {ways} "
                    f"apart: give samples of {ways} classes, or train a network with data.ways {len(classes)}."
                )
            numbers = {name: number for number, name in enumerate(classes)}
            return torch.tensor([numbers[value] for value in values], device=x.device), classes
        targets = as_tensor(y, "y").to(output)
        if targets.ndim == 1 and output.shape[1:] == (1,):
            targets = targets.unsqueeze(1)
        if targets.shape != output.shape:
            raise DataError(
                f"y has shape {tuple(targets.shape)}, but the network was trained for targets of shape "
                f"{tuple(output.shape)}."
            )
        return targets if self.scaling is None else self.scaling.targets(targets), ()
