"""Keeps what a training was made with: its resolved configuration, in MLflow and in every checkpoint."""

import hashlib
import json
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.cli import SaveConfigCallback

from dmaml_pl.checkpoints import CONFIG_KEY
from dmaml_pl.evaluation.facts import facts_of_settings, settings_of
from dmaml_pl.tasks import ActingSource
from dmaml_pl.tracking.tracker import MLflowTracker

RUN_ID_KEY = "mlflow_run_id"
"""Where a checkpoint holds the id of its MLflow run."""

ENGINE_TAG = "dmaml.engine"


class RunRecorder(pl.Callback):
    """Keeps the engine's name and the data set in MLflow, and the MLflow run's id in every checkpoint."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Keep what `model.engine: auto` came to, and what is trained on."""
        data: Any = getattr(trainer, "datamodule", None)
        for tracker in trackers(trainer) if trainer.is_global_zero else ():
            tracker.set_tags({ENGINE_TAG: pl_module.engine_in_use})
            if data is not None:
                settings = facts_of_settings(pl_module, data)["data"]
                source = next(
                    (settings[name] for name in ("root", "path") if settings.get(name)), type(data).__module__
                )
                tracker.log_data(type(data).__name__, str(source), _digest(data, settings), settings)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """By the id a resumed training finds its MLflow run."""
        checkpoint[RUN_ID_KEY] = next((tracker.version for tracker in trackers(trainer)), None)


class SettingsRecorder(RunRecorder):
    """Keeps what is known of the settings where module and data were made in Python."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Log them as parameters."""
        settings = facts_of_settings(pl_module, getattr(trainer, "datamodule", None)) | {
            "strategy": {"class": type(trainer.strategy).__name__, **settings_of(trainer.strategy)},
            "trainer": {"devices": trainer.world_size, "max_steps": trainer.max_steps},
        }
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_hyperparams(settings)


class ConfigRecorder(RunRecorder, SaveConfigCallback):
    """Keeps the resolved configuration in MLflow and in every checkpoint."""

    _kept: dict[str, Any] | None = None

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Log parameters and YAML of a training; a test does not change what it was trained with."""
        if stage != "fit":
            return
        text = self.parser.dump(self.config, skip_unset=False)
        settings = {name: value for name, value in self.config.as_dict().items() if name != "config"}
        for tracker in trackers(trainer):
            tracker.log_config(settings, text)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The configuration makes the checkpoint enough."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._kept is None:
            settings = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
            self._kept = {name: settings[name] for name in ("model", "data")}
        checkpoint[CONFIG_KEY] = self._kept


def _digest(data: Any, settings: dict[str, Any]) -> str:
    """Of the settings, and of what a task of training and one of the meta-test hold; of environments, the settings."""
    content = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for split in () if isinstance(data, ActingSource) else ("train", "test"):
        content.update(data.evaluation_task(split, 0).support_x.contiguous().numpy().tobytes())
    return content.hexdigest()[:8]


def trackers(trainer: pl.Trainer) -> list[MLflowTracker]:
    """Those of a trainer's loggers that write to MLflow."""
    return [logger for logger in trainer.loggers if isinstance(logger, MLflowTracker)]
