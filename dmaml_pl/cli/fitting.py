"""`dmaml_pl.fit`: a training from Python or in a notebook, with all that the command `dmaml fit` gives."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import yaml
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.loggers import Logger

from data_modules import TaskDataModule
from dmaml_pl.checkpoints import RunCheckpoint
from dmaml_pl.checks import require_kind
from dmaml_pl.cli import quiet
from dmaml_pl.cli.command_line import check_config_files
from dmaml_pl.cli.messages import explain_interpolation, explain_trainer
from dmaml_pl.cli.recorder import SettingsRecorder
from dmaml_pl.cli.result import TrainingResult
from dmaml_pl.cli.session import Session
from dmaml_pl.cli.training import TRAINER_DEFAULTS, DmamlCLI
from dmaml_pl.console.progress import RunProgress
from dmaml_pl.errors import ConfigError, DmamlError
from dmaml_pl.evaluation.report import MetaTestReport
from dmaml_pl.launching.workers import WorkerLauncher
from dmaml_pl.modules import MetaLearning
from dmaml_pl.strategies.dmaml import COMMAND_ONLY
from dmaml_pl.tracking.tracker import MLflowTracker


def fit(
    model: MetaLearning | str | Path,
    data: TaskDataModule | Mapping[str, Any] | None = None,
    *,
    meta_test: bool = True,
    ckpt_path: str | Path | None = None,
    **trainer: Any,
) -> TrainingResult:
    """Train, then meta-test the best checkpoint, as the command `dmaml fit` does.

    A module and its data, with the Trainer's settings: `fit(module, Sinusoid(), max_steps=1000, devices=2)`. Or a
    configuration, with settings laid over it: `fit("configs/sinusoid.yaml", {"trainer.max_steps": 1000})`.

    There is a progress bar, a table, figures, `report.md`, checkpoints, and an MLflow run. With several workers the
    others are forked from this process and end with the training: what comes after `fit` is done once. They compute
    with one thread each.

    Args:
        model: what is trained; or a configuration, as `--config` of the command takes it.
        data: where tasks come from; or, with a configuration, single settings by the names that the command has.
        meta_test: whether to meta-test the best checkpoint.
        ckpt_path: a checkpoint to go on from: a file, `last` or `best`.
        trainer: settings of Lightning's Trainer, with the defaults of the command: MLflowTracker as the `logger`,
            strategy "dmaml", validation after every run. `max_steps` (meta-iterations of each worker), `max_epochs`
            or `max_time` must be given. Among `callbacks`, a `RunCheckpoint` or `MetaTestReport` of your own replaces
            ours; the best checkpoint is by default that with the best metric of validation.

    Returns:
        The finished training: its metrics, its meta-test, and its files.

    Raises:
        DmamlError: a setting cannot work, in one line that names it; or a worker was lost.
        KeyboardInterrupt: the training was stopped; what was merged is kept, and a line says how to go on.

    Examples:
        >>> module, data = MetaLearning(MLP()), Sinusoid(val_tasks=2)
        >>> training = fit(module, data, max_steps=2, logger=False, meta_test=False)
        >>> training.metrics["val/mse"] > 0
        True
    """
    quiet.quieten()
    with _stopped_in_words():
        if isinstance(model, str | Path):
            if trainer:
                raise ConfigError(
                    f"{min(trainer)} is given beside a configuration, over which settings are laid by their whole "
                    f'names: fit("{model}", {{"trainer.{min(trainer)}": {trainer[min(trainer)]!r}}}).'
                )
            if isinstance(data, TaskDataModule):
                raise ConfigError(f"{model} says what data there is: give settings by name, or a module instead.")
            return _fit_configuration(str(model), dict(data or {}) | {"meta_test": meta_test, "ckpt_path": ckpt_path})
        require_kind("model", model, MetaLearning, "MetaLearning(MLP())")
        require_kind("data", data, TaskDataModule, "Sinusoid()")
        made = _trainer(model, trainer)
        session = Session(made, model, cast("TaskDataModule", data), meta_test=meta_test)
        if session.supervises:
            raise ConfigError(COMMAND_ONLY)

        def train(checkpoint: str | None) -> TrainingResult:
            return among_workers(made, lambda: _train(session, checkpoint))

        return session.carry_out("fit", None if ckpt_path is None else str(ckpt_path), train)


def _train(session: Session, checkpoint: str | None) -> TrainingResult:
    session.trainer.fit(session.model, datamodule=session.data, ckpt_path=checkpoint)
    return _meta_test(session)


def _meta_test(session: Session) -> TrainingResult:
    metrics = dict(session.trainer.callback_metrics)
    session.meta_test_best()
    return TrainingResult.of(session.trainer, session.model, metrics | session.trainer.callback_metrics)


def _trainer(model: MetaLearning, settings: Mapping[str, Any]) -> pl.Trainer:
    given = settings.get("callbacks") or []
    callbacks = [*given] if isinstance(given, list | tuple) else [given]
    if settings.get("enable_checkpointing") is not False and not _one_of(callbacks, RunCheckpoint):
        objective = model.objective
        # Lightning takes the first that keeps checkpoints for the one that decides.
        callbacks.insert(0, RunCheckpoint(monitor=f"val/{objective.metric}", mode=objective.better))
    if not _one_of(callbacks, MetaTestReport):
        callbacks.append(MetaTestReport())
    if settings.get("enable_progress_bar") is not False and not _one_of(callbacks, RunProgress):
        callbacks.append(RunProgress())
    defaults = TRAINER_DEFAULTS | {"logger": MLflowTracker(), "strategy": "dmaml", "max_epochs": -1}
    config = {**defaults, **settings, "callbacks": [*callbacks, SettingsRecorder()]}
    if settings.get("max_steps", -1) == -1 and not {"max_epochs", "max_time"} & settings.keys():
        raise ConfigError("Not set: max_steps, the meta-iterations of each worker. Give fit(..., max_steps=1000).")
    if isinstance(config["logger"], str):  # else each letter of it would be one
        require_kind("trainer.logger", config["logger"], Logger, "MLflowTracker()")
    if isinstance(config["strategy"], str):
        import dmaml_pl.strategies  # noqa: F401, PLC0415 - Lightning then knows them by their names
    try:
        return pl.Trainer(**config)
    except DmamlError:
        raise
    except Exception as error:  # of Lightning's, and of what a setting needs and is not installed
        raise ConfigError(explain_trainer(error, config)) from error


def _one_of(callbacks: list[Any], kind: type[pl.Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def among_workers(trainer: Any, call: Callable[[], TrainingResult]) -> TrainingResult:
    """Call a function among the trainer's workers, who are forked for it where they are ours."""
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, WorkerLauncher):
        return call()
    launcher.forks = True
    result: TrainingResult = launcher.launch(call)
    return result


