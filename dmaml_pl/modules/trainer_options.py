"""Options of Lightning and PyTorch that cannot work in runs: refused before the training, with what does it here."""

import io
import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks as lightning
from pytorch_lightning.loggers import Logger, MLFlowLogger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dmaml_pl.checks import require_kind
from dmaml_pl.errors import ConfigError, reason_of
from dmaml_pl.optimizers import AskingOptimizer

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")

AVERAGE = "for an average of merged weights, which best and last then hold, take dmaml_pl.MergedAverage"
REFUSED: dict[type[pl.Callback], str] = {
    lightning.StochasticWeightAveraging: AVERAGE,
    lightning.WeightAveraging: AVERAGE,
    lightning.LearningRateFinder: "it needs Lightning's own optimization: dmaml study sweep searches for a rate",
    lightning.BatchSizeFinder: "it needs Lightning's own optimization: set data.meta_batch, and model.task_chunk",
    lightning.GradientAccumulationScheduler: "a run makes its own steps: for a larger meta-batch set data.meta_batch",
    lightning.OnExceptionCheckpoint: "it has each training go on from what it finds: last.ckpt is kept here anyway",
    lightning.BaseFinetuning: "what learns is fixed when workers are started: set model.freeze",
    lightning.ModelPruning: "it exchanges the parameters that workers merge: prune the trained network",
}
"""Lightning's callbacks that would fail in the midst of a training, or change it in silence, and what to take."""


def check_options(trainer: Any) -> None:
    """Check precision, callbacks and loggers of a Trainer.

    Raises:
        ConfigError: names the setting, and what to take in its place.
    """
    if trainer.precision not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision is {trainer.precision}, but must be one of {', '.join(PRECISIONS)}: weights, inner "
            "steps and meta-gradients are in 32 bits always."
        )
    for callback in trainer.callbacks:
        require_kind("trainer.callbacks", callback, pl.Callback, "EarlyStopping(monitor='val/loss')")
        own = type(callback).__module__.startswith("dmaml_pl.")
        known = next((kind for kind in type(callback).__mro__ if kind in REFUSED), None)
        if known is not None and not own:
            raise ConfigError(
                f"trainer.callbacks has {type(callback).__name__}, which cannot work here: {REFUSED[known]}."
            )
    for logger in trainer.loggers:
        require_kind("trainer.logger", logger, Logger, "MLflowTracker()")
        check_logger(type(logger))


def check_logger(kind: type[Any]) -> None:
    """Check that a class of loggers does not do by halves what this package's does.

    Raises:
        ConfigError: what to take.
    """
    if issubclass(kind, MLFlowLogger):
        raise ConfigError("trainer.logger is Lightning's MLFlowLogger: take dmaml_pl.MLflowTracker, which keeps more.")


TRIED = 1000
"""So many steps of a schedule are tried before a training, which takes some milliseconds."""


def check_steps(optimizer: Optimizer, schedule: Any, meta_iterations: float) -> None:
    """Check that a meta-optimizer, of copies of the parameters, and its schedule can be stepped as a run steps them.

    Args:
        optimizer: makes one step.
        schedule: of this optimizer; None where there is none.
        meta_iterations: of the training; infinite where nothing says.

    Raises:
        ConfigError: names the setting that cannot.
    """
    _check_schedule(schedule, meta_iterations)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def closure(of: str = "loss") -> Any:
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        return torch.tensor(1.0)

    def step() -> None:
        _step_once(optimizer, closure)
        check_kept(optimizer.state_dict())
        optimizer.zero_grad()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
            raise ValueError("after it the weights are not finite")

    if schedule is not None:
        _try("meta_schedule", schedule, lambda: [float(group["lr"]) for group in optimizer.param_groups])
    closure()
    _try("meta_optimizer", optimizer, step)

    def advance() -> None:
        for _ in range(int(min(max(meta_iterations, 1), TRIED))):
            schedule.step()
            if not all(0 <= float(group["lr"]) < math.inf for group in optimizer.param_groups):
                raise ValueError(f"it leads to a learning rate of {float(optimizer.param_groups[0]['lr']):g}")

    if schedule is not None:
        _try("meta_schedule", schedule, advance)


def _step_once(optimizer: Any, closure: Any) -> None:
    """One that asks is this package's own, and asks for more than there is here; another may make its steps for it."""
    if not isinstance(optimizer, AskingOptimizer):
        optimizer.step(closure)
    elif (stepper := optimizer.stepper) is not None:
        stepper.step()


def check_kept(state: Any) -> None:
    """Write a part of a checkpoint, and read it as checkpoints are; raises whatever stands in the way."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


def _check_schedule(schedule: Any, meta_iterations: float) -> None:
    if isinstance(schedule, ReduceLROnPlateau):
        raise ConfigError(
            f"model.meta_schedule is {type(schedule).__name__}, which waits for a metric, but a schedule is stepped "
            "once a meta-iteration: take another, such as torch.optim.lr_scheduler.CosineAnnealingLR."
        )
    total = getattr(schedule, "total_steps", None)
    if total is not None and total < meta_iterations:
        wanted = "give trainer.max_steps" if math.isinf(meta_iterations) else f"set it to {meta_iterations:.0f} or more"
        raise ConfigError(
            f"model.meta_schedule.total_steps is {total}, but the training makes more meta-iterations: {wanted}."
        )


def _try(setting: str, made: Any, step: Any) -> None:
    try:
        step()
    except Exception as error:  # of a user's own class, too
        name = type(made).__name__
        raise ConfigError(
            f"model.{setting} is {name}, which cannot make a step and be kept ({reason_of(error)})."
        ) from error
