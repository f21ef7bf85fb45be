"""What a network is asked to do on a task: the loss that it adapts and meta-learns by, and the figure it is judged by.

Legend: B samples (support or query), D outputs of a regression, N ways.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dmaml_pl.errors import ConfigError

ObjectiveName = Literal["regression", "classification"]


@dataclass(frozen=True)
class Objective:
    """A loss and the metric shown for it.

    Attributes:
        name: the value of `model.objective`.
        loss: (predictions, targets) to the mean loss over the samples, a scalar.
        metric: short name of the metric, as in `val/mse`.
        title: the metric's full name.
        measure: (predictions, targets) to the mean metric over the samples, a scalar.
        better: "min" where a smaller metric is better, else "max".
    """

    name: ObjectiveName
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: str
    title: str
    measure: Callable[[Tensor, Tensor], Tensor]
    better: Literal["min", "max"]

    def check(self, prediction: Tensor, target: Tensor) -> None:
        """Check that a network's output fits the targets of a task.

        Raises:
            ConfigError: names the settings that do not fit together.
        """
        if self.name == "regression":
            if prediction.shape != target.shape:
                raise ConfigError(
                    f"The network's output has shape {tuple(prediction.shape)}, but the targets {tuple(target.shape)}: "
                    "set the network's number of outputs (model.network) to that of the data, or model.objective to "
                    "classification."
                )
        elif target.is_floating_point():
            raise ConfigError("model.objective is classification, but the data has real targets: set it to regression.")
        elif prediction.ndim != 2 or prediction.shape[1] != int(target.max()) + 1:
            raise ConfigError(
                f"The network's output has shape {tuple(prediction.shape)}, but the tasks have "
                f"{int(target.max()) + 1} ways: set the network's ways (model.network) to data.ways."
            )


def _accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """Share of samples whose largest logit is their class; prediction (B, N), target (B,)."""
    return (prediction.argmax(dim=-1) == target).to(torch.get_default_dtype()).mean()


_OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("regression", F.mse_loss, "mse", "mean squared error", F.mse_loss, "min"),
        Objective("classification", F.cross_entropy, "accuracy", "accuracy", _accuracy, "max"),
    )
}


def objective_named(name: ObjectiveName) -> Objective:
    """The objective of that name.

    Raises:
        ConfigError: there is no objective of that name.
    """
    try:
        return _OBJECTIVES[name]
    except KeyError:
        raise ConfigError(f"model.objective is {name!r}, but must be one of {', '.join(_OBJECTIVES)}.") from None