class _Called(DmamlCLI):
    """The command line, called from Python.

    Attributes:
        result: what came of it.
    """

    result: TrainingResult

    def _among_workers(self, call: Callable[[], None]) -> None:
        def train() -> TrainingResult:
            call()
            return self.result

        self.result = among_workers(self.trainer, train)

    def _supervise(self, wanted: str | None) -> None:
        """Workers that come and go are no part of this process."""
        raise ConfigError(COMMAND_ONLY)

    def after_fit(self) -> None:
        """Meta-test, and keep what came of all."""
        self.result = _meta_test(self._session)


def _fit_configuration(config: str, settings: Mapping[str, Any]) -> TrainingResult:
    words = ["fit", "--config", config]
    words += [f"--{name}={_as_yaml(value)}" for name, value in settings.items() if value is not None]
    before, sys.argv = sys.argv, ["dmaml", *words]  # which Lightning reads, and by which a report says how to repeat it
    try:
        check_config_files(words)
        return _Called(threading.Event()).result
    except OmegaConfBaseException as error:
        raise ConfigError(explain_interpolation(error)) from error
    finally:
        sys.argv = before


def _as_yaml(value: Any) -> str:
    if isinstance(value, str | Path):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("\n...\n").strip()


@contextlib.contextmanager
def _stopped_in_words() -> Iterator[None]:
    """Lightning ends the process at Ctrl-C, which is not for a function to do."""
    try:
        yield
    except BaseException as stop:
        interrupted = isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt)
        for note in getattr(stop, "__notes__", ()) if interrupted or isinstance(stop, SystemExit) else ():
            print(note, file=sys.stderr, flush=True)
        if isinstance(stop, SystemExit) and interrupted:
            raise KeyboardInterrupt from None
        raise
