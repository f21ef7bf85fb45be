"""The objects that settings name: which of them an error is of, and what all of them are asked before the work."""

import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.profilers import PassThroughProfiler

from dmaml_pl.checkpoints import RunCheckpoint
from dmaml_pl.checks import require_folder
from dmaml_pl.cli.recorder import RunRecorder
from dmaml_pl.console.progress import RunProgress
from dmaml_pl.errors import ConfigError, is_their_file, reason_of
from dmaml_pl.evaluation.predictions import PredictionWriter
from dmaml_pl.evaluation.report import MetaTestReport
from dmaml_pl.modules import MetaLearning
from dmaml_pl.modules.trainer_options import check_kept
from dmaml_pl.serving.register import ModelRegistrar
from dmaml_pl.tracking.tracker import MLflowTracker

Part = tuple[str, Any]
"""A setting, and the object that was made of it."""

_OF_CALLBACKS: dict[type[pl.Callback], str] = {
    RunCheckpoint: "checkpoint",
    MetaTestReport: "report",
    PredictionWriter: "predictions",
    ModelRegistrar: "register",
    RunProgress: "trainer.enable_progress_bar",
}
_HOOKS = (RunCheckpoint, RunProgress)
"""Callbacks of ours with the hooks that Lightning's have not."""

_PLACES = ("dirpath", "save_dir")
"""Attributes by which Lightning's callbacks, loggers and profilers say where they write."""


_ALWAYS = ("datamodule", "model")
"""What the Trainer hands from function to function, whatever it does."""

_OF_SEVERAL = ("trainer.callbacks", "trainer.plugins")


def parts_of(trainer: Any, model: Any, data: Any) -> Iterator[Part]:
    """What the settings of a training came to; of the Trainer, what it has so far."""
    yield "data", data
    yield from ((f"model.{name}", getattr(model, name, None)) for name in ("network", "algorithm", "objective"))
    for callback in trainer.callbacks:
        if not isinstance(callback, RunRecorder):
            yield _OF_CALLBACKS.get(type(callback), "trainer.callbacks"), callback
    yield from (("trainer.logger", logger) for logger in trainer.loggers)
    yield from (("model.meta_optimizer", optimizer) for optimizer in trainer.optimizers)
    yield from (("model.meta_schedule", each.scheduler) for each in trainer.lr_scheduler_configs)
    strategy = trainer.strategy
    yield "trainer.strategy.merge", getattr(strategy, "merge_rule", None)
    plugins = (getattr(strategy, name, None) for name in ("cluster_environment", "precision_plugin", "checkpoint_io"))
    # Those of Lightning and ours have no settings that fail, and are on the way of all that does.
    libraries = ("dmaml_pl.", "lightning_fabric.", "pytorch_lightning.", "builtins")
    yield from (("trainer.plugins", each) for each in plugins if not type(each).__module__.startswith(libraries))
    if not isinstance(trainer.profiler, PassThroughProfiler):
        yield "trainer.profiler", trainer.profiler
    if not type(strategy).__module__.startswith("dmaml_pl."):
        yield "trainer.strategy", strategy
    if type(model) is not MetaLearning:
        yield "model", model


def blame(error: BaseException, parts: Iterable[Part]) -> None:
    """Note on an error which setting it is of: that whose object has a method, or is in use, furthest in."""
    settings: dict[type, str] = {}  # of a type, as copies are tried before the work
    for setting, made in parts:
        settings.setdefault(type(made), f"{_said(setting, made)}, which failed")
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
    # Of our own frames only what they call: all parts of a training go through them.
    in_use = [
        value.__self__ if isinstance(value, MethodType) else value
        for frame in frames
        for name, value in frame.f_locals.items()
        if name not in _ALWAYS
        and (isinstance(value, MethodType) or not str(frame.f_globals.get("__name__")).startswith("dmaml_pl."))
    ]
    at_work = [(frame.f_locals.get("self"), is_their_file(frame.f_code.co_filename)) for frame in frames]
    at_work.sort(key=lambda each: not each[1])  # what a user's own code has called is not to blame
    for made in (*(made for made, _ in at_work), *in_use):
        if made is not None and type(made) in settings:
            error.add_note(settings[type(made)])
            return


