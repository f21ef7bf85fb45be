"""Writes an adapted network as ONNX, the format of networks that need no PyTorch to run."""

import importlib.util
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dmaml_pl.errors import CheckpointError, ConfigError
from dmaml_pl.tasks import Scaling

PACKAGES = ("onnx", "onnxscript")


def check_can_export() -> None:
    """Check that the packages of the extra are there.

    Raises:
        ConfigError: names those that are missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"An export to ONNX needs {' and '.join(missing)}: install the extra, `pip install 'dmaml_pl[onnx]'`, or "
            f"`pip install {' '.join(missing)}`."
        )


class _Answers(nn.Module):
    """What `AdaptedLearner.predict` says, as a network."""

    def __init__(self, network: nn.Module, scaling: Scaling | None, *, classifies: bool) -> None:
        super().__init__()
        self.network, self.scaling, self.classifies = network, scaling, classifies

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities (B, N) or values (B, D) of samples (B, ...)."""
        output: Tensor = self.network(x if self.scaling is None else self.scaling.inputs(x))
        if self.classifies:
            return output.softmax(dim=-1)
        return output if self.scaling is None else self.scaling.values(output)


def export(
    network: nn.Module, shape: Sequence[int], classes: Sequence[str | int], scaling: Scaling | None, path: Path
) -> None:
    """Write an adapted network that takes samples of some shape; errors are those of `AdaptedLearner.to_onnx`."""
    check_can_export()
    answers = _Answers(network, scaling, classifies=bool(classes)).eval()
    weight = next(network.parameters())
    # Two, as a batch norm has nothing to normalize one alone by; the axis stays free.
    quiet = logging.root.manager.disable
    samples = torch.zeros(2, *shape, device=weight.device, dtype=weight.dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the exporter calls, on its way out
            logging.disable()  # of its progress
            program = torch.onnx.export(
                answers,
                (samples,),
                input_names=["x"],
                output_names=["probabilities" if answers.classifies else "values"],
                dynamic_shapes=({0: torch.export.Dim("samples", min=1)},),
                dynamo=True,
                verbose=False,
            )
    except (RuntimeError, torch.onnx.OnnxExporterError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"This network cannot be written as ONNX ({reason}): use AdaptedLearner.save.") from error
    finally:
        logging.disable(quiet)
    assert program is not None  # noqa: S101 - so it is with dynamo=True
    program.model.metadata_props["classes"] = json.dumps(list(classes))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        program.save(str(path))
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error.strerror}).") from error
