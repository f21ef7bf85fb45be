"""The command line: LightningCLI, with every check that can be made before a training made before it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import set_parsing_settings
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from data_modules import TaskDataModule
from dmaml_pl.checkpoints import (
    CONFIG_KEY,
    RunCheckpoint,
    check_fits,
    check_resumable,
    find_checkpoint,
    read_checkpoint,
)
from dmaml_pl.cli import preflight, quiet
from dmaml_pl.cli.messages import ConfigParser, check_config_files, explain, explain_interpolation, explain_trainer
from dmaml_pl.console.progress import RunProgress
from dmaml_pl.errors import CheckpointError, ConfigError, DmamlError, NonFiniteError, WorkerLostError
from dmaml_pl.evaluation.predictions import PredictionWriter
from dmaml_pl.evaluation.report import MetaTestReport, print_metrics
from dmaml_pl.launching import prestarted, restarts
from dmaml_pl.launching.clusters import Launch
from dmaml_pl.launching.restarts import Restart
from dmaml_pl.launching.signals import raised_at_sigterm
from dmaml_pl.modules import FewShotModule
from dmaml_pl.provenance.commands import meta_test_command, resume_command
from dmaml_pl.serving.register import ModelRegistrar
from dmaml_pl.strategies import WorkerStrategy
from dmaml_pl.tracking import MLflowTracker
from dmaml_pl.tracking.mlflow_run import ERROR as ERROR_TAG

RUN_ID_KEY = "mlflow_run_id"
ENGINE_TAG = "dmaml.engine"
AUTO = "auto"
"""The `--ckpt_path` of a job that may be started again: `last` in `checkpoint.dirpath`, if there is one."""

RESOLVED_CHECKPOINT = "DMAML_RESOLVED_CHECKPOINT"
"""Environment variable by which worker 0 tells the workers that it starts which file `last` or `best` was."""

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C and after SIGTERM, as shells give them."""

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