def check_parts(parts: Iterable[Part], *, writes: bool) -> None:
    """Check that methods of a user's own can be called as those that they replace, and that places can be written.

    Args:
        parts: all.
        writes: whether callbacks and profilers keep something, as in a training.

    Raises:
        ConfigError: names the setting.
    """
    for setting, made in parts:
        _check_methods(setting, made)
        # The tracker tells of its own, and the training's own checkpoints are looked at with their default.
        if not isinstance(made, MLflowTracker | RunCheckpoint) and (writes or setting == "trainer.logger"):
            for name in (each for each in _PLACES if inspect.getattr_static(made, each, None) is not None):
                place, named = getattr(made, name, None), f"{_said(setting, made)}, whose {name}"
                if not isinstance(place, str | Path | None):
                    raise ConfigError(f"{named} is {place!r}, but must be a path.")
                if place and "://" not in str(place):
                    require_folder(named, Path(place))
        if isinstance(made, ModelCheckpoint) and writes and not isinstance(made, RunCheckpoint):
            _check_name(setting, made)
        if isinstance(made, pl.Callback):
            _check_kept(setting, made)


def _said(setting: str, made: Any) -> str:
    return f"{setting} {'has' if setting in _OF_SEVERAL else 'is'} {type(made).__name__}"


def _check_methods(setting: str, made: Any) -> None:
    kinds = [*type(made).__mro__, *(_HOOKS if isinstance(made, pl.Callback) else ())]
    theirs = [kind for kind in kinds if is_their_file(getattr(sys.modules[kind.__module__], "__file__", None) or "<")]
    known = {name for kind in kinds if kind not in theirs for name in vars(kind)}
    for name in {name for kind in theirs for name in vars(kind) if not name.startswith("__")}:
        if name.startswith("on_") and name not in known and (near := get_close_matches(name, known, 1, 0.9)):
            raise ConfigError(f"{_said(setting, made)}, whose {name} nothing calls. Did you mean {near[0]}?")
        found = [vars(kind).get(name) for kind in kinds if kind not in theirs]
        replaced = next((each for each in found if isinstance(each, FunctionType)), None)
        takes = [] if replaced is None else list(inspect.signature(replaced).parameters.values())[1:]
        if not takes or any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in takes):
            continue  # nothing says how it is called
        if not callable(getattr(made, name)):
            raise ConfigError(f"{_said(setting, made)}, whose {name} is {getattr(made, name)!r}, but must be a method.")
        needed = [each for each in takes if each.default is each.empty]
        by_place = [each for each in needed if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
        by_name = {each.name: None for each in needed if each.kind is each.KEYWORD_ONLY}
        try:
            inspect.signature(getattr(made, name)).bind(*by_place, **by_name)
        except TypeError as error:
            gets = ", ".join(each.name for each in needed)
            raise ConfigError(
                f"{_said(setting, made)}, whose {name} cannot be called ({error}): it gets ({gets})."
            ) from error


def _check_kept(setting: str, made: pl.Callback) -> None:
    state = None
    with suppress(Exception):  # before there is anything to keep
        state = made.state_dict()
    try:
        check_kept({made.state_key: state})
    except Exception as error:
        raise ConfigError(f"{_said(setting, made)}, whose state cannot be kept ({reason_of(error)}).") from error


def _check_name(setting: str, made: ModelCheckpoint) -> None:
    try:
        name = made.format_checkpoint_name({"epoch": torch.tensor(0), "step": torch.tensor(0)})
    except Exception as error:
        raise ConfigError(
            f"{_said(setting, made)}, whose filename is {made.filename!r}, of which no name can be made "
            f"({reason_of(error)})."
        ) from error
    place = Path(made.dirpath or "") / name
    if place.is_absolute() and "://" not in str(place):
        require_folder(f"{_said(setting, made)}, whose filename", place.parent)
