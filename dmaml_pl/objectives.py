"""What a network is asked to do on a task: the losses that it adapts and meta-learns by, and the metric shown for it.

Legend: B samples (support or query), D outputs of a regression, N ways.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dmaml_pl.errors import ConfigError
from dmaml_pl.tasks import Samples

ObjectiveName = Literal["regression", "classification"]
Targets = Any
"""Of one task: (B,) class numbers, (B, D) real values, or tensors by name."""


class Objective(ABC):
    """Losses and metric of one task, without the T axis; a user's own is a subclass, named by class path.

    Attributes:
        name: as in `model.objective`, and in what is saved.
        metric: short name of the metric, as in `val/mse`.
        title: the metric's full name.
        better: "min" where a smaller metric is better, else "max".
        acts: whether the metric is of what was reached by acting, such as a return, and not of query samples; it may be
            of either sign.
        inner_penalty: so many times the constraint of the support sets, each at the weights before its step, is added
            to what the meta-gradient is of.

    Examples:
        >>> objective: Objective = Regression()
        >>> objective.metric, objective.better
        ('mse', 'min')
    """

    name: str
    metric: str
    title: str
    better: Literal["min", "max"]
    acts: bool = False
    inner_penalty: float = 0.0

    @abstractmethod
    def support_loss(self, output: Any, y: Targets) -> Tensor:
        """The mean loss of the support set, a scalar, whose gradient the inner loop follows."""

    def query_loss(self, output: Any, y: Targets) -> Tensor:
        """The mean loss of the query set, a scalar, whose gradient is the meta-gradient; by default the same loss."""
        return self.support_loss(output, y)

    def constraint(self, output: Any, y: Targets) -> Tensor:
        """What an outer step must not change much, a scalar, such as the KL to the policy that acted.

        Raises:
            ConfigError: there is none, by default.
        """
        raise ConfigError(
            f"model.objective is {self.name}, which has no constraint for model.meta_optimizer: set another."
        )

    def thinned(self, samples: Samples, every: int) -> Samples:
        """About one in so many samples of each task, whose mean loss and constraint are about those of all.

        By default all of them.
        """
        return samples

    def between(self, before: Any, after: Any) -> Tensor | None:
        """How far a network's outputs are from others for the same inputs, a scalar, such as a KL; None: not shown.

        Args:
            before: outputs of a worker's own weights at the end of its run.
            after: of the merged weights.
        """
        return None

    @abstractmethod
    def measure(self, output: Any, y: Targets) -> Tensor:
        """The mean metric over the samples, a scalar."""

    @property
    def shows_its_loss(self) -> bool:
        """Whether the metric is the query loss itself, so that it need not be computed again."""
        kind = type(self)
        return kind.measure is kind.support_loss and kind.query_loss is Objective.query_loss

    def check(self, output: Any, y: Targets) -> None:
        """Check that a network's output fits the targets of a task.

        Raises:
            ConfigError: names the settings that do not fit together; by default, that it is no tensor.
        """
        if isinstance(y, dict) and "action" in y:
            raise ConfigError(
                f"model.objective is {self.name}, but the data has environments: set it to dmaml_pl.PolicyGradient."
            )
        if not isinstance(output, Tensor):
            raise ConfigError(f"model.network gives a {type(output).__name__}, but must give one tensor.")


class Regression(Objective):
    """Mean squared error, of all outputs of all samples.

    Examples:
        >>> Regression().support_loss(torch.zeros(10, 1), torch.ones(10, 1))
        tensor(1.)
    """

    name, metric, title, better = "regression", "mse", "mean squared error", "min"

    def support_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The mean squared error of predictions (B, D)."""
        return F.mse_loss(output, y)

    measure = support_loss

    def check(self, output: Tensor, y: Tensor) -> None:
        """Predictions must have the shape of the targets."""
        super().check(output, y)
        if output.shape != y.shape:
            raise ConfigError(
                f"The network's output has shape {tuple(output.shape)}, but the targets {tuple(y.shape)}: "
                "set the network's number of outputs (model.network) to that of the data, which gives targets of shape "
                "(samples, outputs), or model.objective to classification."
            )


class Classification(Objective):
    """Cross-entropy of logits, shown as accuracy.

    Examples:
        >>> Classification().measure(torch.eye(5), torch.tensor([0, 1, 2, 3, 0]))
        tensor(0.8000)
    """

    name, metric, title, better = "classification", "accuracy", "accuracy", "max"

    def support_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The mean cross-entropy of logits (B, N)."""
        return F.cross_entropy(output, y)

    def measure(self, output: Tensor, y: Tensor) -> Tensor:
        """Share of samples whose largest logit is their class."""
        return (output.argmax(dim=-1) == y).to(torch.get_default_dtype()).mean()

    def check(self, output: Tensor, y: Tensor) -> None:
        """There must be as many logits as ways."""
        super().check(output, y)
        if y.dtype not in (torch.int64, torch.uint8) or y.ndim != 1 or int(y.min()):
            given = f"{y.dtype}, of shape {tuple(y.shape)}, from {y.min():g} to {y.max():g}"
            raise ConfigError(
                f"model.objective is classification, but the data has targets of type {given}: make them one class a "
                "sample, torch.int64 from 0, or set it to regression."
            )
        if output.ndim != 2 or output.shape[1] != int(y.max()) + 1:
            raise ConfigError(
                f"The network's output has shape {tuple(output.shape)}, but the tasks have "
                f"{int(y.max()) + 1} ways: set the network's ways (model.network) to data.ways, and "
                "data.test_ways to the same, or take an algorithm for any number of ways, such as dmaml_pl.ProtoNet."
            )


_OBJECTIVES: dict[str, type[Objective]] = {known.name: known for known in (Regression, Classification)}


def objective_of(given: ObjectiveName | Objective) -> Objective:
    """The objective that `model.objective` means.

    Raises:
        ConfigError: there is no objective of that name.
    """
    if isinstance(given, Objective):
        return given
    if given not in _OBJECTIVES:
        raise ConfigError(
            f"model.objective is {given!r}, but must be {' or '.join(_OBJECTIVES)}, or the class path of an Objective."
        )
    return _OBJECTIVES[given]()
