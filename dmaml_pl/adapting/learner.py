"""A meta-learned network that is adapted to a user's own samples, and what it then says of others.

Legend: B samples (S of the support), N ways, D outputs of a regression, `...` the axes of one sample.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmaml_pl.checkpoints import CONFIG_KEY
from dmaml_pl.checkpoints.files import write_whole
from dmaml_pl.checks import require_positive
from dmaml_pl.engines.per_task import adapted_weights
from dmaml_pl.errors import DataError
from dmaml_pl.modules import MetaLearning
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import Scaling

ADAPTED_KEY = "dmaml_adapted"
"""What a file of an adapted learner holds, and no other."""

Samples = Tensor | np.ndarray | Sequence[Any]
ClassName = str | int

_REMEDY = "Make room, or give a file in a folder that can be written."


class FewShotLearner:
    """A trained module, ready to be adapted; it stays as it is, so it can be adapted to any number of tasks.

    Args:
        module: the trained module; it is put into evaluation mode, as validation and meta-test have judged it.
        config: configuration of "model" and "data" that it was built from, to be kept with what is saved.
        data: the data module of the training, which knows how to read a user's pictures.
    """

    def __init__(self, module: MetaLearning, config: dict[str, Any] | None = None, data: Any = None) -> None:
        self.module = module.eval()
        self.config = config
        self.data = data

    @property
    def objective(self) -> Objective:
        """What the network was trained for: "regression" or "classification" is its name."""
        return self.module.objective

    @property
    def steps(self) -> int:
        """Adaptation steps where none are asked for: those of training."""
        return self.module.algorithm.steps

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Axes of a "sample" and of an "output"; empty where the training did not keep them."""
        return self.module.shapes

    @property
    def scaling(self) -> Scaling | None:
        """How the units of the samples become those that the network was trained in, if they are not the same."""
        return self.module.scaling

    def to(self, device: torch.device | str) -> FewShotLearner:
        """The same learner, its weights on `device`; samples follow them there."""
        self.module.to(device)
        return self

    def adapt(self, x: Samples, y: Samples, steps: int | None = None) -> AdaptedLearner:
        """Adapt to a support set.

        Args:
            x: support samples (S, ...), like those of training: pictures as numbers from 0 to 1.
            y: for classification, the class of each sample (S,), by name or by number; there must be as many classes
                as in training. For regression, real targets (S, D), or (S,) where D is 1.
            steps: adaptation steps. By default those of training, because the meta-weights were learned to be good
                after just so many, and the best checkpoint was chosen by that. More often fit better still: the
                meta-test's table shows how far that goes.

        Raises:
            DataError: the samples do not fit the network, or there are more or fewer classes than in training.
            ConfigError: `steps` is not greater than zero.
        """
        steps = self.steps if steps is None else steps
        require_positive(steps=steps)
        network, objective = self.module.network, self.objective
        x = _scaled(as_samples(x, network, self.shapes), self.scaling)
        output = _ask(network, x)
        targets, classes = self._targets(y, x, output)
        with torch.inference_mode(False), torch.enable_grad():
            weights = adapted_weights(self.module.learner, objective, x.clone(), targets.clone(), steps)
        adapted = copy.deepcopy(network)
        adapted.load_state_dict(adapted.state_dict() | weights)
        if not all(bool(weight.isfinite().all()) for weight in adapted.parameters()):
            raise DataError(f"The weights are not finite after {steps} adaptation steps: ask for fewer steps.")
        shapes = {"sample": list(x.shape[1:]), "output": list(output.shape[1:])}
        return AdaptedLearner(
            adapted,
            objective,
            classes,
            steps=steps,
            support=len(x),
            shapes=shapes,
            scaling=self.scaling,
            config=self.config,
            data=self.data,
        )

    def save(self, path: str | Path) -> None:
        """Write weights and configuration, without what only a training needs; `dmaml_pl.load` reads it.

        Raises:
            CheckpointError: the file could not be written.
        """
        kept = {
            "state_dict": self.module.state_dict(),
            CONFIG_KEY: self.config,
            "shapes": self.shapes,
            "scaling": _plain(self.scaling),
        }
        write_whole(kept, Path(path), _REMEDY)

    def _targets(self, y: Samples, x: Tensor, output: Tensor) -> tuple[Tensor, tuple[ClassName, ...]]:
        values = y.tolist() if isinstance(y, Tensor | np.ndarray) else list(y)
        if len(values) != len(x):
            raise DataError(f"x holds {len(x)} samples, but y {len(values)}: every sample needs one.")
        if self.objective.name == "classification":
            classes = _classes(values)
            check_ways(classes, output.shape[1])
            numbers = {name: number for number, name in enumerate(classes)}
            return torch.tensor([numbers[value] for value in values], device=x.device), classes
        targets = _as_tensor(y, "y").to(output)
        if targets.ndim == 1 and output.shape[1:] == (1,):
            targets = targets.unsqueeze(1)
        if targets.shape != output.shape:
            raise DataError(
                f"y has shape {tuple(targets.shape)}, but the network was trained for targets of shape "
                f"{tuple(output.shape)}."
            )
        return targets if self.scaling is None else self.scaling.targets(targets), ()