class ConfigRecorder(SaveConfigCallback):
    """Keeps the resolved configuration in MLflow and in every checkpoint, and the MLflow run's id in the latter."""

    _kept: dict[str, Any] | None = None

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Log parameters and YAML of a training; a test does not change what it was trained with."""
        if stage != "fit":
            return
        text = self.parser.dump(self.config, skip_unset=False)
        for logger in trainer.loggers:
            if isinstance(logger, MLflowTracker):
                settings = {name: value for name, value in self.config.as_dict().items() if name != "config"}
                logger.log_config(settings, text)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what `model.engine: auto` came to."""
        for logger in trainer.loggers:
            if isinstance(logger, MLflowTracker) and isinstance(pl_module, FewShotModule):
                logger.set_tags({ENGINE_TAG: pl_module.engine_in_use})

    def on_save_checkpoint(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """By the id a resumed training finds its MLflow run; the configuration makes the checkpoint enough."""
        if self._kept is None:
            settings = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
            self._kept = {name: settings[name] for name in ("model", "data")}
        checkpoint[CONFIG_KEY] = self._kept
        checkpoint[RUN_ID_KEY] = next((t.version for t in trainer.loggers if isinstance(t, MLflowTracker)), None)


class DmamlCLI(LightningCLI):
    """LightningCLI over few-shot modules and task data modules."""

    trainer: pl.Trainer
    model: FewShotModule
    datamodule: TaskDataModule

    def __init__(self, prepared: threading.Event) -> None:
        self._prepared = prepared
        self._folder = Path()  # where trainings of this configuration keep their checkpoints, once that is known
        # Lets `${data.init_args.ways}` be written in a config although the parser nests it under the subcommand.
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            model_class=FewShotModule,
            datamodule_class=TaskDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=ConfigRecorder,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=ConfigParser,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "dmaml", "allow_abbrev": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's; only the one that is asked for, if it exists, as the parser of each takes a while to make."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in sys.argv[1:2] if name in every} or every

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

    def before_instantiate_classes(self) -> None:
        """A launcher that has started this process knows how many workers there are."""
        self._launch = Launch.detect()
        if self._launch is not None:
            self._launch.apply(self.config[self.subcommand]["trainer"])

    def instantiate_classes(self) -> None:
        """Lightning's; a setting that a class refuses is one line.

        Raises:
            ConfigError: what is wrong, in one line.
        """
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            raise ConfigError(explain(str(error), [])) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Lightning's Trainer with our progress bar, and without checkpoints where they are turned off."""
        callbacks = [self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys]
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, RunCheckpoint)]
        if config.get("enable_progress_bar") is not False and not config.get("barebones"):
            callbacks.append(RunProgress())
        register = self._get(self.config_init, "register")
        if register is not None and self.subcommand == "fit":
            callbacks.append(ModelRegistrar(register))
        if self._launch is not None and self._launch.environment is not None:
            given = config.get("plugins") or []
            config["plugins"] = [*(given if isinstance(given, list) else [given]), self._launch.environment]
        try:
            return self._instantiate_trainer(config, callbacks)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(explain_trainer(error, config)) from error

    def _parse_ckpt_path(self) -> None:
        """Unlike Lightning, never let a checkpoint overrule the configuration."""

    def _set_seed(self) -> None:
        """Between parsing and seeding, a spare process waits to be needed, and learns the seed."""
        prestarted.await_orders()
        try:
            super()._set_seed()
        except ValueError as error:
            seed = self._get(self.config, "seed_everything")
            raise ConfigError(f"seed_everything is {seed}, but must be from 0 to {2**32 - 1}.") from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Lightning's; what fails outside the Trainer leaves no MLflow run that seems to be running."""
        try:
            try:
                with raised_at_sigterm(SIGTERMException):
                    super()._run_subcommand(subcommand)
            except RuntimeError:
                # A worker that dies while another waits for it elsewhere than at a merge, as in a validation.
                if isinstance(self.trainer.strategy, WorkerStrategy):
                    self.trainer.strategy.await_verdict()
                raise
        except BaseException as error:
            self._tell_trackers(error)
            if isinstance(error, SIGTERMException | SystemExit | KeyboardInterrupt):
                error.add_note(self._where_to_go_on())
            raise

    def _tell_trackers(self, error: BaseException) -> None:
        if isinstance(error, WorkerLostError):  # the Trainer may have seen only the connection break
            for tracker in self._trackers():
                tracker.set_tags({ERROR_TAG: f"{type(error).__name__}: {error}"})
        if isinstance(error, SIGTERMException):
            for tracker in self._trackers():
                tracker.was_stopped()
        if not self.trainer.interrupted:  # else the Trainer has told its loggers
            for tracker in self._trackers():
                tracker.finalize("failed")

    def before_fit(self) -> None:
        """Check everything, and open the MLflow run, before workers are started."""
        self._prepare("fit")

    def before_validate(self) -> None:
        """Check everything first."""
        self._prepare("validate")

    def before_test(self) -> None:
        """Check everything first."""
        self._prepare("test")

    def before_predict(self) -> None:
        """Check everything first."""
        self._prepare("predict")

    def after_fit(self) -> None:
        """Meta-test the best checkpoint of the training."""
        wanted = self._get(self.config_init, "meta_test") and not getattr(self.trainer, "fast_dev_run", False)
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if wanted and self.trainer.state.finished:
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None, verbose=False)

    def test(self, **kwargs: Any) -> None:
        """Meta-test; our table replaces Lightning's."""
        self.trainer.test(**{**kwargs, "verbose": False})

    def validate(self, **kwargs: Any) -> None:
        """Validate; our table replaces Lightning's, which shows only what its own logging has seen."""
        self.trainer.validate(**{**kwargs, "verbose": False})
        if self.trainer.is_global_zero:
            print_metrics(self.trainer.callback_metrics)

    def predict(self, **kwargs: Any) -> None:
        """Predict; the predictions go to a file, not through memory."""
        self.trainer.predict(**{**kwargs, "return_predictions": False})

    def _where_to_go_on(self) -> str:
        """What a user types after the command was stopped, with the words that were given."""
        words = sys.argv[1:]
        if self.subcommand != "fit":
            return "Stopped. The same command begins it again."
        callback = self.trainer.checkpoint_callback
        folder = getattr(callback, "dirpath", None)
        kept = None if folder is None else Path(folder) / "last.ckpt"
        if self.trainer.state.fn == "test":
            best = getattr(callback, "best_model_path", "") or kept
            again = meta_test_command(words, str(best)) if self._launch is None else None
            return "Stopped in the meta-test; the training is finished." + (
                f" The meta-test alone:\n  {again}" if again else " dmaml test --ckpt_path best makes it alone."
            )
        if kept is None or not kept.is_file():
            return "Stopped before anything was kept. The same command begins again."
        where = f"Stopped. The last merge is kept in {_from_here(kept)}."
        if self._launch is not None:
            return f"{where} The same command with --ckpt_path last goes on from it."
        return f"{where} To go on:\n  {resume_command(words, self._shortest_name(kept))}"

    def _shortest_name(self, kept: Path) -> str:
        """`last`, where that means this file."""
        try:
            newest = find_checkpoint("last", self._folder)
        except CheckpointError:
            return _from_here(kept)
        return "last" if newest.samefile(kept) else _from_here(kept)

    def _trackers(self) -> list[MLflowTracker]:
        return [logger for logger in self.trainer.loggers if isinstance(logger, MLflowTracker)]

    def _prepare(self, stage: str) -> None:
        trainer, data = self.trainer, self.datamodule
        self._folder = self._checkpoint_folder(self._trackers())
        judged = "val" if stage in ("fit", "validate") else "test"
        self.model.check_workers_can_merge(trainer)
        if stage == "fit":
            preflight.check_trainer(trainer, data)
        data.prepare_data()
        data.setup(stage)
        self.model.check_task(data.evaluation_task("val" if judged == "val" else "test", 0))
        if stage == "fit":
            preflight.check_checkpoints(trainer, self.model)
            preflight.check_registering(trainer)
        ends_in_test = stage == "fit" and self._get(self.config_init, "meta_test")
        preflight.check_shares(trainer, data, val=judged == "val", test=judged == "test" or ends_in_test)
        preflight.check_outputs(trainer, stage, meta_test=stage == "test" or ends_in_test)
        optimizers = self.model.configure_optimizers()
        optimizer = optimizers[0][0] if isinstance(optimizers, tuple) else optimizers
        trackers = self._trackers()
        run_id = self._use_checkpoint(stage, trackers, optimizer)
        if _is_worker_zero():
            for tracker in trackers:
                if run_id is not None:
                    tracker.attach(run_id)
                tracker.open()
            if stage == "fit":
                restarts.remember_begun(trackers[0].version if trackers else None)
        self._prepared.set()

    def _checkpoint_folder(self, trackers: list[MLflowTracker]) -> Path:
        """Where trainings of this configuration keep their checkpoints."""
        chosen = getattr(self.trainer.checkpoint_callback, "dirpath", None)
        if chosen is not None:
            return Path(chosen)
        if trackers:
            return Path(trackers[0].save_dir or ".") / str(trackers[0].name)
        return Path(self.trainer.default_root_dir) / "checkpoints"

    def _wanted_checkpoint(self, stage: str, trackers: list[MLflowTracker], restart: Restart | None) -> Path | None:
        """The file to go on with, or to judge; None to start anew."""
        if restart is not None:
            return restart.checkpoint
        wanted = self._get(self.config_init, "ckpt_path")
        folder = self._checkpoint_folder(trackers)
        if wanted == AUTO:
            if stage != "fit" or getattr(self.trainer.checkpoint_callback, "dirpath", None) is None:
                raise CheckpointError(
                    "--ckpt_path auto goes on with a training that was stopped, if there is one: it is for dmaml fit, "
                    "and needs checkpoint.dirpath, a folder for this training alone."
                )
            return folder / "last.ckpt" if (folder / "last.ckpt").is_file() else None
        if wanted is None:
            if stage in ("test", "predict"):
                raise CheckpointError(f"dmaml {stage} needs --ckpt_path: give best, last or a file.")
            return None
        found = None if _is_worker_zero() else os.environ.get(RESOLVED_CHECKPOINT)
        return Path(found or find_checkpoint(str(wanted), folder))

    def _use_checkpoint(
        self, stage: str, trackers: list[MLflowTracker], optimizer: torch.optim.Optimizer
    ) -> str | None:
        """Find and check the checkpoint, if one is asked for; returns the MLflow run that it belongs to."""
        restart = restarts.current() if stage == "fit" else None
        path = self._wanted_checkpoint(stage, trackers, restart)
        asked_for = restart is None and self._get(self.config_init, "ckpt_path") != AUTO
        self.config_init[self.subcommand]["ckpt_path"] = None if path is None else str(path)
        if path is None:
            return None if restart is None else restart.mlflow_run_id
        os.environ[RESOLVED_CHECKPOINT] = str(path)
        checkpoint = read_checkpoint(path)
        check_fits(checkpoint, self.model, path)
        if stage == "fit":
            if asked_for:  # a job that is started again may only have its meta-test left to make
                preflight.check_not_done(self.trainer, checkpoint, path)
            check_resumable(checkpoint, optimizer, path)
        if _is_worker_zero():
            print(f"Using checkpoint {path}", file=sys.stderr)
        run_id = checkpoint.get(RUN_ID_KEY)
        return run_id if isinstance(run_id, str) else None


