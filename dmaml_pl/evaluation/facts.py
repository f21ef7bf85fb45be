"""What a reader of a report must know to judge its numbers: data, network, training, versions, and how to repeat it."""

import inspect
import os
import platform
import sys
from datetime import datetime
from typing import Any

import pytorch_lightning as pl

from dmaml_pl.provenance.commands import command, meta_test_command
from dmaml_pl.provenance.environment import git_state, packages

PACKAGES = ("torch", "pytorch-lightning", "learn2learn", "numpy")


def facts_of(trainer: pl.Trainer, module: Any) -> dict[str, dict[str, Any]]:
    """Facts of a meta-test by heading and name; values are plain."""
    data = getattr(trainer, "datamodule", None)
    checkpoint = None if trainer.ckpt_path is None else str(trainer.ckpt_path)
    versions, git = packages(), git_state()
    trackers = [logger for logger in trainer.loggers if hasattr(logger, "ui_command")]
    return {
        **facts_of_settings(module, data),
        "training": {
            "meta-iterations of each worker": module.meta_iterations,
            "runs": module.runs_done,
            "tasks seen": module.tasks_seen,
            **({"steps in environments": module.env_steps} if module.env_steps else {}),
            "workers": module.trained_by or trainer.world_size,
            "seed": int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
        },
        "meta-test": {
            "checkpoint": checkpoint,
            "workers": trainer.world_size,
            "device": str(module.device),
            "engine": module.engine_in_use,
            "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        },
        "mlflow": next(({"experiment": each.name, "run": each.version} for each in trackers), {}),
        "versions": {
            "dmaml_pl": versions.get("dmaml-pl", versions.get("dmaml_pl", "unknown")),
            "python": platform.python_version(),
            **{name: versions[name] for name in PACKAGES if name in versions},
            "git commit": git.commit,
            "git clean": git.clean,
        },
        "commands": {
            "given": command(sys.argv[1:]),
            "meta-test": None if checkpoint is None else meta_test_command(sys.argv[1:], checkpoint),
        },
    }


def facts_of_settings(module: Any, data: Any) -> dict[str, dict[str, Any]]:
    """What of data and model is known from these alone."""
    return {
        "data": {} if data is None else {"class": type(data).__name__, **settings_of(data)},
        "model": {
            "network": type(module.network).__name__,
            "parameters": sum(p.numel() for p in module.network.parameters()),
            "objective": module.objective.name,
            "algorithm": type(module.algorithm).__name__,
            **settings_of(module.algorithm),
            "inner_steps": module.algorithm.steps,
        },
    }


def settings_of(thing: object) -> dict[str, Any]:
    """The arguments of an object's constructor that it keeps under the same names, where they are plain values.

    So are those that its class passes on to its base class.
    """
    names = list[str]()
    for kind in type(thing).__mro__:
        if "__init__" in vars(kind):
            parameters = inspect.signature(vars(kind)["__init__"]).parameters
            names += parameters
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
    kept = {name: getattr(thing, name, None) for name in names}
    return {name: value for name, value in kept.items() if isinstance(value, bool | int | float | str)}