class AdaptedLearner:
    """A network that is adapted to a task.

    Args:
        network: a plain network with the adapted weights.
        objective: what it is for.
        classes: of a classification, the names or numbers of the classes, in the order of the network's outputs.
        steps: adaptation steps that were made.
        support: support samples that they were made on.
        shapes: axes of a "sample" and of an "output".
        scaling: how the units of the samples become those that the network was trained in; None where they are the
            same.
        config: configuration that the module was built from, if it was.
        data: the data module of the training, which knows how to read a user's pictures.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        classes: tuple[ClassName, ...],
        *,
        steps: int,
        support: int,
        shapes: dict[str, list[int]],
        scaling: Scaling | None = None,
        config: dict[str, Any] | None = None,
        data: Any = None,
    ) -> None:
        self.scaling = scaling
        self.network = network.eval().requires_grad_(False)
        self.objective = objective
        self.classes = classes
        self.steps = steps
        self.support = support
        self.shapes = shapes
        self.config = config
        self.data = data

    def predict(self, x: Samples) -> Tensor:
        """What the network says of samples.

        A network with batch norm judges the samples of one call together (transductive), as in training: what it says
        of one depends on the others. `Conv4(normalization="group")` judges each alone.

        Args:
            x: samples (B, ...), like those of training.

        Returns:
            For classification the probability of each class (B, N), in the order of `classes`; for regression the
            values (B, D). On the CPU, or on the device of `x` if that is a tensor.

        Raises:
            DataError: the samples do not fit the network.
        """
        device = x.device if isinstance(x, Tensor) else torch.device("cpu")
        output = _ask(self.network, _scaled(as_samples(x, self.network, self.shapes), self.scaling))
        if self.objective.name == "classification":
            output = output.softmax(dim=-1)
        elif self.scaling is not None:
            output = self.scaling.values(output)
        return output.to(device)

    def to(self, device: torch.device | str) -> AdaptedLearner:
        """The same learner, its weights on `device`; samples follow them there."""
        self.network.to(device)
        return self

    def save(self, path: str | Path) -> None:
        """Write the adapted weights, the classes and the configuration; `dmaml_pl.load_adapted` reads it.

        Raises:
            CheckpointError: the file could not be written.
        """
        kept = {
            ADAPTED_KEY: {
                "objective": self.objective.name,
                "classes": list(self.classes),
                "steps": self.steps,
                "support": self.support,
            },
            "state_dict": self.network.state_dict(),
            CONFIG_KEY: self.config,
            "shapes": self.shapes,
            "scaling": _plain(self.scaling),
        }
        write_whole(kept, Path(path), _REMEDY)

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


def check_ways(classes: Sequence[ClassName], ways: int) -> None:
    """Check that a support set has as many classes as the network tells apart.

    Raises:
        DataError: names both numbers, and the classes.
    """
    if len(classes) != ways:
        shown = ", ".join(str(name) for name in classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise DataError(
            f"The support set has {len(classes)} classes ({shown}), but the network was trained to tell {ways} apart: "
            f"give samples of {ways} classes, or train a network with data.ways {len(classes)}."
        )


def as_samples(x: Samples, network: nn.Module, shapes: dict[str, list[int]]) -> Tensor:
    """Samples as a tensor (B, ...) where the network's weights are, and of their type.

    Raises:
        DataError: they are not like those of training.
    """
    tensor = _as_tensor(x, "x")
    if tensor.dtype == torch.uint8:
        raise DataError("x holds bytes, but pictures are numbers from 0 to 1 here: divide it by 255.")
    wanted = tuple(shapes.get("sample", tensor.shape[1:]))
    if tensor.ndim == 1 and wanted == (1,):
        tensor = tensor.unsqueeze(1)
    if tuple(tensor.shape[1:]) != wanted or not len(tensor):
        raise DataError(
            f"x has shape {tuple(tensor.shape)}, but must be one or more samples of shape {wanted}: "
            f"(B, {', '.join(map(str, wanted))})."
        )
    if not bool(tensor.isfinite().all()):
        raise DataError("x holds values that are not finite.")
    weight = next(network.parameters())
    return tensor.to(weight.device, weight.dtype)


def _scaled(x: Tensor, scaling: Scaling | None) -> Tensor:
    return x if scaling is None else scaling.inputs(x)


def _plain(scaling: Scaling | None) -> dict[str, list[float]] | None:
    return None if scaling is None else scaling._asdict()


def _as_tensor(values: Samples, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} cannot be made a tensor ({error}).") from error
    if tensor.ndim == 0 or tensor.is_complex() or tensor.dtype == torch.bool:
        raise DataError(f"{name} must be a tensor or an array of real numbers, one row for each sample.")
    return tensor.detach()


def _classes(values: list[Any]) -> tuple[ClassName, ...]:
    kinds = {type(value) for value in values}
    if kinds not in ({str}, {int}):
        raise DataError("y must hold the class of each sample, all as names or all as whole numbers: (S,).")
    return tuple(sorted(set(values)))


def _ask(network: nn.Module, x: Tensor) -> Tensor:
    """The network's output.

    Raises:
        DataError: the network cannot judge one sample alone.
    """
    try:
        with torch.no_grad():
            output: Tensor = network(x)
    except ValueError as error:
        if len(x) == 1 and "more than 1 value per channel" in str(error):
            raise DataError(
                "This network normalizes by the samples that it judges together (batch norm), and one alone is too "
                "few: give two or more at a time."
            ) from error
        raise
    return output
