"""Builds model and data from the configuration that a checkpoint keeps, without running code that nobody trusts.

Such a configuration names classes. A file from someone else may name any that Python can find, and give it any
arguments, so a class is imported only from packages that are trusted, and made only if it is a network, an algorithm,
a module or a data module.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from dmaml_pl.algorithms import InnerOptimizer
from dmaml_pl.errors import CheckpointError, reason_of
from dmaml_pl.objectives import Objective

TRUSTED = ("dmaml_pl", "data_modules", "torch.nn")
EVERYTHING = "*"

_FOR_TRAINING = ("meta_optimizer", "meta_schedule")


def of_today(model: Any) -> Any:
    """The configuration of a model, also where version 0.1 wrote it, whose module was named after its algorithm."""
    if not isinstance(model, dict) or model.get("class_path") not in ("dmaml_pl.MAML", "dmaml_pl.modules.MAML"):
        return model
    settings = dict(model.get("init_args") or {})
    own = {name: settings.pop(name) for name in ("inner_lr", "inner_steps", "first_order") if name in settings}
    algorithm = {"class_path": "dmaml_pl.MAML", "init_args": own}
    return {"class_path": "dmaml_pl.MetaLearning", "init_args": settings | {"algorithm": algorithm}}


def classes_named(settings: Any) -> list[str]:
    """Every class path in a configuration but those that only a training needs, from the outermost to the innermost."""
    if isinstance(settings, dict):
        own = [settings["class_path"]] if isinstance(settings.get("class_path"), str) else []
        return own + [
            name for key, value in settings.items() if key not in _FOR_TRAINING for name in classes_named(value)
        ]
    return [name for value in settings for name in classes_named(value)] if isinstance(settings, list) else []


def is_trusted(name: str, trusted: Sequence[str]) -> bool:
    """Whether a dotted name is one of some packages and modules, or below one."""
    return EVERYTHING in trusted or any(name == each or name.startswith(f"{each}.") for each in trusted)


def build(settings: Any, kinds: tuple[type[Any], ...], trust: Sequence[str] = ()) -> Any:
    """An object of the class that settings name, as {"class_path": ..., "init_args": {...}}; of one of some kinds.

    Raises:
        CheckpointError: the class is not trusted, is missing, is of another kind, or refuses its arguments.
    """
    kind = " or ".join(each.__name__ for each in kinds)
    if not isinstance(settings, dict) or not isinstance(settings.get("class_path"), str):
        raise CheckpointError(f"it holds no configuration of a {kind}")
    path = settings["class_path"]
    made = _find(path, (*TRUSTED, *trust))
    if not issubclass(made, kinds):
        raise CheckpointError(f"it names {path}, which is not a {kind}")
    arguments = (settings.get("init_args") or {}) | (settings.get("dict_kwargs") or {})
    # What is in the checkpoint is not read from files, which may have moved.
    arguments |= dict.fromkeys(arguments.keys() & set(getattr(made, "in_checkpoint", ())))
    for name in getattr(made, "names_code", ()):
        _check_code(str(arguments.get(name, "")), trust)
    try:
        return made(**{name: _value(value, trust) for name, value in arguments.items() if name not in _FOR_TRAINING})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be made with the settings kept in it ({reason_of(error)})") from error


def _value(value: Any, trust: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_value(item, trust) for item in value]
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {name: _value(item, trust) for name, item in value.items()}
    return build(value, (nn.Module, Objective, InnerOptimizer), trust)


def _check_code(path: str, trusted: Sequence[str]) -> None:
    """Check what a setting names, to be made later: a class path, or an id of gymnasium's, which may name a module.

    Raises:
        CheckpointError: it is not trusted.
    """
    before, colon, _ = path.partition(":")
    if colon and not is_trusted(before, trusted):
        raise _stranger(path, before)
    if "." in path and not colon:
        _resolved(path, trusted)


def _find(path: str, trusted: Sequence[str]) -> type[Any]:
    found = _resolved(path, trusted)
    if not isinstance(found, type):
        raise CheckpointError(f"it names {path}, which is not a class")
    return found


def _resolved(path: str, trusted: Sequence[str]) -> Any:
    """What a dotted name means, if both where it is named and where it is from are trusted."""
    module, _, name = path.rpartition(".")
    if not is_trusted(module, trusted):
        raise _stranger(path, module)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        missing = getattr(error, "name", None)
        remedy = f": give its file, --trust FOLDER/{missing}.py" if missing in trusted else ""
        raise CheckpointError(f"it names {path}, which is not there ({reason_of(error)}){remedy}") from error
    if not is_trusted(getattr(found, "__module__", None) or module, trusted):  # imported there from elsewhere
        raise _stranger(path, module)
    return found


def _stranger(path: str, module: str) -> CheckpointError:
    return CheckpointError(
        f"it names {path}, which comes with neither dmaml_pl nor PyTorch, and a file from someone else may name any "
        f"code: if you trust it, give --trust {module.partition('.')[0] or path} (trust=[...] in Python)"
    )
