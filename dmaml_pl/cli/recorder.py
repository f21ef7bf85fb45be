"""Keeps what a training was made with: its resolved configuration, in MLflow and in every checkpoint."""

from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.cli import SaveConfigCallback

from dmaml_pl.checkpoints import CONFIG_KEY
from dmaml_pl.evaluation.facts import facts_of_settings, settings_of
from dmaml_pl.tracking.tracker import MLflowTracker

RUN_ID_KEY = "mlflow_run_id"
"""Where a checkpoint holds the id of its MLflow run."""

ENGINE_TAG = "dmaml.engine"


class RunRecorder(pl.Callback):
    """Keeps the engine's name in MLflow, and the MLflow run's id in every checkpoint."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Keep what `model.engine: auto` came to."""
        for tracker in trackers(trainer):
            tracker.set_tags({ENGINE_TAG: pl_module.engine_in_use})

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


def trackers(trainer: pl.Trainer) -> list[MLflowTracker]:
    """Those of a trainer's loggers that write to MLflow."""
    return [logger for logger in trainer.loggers if isinstance(logger, MLflowTracker)]
