"""A network that is adapted to a user's own samples, what it says of others, and what all learners have in common.

Legend: B samples (S of the support), N ways, D outputs of a regression, `...` the axes of one sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dmaml_pl.checkpoints import CONFIG_KEY
from dmaml_pl.checkpoints.files import write_whole
from dmaml_pl.errors import DataError
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import Scaling

ADAPTED_KEY = "dmaml_adapted"
"""What a file of an adapted learner holds, and no other."""

Values = Tensor | np.ndarray | Sequence[Any]
ClassName = str | int


@dataclass(eq=False)
class Learner:
    """What a learner that is ready to be adapted and an adapted one have in common.

    Attributes:
        network: a plain network.
        objective: what it was trained for: "regression" or "classification" is its name.
        shapes: axes of a "sample" and of an "output"; empty where the training did not keep them.
        scaling: how the units of the samples become those that the network was trained in; None where they are the
            same.
        config: configuration of "model" and "data" that it was built from, if it was, to be kept with what is saved.
        data: the data module of the training, which knows how to read a user's pictures.

    Examples:
        >>> FewShotLearner(MetaLearning(MLP(), MAML())).to("cpu").objective.name
        'regression'
    """

    network: nn.Module
    objective: Objective
    shapes: dict[str, list[int]]
    scaling: Scaling | None
    config: dict[str, Any] | None
    data: Any

    def to(self, device: torch.device | str) -> Self:
        """The same learner, its weights on `device`; samples follow them there."""
        self._weights().to(device)
        return self

    def _weights(self) -> nn.Module:
        return self.network

    def _own(self) -> dict[str, Any]:
        """What is saved of this kind alone."""
        return {}

    def save(self, path: str | Path) -> None:
        """Write weights and configuration; `dmaml_pl.load` reads it, of an adapted learner `dmaml_pl.load_adapted`.

        Raises:
            CheckpointError: the file could not be written.
        """
        kept = {
            "state_dict": self._weights().state_dict(),
            CONFIG_KEY: self.config,
            "shapes": self.shapes,
            "scaling": None if self.scaling is None else self.scaling._asdict(),
        }
        write_whole(kept | self._own(), Path(path), "Make room, or give a file in a folder that can be written.")

    def _samples(self, x: Values) -> Tensor:
        """Samples as a tensor (B, ...) where the network's weights are, of their type, and in the network's units."""
        tensor = as_tensor(x, "x")
        if tensor.dtype == torch.uint8:
            raise DataError("x holds bytes, but pictures are numbers from 0 to 1 here: divide it by 255.")
        wanted = tuple(self.shapes.get("sample", tensor.shape[1:]))
        if tensor.ndim == 1 and wanted == (1,):
            tensor = tensor.unsqueeze(1)
        if tuple(tensor.shape[1:]) != wanted or not len(tensor):
            raise DataError(
                f"x has shape {tuple(tensor.shape)}, but must be one or more samples of shape {wanted}: "
                f"(B, {', '.join(map(str, wanted))})."
            )
        if not bool(tensor.isfinite().all()):
            raise DataError("x holds values that are not finite.")
        weight = next(self.network.parameters())
        tensor = tensor.to(weight.device, weight.dtype)
        return tensor if self.scaling is None else self.scaling.inputs(tensor)

    def _ask(self, x: Tensor) -> Tensor:
        """The network's output, where it can take so few samples."""
        try:
            with torch.no_grad():
                output: Tensor = self.network(x)
        except ValueError as error:
            if len(x) == 1 and any(isinstance(layer, _BatchNorm) for layer in self.network.modules()):
                raise DataError(
                    "This network normalizes by the samples that it is given together (batch norm), and one alone is "
                    "too few: give two or more at a time."
                ) from error
            raise
        return output


@dataclass(eq=False)
class AdaptedLearner(Learner):
    """A network that is adapted to a task.

    Attributes:
        classes: of a classification, the names or numbers of the classes, in the order of the network's outputs.
        steps: adaptation steps that were made.
        support: support samples that they were made on.

    Examples:
        >>> learner = FewShotLearner(MetaLearning(MLP(), MAML()))
        >>> adapted = learner.adapt(torch.rand(10, 1), torch.rand(10, 1))
        >>> adapted.predict(torch.rand(3, 1)).shape
        torch.Size([3, 1])
    """

    classes: tuple[ClassName, ...]
    steps: int
    support: int

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)

    def predict(self, x: Values) -> Tensor:
        """What the network says of samples.

        A network with batch norm sees the samples of one call together (transductive), as in training: what it says
        of one depends on the others. `Conv4(normalization="group")` sees each alone.

        Args:
            x: samples (B, ...), like those of training.

        Returns:
            For classification the probability of each class (B, N), in the order of `classes`; for regression the
            values (B, D). On the CPU, or on the device of `x` if that is a tensor.

        Raises:
            DataError: the samples do not fit the network.
        """
        device = x.device if isinstance(x, Tensor) else torch.device("cpu")
        output = self._ask(self._samples(x))
        if self.objective.name == "classification":
            output = output.softmax(dim=-1)
        elif self.scaling is not None:
            output = self.scaling.values(output)
        return output.to(device)

    def _own(self) -> dict[str, Any]:
        return {ADAPTED_KEY: {"classes": list(self.classes), "steps": self.steps, "support": self.support}}

    def to_onnx(self, path: str | Path) -> None:
        """Write the adapted network as an ONNX file that says what `predict` says, of any number of samples.

        Its input is `x` (B, ...), its output `probabilities` (B, N) or `values` (B, D); the names of the classes are in
        its metadata, under `classes`, as JSON.

        Raises:
            ConfigError: the packages of the extra `onnx` are missing, or ONNX has no words for the network.
            CheckpointError: the file could not be written.
        """
        from dmaml_pl.adapting.onnx import export  # noqa: PLC0415 - needs packages that are not always there

        export(self.network, self.shapes["sample"], self.classes, self.scaling, Path(path))


def give_shapes(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make linear layers as large as they are in weights that they are to hold, such as a head for other classes."""
    for name, layer in network.named_modules():
        kept = weights.get(f"{name}.weight")
        if isinstance(layer, nn.Linear) and kept is not None and kept.shape != layer.weight.shape:
            layer.out_features, layer.in_features = kept.shape
            for own, parameter in layer.named_parameters():
                setattr(layer, own, nn.Parameter(parameter.new_empty(weights[f"{name}.{own}"].shape)))


def as_tensor(values: Values, name: str) -> Tensor:
    """Values as a tensor of real numbers, one row for each sample.

    Raises:
        DataError: they are none.
    """
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} cannot be made a tensor ({error}).") from error
    if tensor.ndim == 0 or tensor.is_complex() or tensor.dtype == torch.bool:
        raise DataError(f"{name} must be a tensor or an array of real numbers, one row for each sample.")
    return tensor.detach()
