"""The configuration that a study varies, as the command line resolves it: with every default, read from its check."""

from collections.abc import Mapping
from typing import Any, Literal

from dmaml_pl.errors import ConfigError
from dmaml_pl.tracking.store import Store


class Configuration:
    """Gives what a study asks of its configuration.

    Args:
        settings: nested, as in YAML.

    Attributes:
        metric: the validation metric that is compared: the one by which the configuration chooses its best checkpoint.
        better: which values of the metric are better.
        seed: the first seed; the others follow it.
        experiment_name: the MLflow experiment of the trainings, and of the study.
        save_dir: the folder of the store, `mlruns` by default.
        store: where MLflow runs are kept.
        tags: that the configuration gives its MLflow runs.
        run_length_setting: the name of the setting that decides about H.

    Raises:
        ConfigError: a study cannot be made of it.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        logger, seed = self.find("trainer.logger"), self.find("seed_everything")
        if not isinstance(logger, Mapping) or not str(logger.get("class_path", "")).endswith("MLflowTracker"):
            must = "must be dmaml_pl.MLflowTracker for a study"
            raise ConfigError(f"trainer.logger {must}, which reads its results from MLflow.")
        self.metric = str(self.find("checkpoint.monitor"))
        self.better: Literal["min", "max"] = "max" if self.find("checkpoint.mode") == "max" else "min"
        self.seed = seed if isinstance(seed, int) and not isinstance(seed, bool) else 0
        self.experiment_name = str(self.find("trainer.logger.experiment_name"))
        self.save_dir = str(self.find("trainer.logger.save_dir"))
        self.store = Store.find(self.find("trainer.logger.tracking_uri"), self.save_dir)
        self.tags: dict[str, str] = dict(self.find("trainer.logger.tags") or {})
        of_strategy = self.find("trainer.strategy.run_length")
        self.run_length_setting = "model.run_length" if of_strategy is None else "trainer.strategy.run_length"
        if not self.metric.startswith("val/"):
            raise ConfigError(
                f"checkpoint.monitor is {self.metric}, but a study compares by it, and so it must be a metric of the "
                "validation, such as val/loss."
            )
        if self.find("data.seed") is not None:
            raise ConfigError(
                f"data.seed is {self.find('data.seed')}, but must be null for a study: its trainings differ in "
                "seed_everything, from which the tasks then follow."
            )

    def find(self, name: str) -> Any:
        """The value of a setting, written as on the command line without `init_args`; None if there is none."""
        node: Any = self._settings
        for part in name.split("."):
            if isinstance(node, Mapping) and part not in node and "init_args" in node:
                node = node["init_args"]
            node = node.get(part) if isinstance(node, Mapping) else None
        return node

    def whole(self, name: str) -> int:
        """A setting that must be a whole number greater than zero."""
        value = self.find(name)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is {value}, but must be a whole number of at least 1 for this study.")
        return value
