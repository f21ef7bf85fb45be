"""The command line of trainings: LightningCLI, with every check that can be made before a training made before it."""

import inspect
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import Namespace, add_instantiator, set_parsing_settings
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.utilities import rank_zero_info

from data_modules import TaskDataModule
from dmaml_pl.checkpoints import RunCheckpoint
from dmaml_pl.cli import configs
from dmaml_pl.cli.carried import carried_over
from dmaml_pl.cli.command_line import with_strategies
from dmaml_pl.cli.messages import explain_trainer
from dmaml_pl.cli.mistakes import check_path, no_settings, options_of, prefer_classes, refuse, settings_of
from dmaml_pl.cli.recorder import ConfigRecorder
from dmaml_pl.cli.session import Session
from dmaml_pl.console.progress import RunProgress
from dmaml_pl.errors import ConfigError, DmamlError, reason_of
from dmaml_pl.evaluation.predictions import PredictionWriter
from dmaml_pl.evaluation.report import MetaTestReport, from_here, print_metrics
from dmaml_pl.launching.clusters import Launch
from dmaml_pl.modules import MetaLearning
from dmaml_pl.modules.trainer_options import check_logger
from dmaml_pl.serving.register import ModelRegistrar

TRAINER_DEFAULTS: dict[str, Any] = {
    "logger": {"class_path": "dmaml_pl.MLflowTracker"},
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "log_every_n_steps": 10,
    "val_check_interval": 1,
    "check_val_every_n_epoch": None,
}
"""Our data modules deal tasks to workers themselves, and the command line checks a task before training. Validation
comes every so many runs, whatever an epoch is."""


class Making:
    """Makes the objects of a configuration, and keeps why one could not be made.

    The parser tries what a setting may be, type by type, and tells of the first that did not do.

    Args:
        settings: the configuration.
    """

    def __init__(self, settings: Any) -> None:
        self._settings = settings
        self.refused: Exception | None = None

    def __call__(self, class_type: type[Any], *args: Any, **kwargs: Any) -> Any:
        """Make one."""
        try:
            check_logger(class_type)
            self._check_given(class_type, kwargs)
            return class_type(*args, **kwargs)
        except DmamlError as error:
            self.refused = error
            raise
        except Exception as error:  # of a user's own class, too
            setting = _setting_of(class_type.__name__, self._settings)
            is_it = f"{setting} is {class_type.__name__}, which" if setting else class_type.__name__
            # Lightning says in the first line what to install, and below it once more.
            told = ImportError(str(error).partition("\n")[0]) if isinstance(error, ImportError) else error
            self.refused = ConfigError(f"{is_it} cannot be made: {reason_of(told)}.")
            raise

    def _check_given(self, class_type: type[Any], given: dict[str, Any]) -> None:
        """The parser gives None for what has neither a type nor a default."""
        for name, each in inspect.signature(class_type).parameters.items():
            if each.annotation is each.empty is each.default and name in given and given[name] is None:
                setting = _setting_of(class_type.__name__, self._settings)
                raise ConfigError(f"Not set: {setting}.{name}, which {class_type.__name__} needs.")


def _setting_of(name: str, settings: Any, prefix: str = "") -> str:
    """The setting that names a class; nothing where none does."""
    if isinstance(settings, list):
        return next(filter(None, (_setting_of(name, each, prefix) for each in settings)), "")
    if not isinstance(settings, dict):
        return ""
    if str(settings.get("class_path")).rpartition(".")[2] == name:
        return prefix
    below = ((f"{prefix}.{key}" if key != "init_args" else prefix, each) for key, each in settings.items())
    return next(filter(None, (_setting_of(name, each, key.lstrip(".")) for key, each in below)), "")


