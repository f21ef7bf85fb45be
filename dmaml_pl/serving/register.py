"""Logs and registers the trained network as an MLflow model, which adapts to the support set of every request.

Legend: S support samples, Q query samples.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
from packaging.requirements import Requirement

from dmaml_pl.adapting.learner import FewShotLearner
from dmaml_pl.adapting.loading import load
from dmaml_pl.adapting.recipe import EVERYTHING, TRUSTED, classes_named, is_trusted
from dmaml_pl.errors import ConfigError
from dmaml_pl.tasks import ActingSource, Scaling, TaskBatch
from dmaml_pl.tracking.tracker import MLflowTracker

if TYPE_CHECKING:
    from mlflow.models import Model

SERVED = Path(__file__).with_name("model.py")
OWN = ("dmaml_pl", "data_modules")


class ModelRegistrar(pl.Callback):
    """At the end of a training, worker 0 logs the best network as an MLflow model, and registers it.

    Args:
        name: of the registered model, of which every training makes a new version.

    Raises:
        ConfigError: MLflow takes no such name.
    """

    def __init__(self, name: str) -> None:
        if not name.strip() or re.search("[/:]", name) or not name.isprintable():
            raise ConfigError(f"register is {name!r}, but must be a name without / and :.")
        self.name = name

    def check(self, trainer: pl.Trainer, data: Any = None) -> None:
        """Check that there will be something to log, and where.

        Raises:
            ConfigError: names the setting of the Trainer, or the data has environments.
        """
        if isinstance(data, ActingSource):
            raise ConfigError(
                f"register is {self.name}, but a policy adapts by acting in environments, which no request brings: "
                "leave it out."
            )
        if not any(isinstance(logger, MLflowTracker) for logger in trainer.loggers):
            raise ConfigError(f"register is {self.name}, which needs trainer.logger to be dmaml_pl.MLflowTracker.")
        if not trainer.checkpoint_callbacks:
            raise ConfigError(f"register is {self.name}, which needs trainer.enable_checkpointing to be true.")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Worker 0 logs; a failure of the store costs the model only, and is told in one line."""
        if not trainer.is_global_zero:
            return
        callback: Any = trainer.checkpoint_callback
        path = callback.best_model_path or callback.last_model_path
        learner = load(path, trust=[EVERYTHING])  # this training's own
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # Lightning declares it nowhere
        task = data.evaluation_task("val", 0)
        for tracker in trainer.loggers:
            if isinstance(tracker, MLflowTracker):
                version = tracker.log_model(self.name, partial(save_model, learner, task))
                if version is not None:
                    print(f"Registered in MLflow: models:/{self.name}/{version}", flush=True)


def save_model(learner: FewShotLearner, task: TaskBatch, folder: Path, model: Model | None = None) -> None:
    """Write a learner as an MLflow model that holds all it needs but the packages: weights, settings, code.

    Args:
        learner: the trained network.
        task: a task (no T axis), the example of what to send.
        folder: where to; must not be there, or be empty.
        model: MLflow's record of it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # MLflow's, of type hints of its own
        import mlflow.pyfunc  # noqa: PLC0415 - takes seconds, and worker 0 alone needs it
        from mlflow.models import infer_signature  # noqa: PLC0415 - the same

    example = _example(task, learner.scaling)
    example["query_x"] = example["query_x"][:2]
    answers = np.zeros((2, *learner.shapes["output"]), np.float32)
    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary) / "weights.pt"
        learner.save(weights)
        mlflow.pyfunc.save_model(
            folder,
            mlflow_model=model,
            python_model=str(SERVED),
            artifacts={"checkpoint": str(weights)},
            signature=infer_signature(example, answers, {"steps": learner.steps}),
            input_example=example,
            pip_requirements=_requirements(),
            code_paths=_code(classes_named(learner.config)),
        )


def _example(task: TaskBatch, scaling: Scaling | None) -> dict[str, np.ndarray]:
    """A request of a task's samples, in the units of the data."""
    if scaling is not None:
        inputs = Scaling(scaling.x_mean, scaling.x_scale, scaling.x_mean, scaling.x_scale)
        task = TaskBatch.of(
            inputs.values(task.support_x), scaling.values(task.support_y), inputs.values(task.query_x), task.query_y
        )
    return {name: getattr(task, name).cpu().numpy() for name in ("support_x", "support_y", "query_x")}


def _requirements() -> list[str]:
    """What dmaml_pl requires, in the versions that are installed."""
    wanted = [Requirement(line) for line in importlib.metadata.requires("dmaml_pl") or []]
    return [
        f"{each.name}=={importlib.metadata.version(each.name)}"
        for each in wanted
        if each.marker is None or each.marker.evaluate({"extra": ""})
    ]


def _code(names: list[str]) -> list[str]:
    """Files and folders of dmaml_pl, and of a user's own modules that the configuration names classes of."""
    foreign = {name.partition(".")[0] for name in names if not is_trusted(name, TRUSTED)}
    paths = []
    for root in (*OWN, *sorted(foreign)):
        file = Path(str(importlib.import_module(root).__file__))
        if root in OWN or "site-packages" not in file.parts:
            paths.append(str(file.parent if file.name == "__init__.py" else file))
    return paths