def run(arguments: list[str], front: Callable[[threading.Event], object] = DmamlCLI) -> int:
    """Run a command; returns the exit code. A user's mistake is one message on standard error, without a traceback.

    Args:
        arguments: the words after `dmaml`.
        front: what parses and runs them; it is told when all is checked by the event that it gets.
    """
    quiet.quieten()
    if restarts.was_refused():
        return 1
    prepared = threading.Event()
    words, sys.argv = sys.argv, [sys.argv[0], *arguments]  # from which the other workers are started, too
    try:
        check_config_files(arguments)
        front(prepared)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SIGTERMException as stop:
        return _stopped(TERMINATED, stop)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's answer to Ctrl-C
            return _stopped(INTERRUPTED, stop)
        raise
    except (DmamlError, MisconfigurationException, OmegaConfBaseException) as error:
        if _speaks(error, prepared=prepared.is_set()):
            print(f"dmaml: error: {_one_line(error)}", file=sys.stderr, flush=True)
            if not prepared.is_set():
                restarts.remember_refused()
        return 1
    finally:
        sys.argv = words
    return 0


def _stopped(code: int, stop: BaseException) -> int:
    if _is_worker_zero():
        print(*getattr(stop, "__notes__", ["Stopped."]), sep="\n", file=sys.stderr, flush=True)
    return code


def _from_here(path: Path) -> str:
    """The path from here, where it lies below."""
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)


def _one_line(error: Exception) -> str:
    text = explain_interpolation(error) if isinstance(error, OmegaConfBaseException) else str(error)
    return " ".join(text.split())


def _speaks(error: Exception, *, prepared: bool) -> bool:
    """Whether this process tells the user; what every worker knows alike is told once."""
    first = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
    if isinstance(error, NonFiniteError) or not prepared:
        return first
    return first or not isinstance(error, WorkerLostError)


def _is_worker_zero() -> bool:
    """Known from the environment before there is a process group."""
    return not getattr(rank_zero_only, "rank", 0)