class DmamlCLI(LightningCLI):
    """LightningCLI over few-shot modules and task data modules.

    Args:
        prepared: set when all that can be checked before a training has been.
        parsed: called when the command line has been parsed, before anything is made of it. Workers that are forked
            there go on from there.
    """

    trainer: pl.Trainer
    model: MetaLearning
    datamodule: TaskDataModule

    def __init__(self, prepared: threading.Event, parsed: Callable[[], object] = lambda: None) -> None:
        self._prepared = prepared
        self._parsed = parsed
        # Lets `${data.init_args.ways}` be written in a config although the parser nests it under the subcommand.
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            model_class=MetaLearning,
            datamodule_class=TaskDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=ConfigRecorder,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "dmaml", "allow_abbrev": False, "exit_on_error": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's; only the one that is asked for, if it exists, as the parser of each takes a while to make."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in sys.argv[1:2] if name in every} or every

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Lightning's; of the Trainer's settings that are a name or a class, a class path is the class."""
        super().add_core_arguments_to_parser(parser)
        prefer_classes(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings beside those of the Trainer, the model and the data."""
        parser.add_argument("--meta_test", type=bool, default=True, help="Meta-test the best checkpoint after fit.")
        parser.add_argument(
            "--register",
            type=str | None,
            default=None,
            help="After fit, log the best network as an MLflow model and register it by this name.",
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(MetaTestReport, "report")
        parser.add_lightning_class_args(PredictionWriter, "predictions")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Lightning's; a command line that cannot be parsed is one line, and so is what one class has of another's.

        Raises:
            ConfigError: what is wrong, in one line.
        """
        written = sys.argv  # as the user would write it again
        sys.argv = with_strategies(configs.with_files(written))
        command, *words = sys.argv[1:]
        try:
            super().parse_arguments(parser, args)
        except (DmamlError, OmegaConfBaseException):
            raise
        except Exception as error:  # also of a user's own module, when it is imported
            refuse(self._parser(command), words, error)
        else:
            given = (settings_of(*option) for option in options_of(self._parser(command), words))
            for line in carried_over(given, self.config[command].as_dict()):
                rank_zero_info(line)
        finally:
            sys.argv = written

    def before_instantiate_classes(self) -> None:
        """A launcher that has started this process knows how many workers there are.

        Raises:
            ConfigError: a section holds no settings, which the parser takes.
        """
        for section in ("trainer", *self._parser(self.subcommand).callback_keys):
            given = self.config[self.subcommand].get(section)
            if not isinstance(given, Namespace):
                raise no_settings(section, given)
        self._launch = Launch.detect()
        if self._launch is not None:
            self._launch.apply(self.config[self.subcommand]["trainer"])

    def instantiate_classes(self) -> None:
        """Lightning's; a setting that a class refuses is one line.

        Raises:
            ConfigError: what is wrong, in one line.
        """
        making = Making(self.config[self.subcommand].as_dict())
        add_instantiator(making, object)
        try:
            super().instantiate_classes()
        except DmamlError:
            raise
        except Exception as error:  # of a user's own class, too
            raise ConfigError(str(making.refused or reason_of(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Lightning's Trainer with our progress bar, and without checkpoints where they are turned off."""
        callbacks = [self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys]
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        for name in ("callbacks", "plugins"):
            given = config.get(name) or []
            config[name] = given if isinstance(given, list) else [given]
        # Lightning takes the first that keeps checkpoints for the one that decides, even if a user has added another.
        decides = [callback for callback in callbacks if isinstance(callback, RunCheckpoint)]
        callbacks = [callback for callback in callbacks if callback not in decides]
        if config.get("enable_checkpointing") is not False:
            config["callbacks"] = [*decides, *config["callbacks"]]
        own_bar = any(isinstance(callback, ProgressBar) for callback in config["callbacks"])
        if config.get("enable_progress_bar") is not False and not config.get("barebones") and not own_bar:
            callbacks.append(RunProgress())
        register = self._get(self.config_init, "register")
        if register is not None and self.subcommand == "fit":
            callbacks.append(ModelRegistrar(register))
        if self._launch is not None and self._launch.environment is not None:
            config["plugins"] = [*config["plugins"], self._launch.environment]
        for name, kind in (("strategy", Strategy), ("accelerator", Accelerator)):
            check_path(f"trainer.{name}", config.get(name), kind)
        try:
            return self._instantiate_trainer(config, callbacks)
        except DmamlError:
            raise
        except Exception as error:  # of Lightning's, and of what a setting needs and is not installed
            raise ConfigError(explain_trainer(error, config)) from error

    def _parse_ckpt_path(self) -> None:
        """Unlike Lightning, never let a checkpoint overrule the configuration."""

    def _set_seed(self) -> None:
        """Lightning's; before it is the place where workers are forked, who learn the seed from worker 0."""
        self._parsed()
        try:
            super()._set_seed()
        except ValueError as error:
            seed = self._get(self.config, "seed_everything")
            raise ConfigError(f"seed_everything is {seed}, but must be from 0 to {2**32 - 1}.") from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Lightning's, between the checks before and what trackers are told of its end."""
        self._session = self._begin_session()
        wanted = self._get(self.config_init, "ckpt_path")
        if subcommand == "fit" and self._session.supervises:
            self._supervise(wanted)
            return

        def run(checkpoint: str | None) -> None:
            self.config_init[subcommand]["ckpt_path"] = checkpoint
            self._prepared.set()
            self._among_workers(lambda: super(DmamlCLI, self)._run_subcommand(subcommand))

        self._session.carry_out(subcommand, wanted, run)

    def _supervise(self, wanted: str | None) -> None:
        """Keep workers that come and go, who do it."""
        if code := self._session.supervise(wanted):
            sys.exit(code)

    def _begin_session(self) -> Session:
        meta_test, launched = bool(self._get(self.config_init, "meta_test")), self._launch is not None
        return Session(self.trainer, self.model, self.datamodule, meta_test=meta_test, launched=launched)

    def _among_workers(self, call: Callable[[], None]) -> None:
        """Do all of it; here the Trainer starts its workers by itself."""
        call()

    def after_fit(self) -> None:
        """Meta-test the best checkpoint of the training, and say where it is."""
        self._session.meta_test_best()
        kept = self.trainer.checkpoint_callback
        best = getattr(kept, "best_model_path", "") or getattr(kept, "last_model_path", "")
        if best and self.trainer.is_global_zero:
            print(f"The checkpoint, for dmaml adapt and others:\n  {from_here(Path(best))}", flush=True)

    def test(self, **kwargs: Any) -> None:
        """Meta-test; our table replaces Lightning's."""
        self.trainer.test(**{**kwargs, "verbose": False})

    def validate(self, **kwargs: Any) -> None:
        """Validate; our table replaces Lightning's, which sorts step 10 before step 2."""
        (metrics,) = self.trainer.validate(**{**kwargs, "verbose": False})
        if self.trainer.is_global_zero:
            print_metrics(metrics)

    def predict(self, **kwargs: Any) -> None:
        """Predict; the predictions go to a file, not through memory."""
        self.trainer.predict(**{**kwargs, "return_predictions": False})
