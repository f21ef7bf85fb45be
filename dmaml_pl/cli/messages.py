"""One line for each mistake in a configuration: the setting, and what it may be.

The parser and the Trainer refuse it; what is wrong is then found here by asking them again, setting by setting, so that
nothing hangs on the words in which they refuse.
"""

from __future__ import annotations

import importlib
import inspect
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import reduce
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import pytorch_lightning as pl
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from dmaml_pl.cli.command_line import given_settings, laid_over, options, suggest
from dmaml_pl.errors import ConfigError

_NEEDED = ("data", "model")
_ADVICE = {
    "strategy": ", but must be dmaml, auto, or a strategy's class path",
    "accelerator": ", but must be auto, cpu, or one that this machine has",
    "devices": ", which cannot be had",
}


def refuse(parser: ArgumentParser, words: list[str], error: Exception) -> NoReturn:
    """Say in one line why the parser has refused a command line.

    Args:
        parser: the command's.
        words: those after the command.
        error: what the parser has raised; its own reason is given where no setting is found to be wrong.

    Raises:
        ConfigError: always.
    """
    known = _typed_settings(parser)
    groups = {name.partition(".")[0] for name in known} | {"config"}
    for name, value in options(words):
        if not name:
            close = f" Did you mean --config {value}?" if str(value).endswith((".yaml", ".yml")) else ""
            raise ConfigError(
                f"{value} is not a setting: those are given as --NAME VALUE, and files as --config FILE.{close}"
            )
        if value is None and name.partition(".")[0] in groups:
            raise ConfigError(f"{name} has no value: give one after --{name}.")
    settings: dict[str, Any] = {}
    for name, value in given_settings(words, known):
        if name not in known and name not in groups:
            # Where even the first word is unknown, that is what is misspelt.
            group = name.partition(".")[0]
            told, near = (name, list(known)) if group in groups else (group, sorted(groups))
            raise ConfigError(f"{told} is not a setting.{suggest(told, near)} dmaml COMMAND --help lists all.")
        settings[name] = laid_over(settings.get(name, _default_class(known.get(name))), value)
    for name, value in _resolved(settings).items():
        check_value(name, _type(known.get(name)), value)
    missing = ", ".join(name for name in _NEEDED if name not in settings)
    if missing:
        raise ConfigError(f"Not set: {missing}. Give a --config file, such as configs/sinusoid.yaml.")
    raise ConfigError(innermost(error))


def innermost(error: BaseException) -> str:
    """The reason from which all others of an error follow, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


def _typed_settings(parser: ArgumentParser) -> dict[str, Any]:
    """The parser's actions that take a value of some type, by their full names."""
    actions = {action.dest: action for action in parser._actions}  # noqa: SLF001 - there is no public list of them
    return {name: action for name, action in actions.items() if _type(action) and not name.endswith(".help")}


def _type(action: Any) -> Any:
    return getattr(action, "_typehint", None)


def _default_class(action: Any) -> dict[str, Any] | None:
    default = getattr(action, "default", None)
    return {"class_path": default["class_path"]} if isinstance(default, Mapping) and "class_path" in default else None


def _resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with what they refer to in place; as they are where that is a default, which stands nowhere here."""
    try:
        tree = OmegaConf.create()
        for name, value in settings.items():
            OmegaConf.update(tree, name, value)
        resolved: Any = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException:
        return settings
    return {name: reduce(lambda group, key: group[key], name.split("."), resolved) for name in settings}


def check_value(name: str, wanted: Any, value: Any) -> None:
    """Check one setting, down to the innermost class that it names.

    Args:
        name: of the setting.
        wanted: its type; None: unknown.
        value: as it stands in a file or on the command line; what refers to another setting is not looked into.

    Raises:
        ConfigError: why it is refused, in one line.
    """
    if wanted is None or (isinstance(value, str) and "${" in value):
        return
    if isinstance(value, str) and value.startswith(("[", "{")):
        with suppress(yaml.YAMLError):
            value = yaml.safe_load(value)
    members = list(_members(wanted))
    if isinstance(value, list):
        for item in [get_args(member)[0] for member in members if _is_list(member) and get_args(member)]:
            for each in value:
                check_value(name, item, each)
    bases = [member for member in members if _classes(member)]
    if bases and isinstance(value, dict):
        _check_class(name, bases, value)
    elif not _takes(wanted, value):
        if bases and isinstance(value, str) and ("." in value or set(members) <= {*bases, types.NoneType}):
            _check_class(name, bases, {"class_path": value})
        raise ConfigError(f"{name} is {str(value)!r}, but must be {_alternatives(members)}.")


def _members(wanted: Any) -> Iterator[Any]:
    if get_origin(wanted) in (Union, types.UnionType):
        for member in get_args(wanted):
            yield from _members(member)
    else:
        yield wanted


def _classes(wanted: Any) -> list[type]:
    """The classes, one of which must be given by its path: the type itself, or what a callable returns."""
    if get_origin(wanted) is Callable:
        return [member for member in _members(get_args(wanted)[-1]) if inspect.isclass(member)]
    plain = get_origin(wanted) or not inspect.isclass(wanted) or wanted.__module__ == "builtins" or _is_list(wanted)
    return [] if plain else [wanted]


def _is_list(wanted: Any) -> bool:
    origin = get_origin(wanted) or wanted
    listed = inspect.isclass(origin) and issubclass(origin, Iterable) and not issubclass(origin, str | bytes | Mapping)
    return listed and origin.__module__ in ("builtins", "collections.abc")  # a tensor can be walked, too


def _takes(wanted: Any, value: Any) -> bool:
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=wanted)
        parser.parse_object({"value": value})
    except ArgumentError:
        return False
    except (ValueError, TypeError):  # a type of which the parser itself knows nothing
        return True
    return True


def _alternatives(members: list[Any]) -> str:
    choices = {
        str(choice): repr(choice) for each in members if get_origin(each) is Literal for choice in get_args(each)
    }
    others = [member for member in members if get_origin(member) is not Literal and member is not types.NoneType]
    names = dict.fromkeys("list" if _is_list(member) else _name(_classes(member) or [member]) for member in others)
    some = [f"one of {', '.join(choices.values())}"] if choices else []
    some += [f"of type {' or '.join(names)}"] if names else []
    return " or ".join(some + ["null"] * (types.NoneType in members))


def _name(wanted: list[Any]) -> str:
    return " or ".join(getattr(get_origin(each) or each, "__name__", str(each)) for each in wanted)


def _check_class(name: str, bases: list[Any], value: dict[str, Any]) -> None:
    wanted = [each for base in bases for each in _classes(base)]
    path = value.get("class_path")
    if path is None:
        raise ConfigError(f"Not set: {name}.class_path, the path of a {_name(wanted)}.")
    found = _load(name, str(path), wanted)
    fitting = [base for base in bases if inspect.isclass(found) and issubclass(found, tuple(_classes(base)))]
    if not fitting:
        raise ConfigError(f"{name} cannot be {path}: it must be a {_name(wanted)}.")
    called_with = get_args(fitting[0])[:-1]  # a callable's class gets so many of its arguments later
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(found, fail_untyped=False, skip={len(called_with[0])} if called_with else set())
    known, settings = _typed_settings(parser), value.get("init_args") or {}
    names = list(dict.fromkeys(each.partition(".")[0] for each in known))
    for setting in settings:
        if setting not in names:
            has = f" It has: {', '.join(names)}." if names else ""
            raise ConfigError(f"{name}.{setting} is not a setting of {path}.{suggest(setting, names)}{has}")
        check_value(f"{name}.{setting}", _type(known.get(setting)), settings[setting])
    missing = ", ".join(f"{name}.{each}" for each, action in known.items() if action.required and each not in settings)
    if missing:
        raise ConfigError(f"Not set: {missing}, which {path} needs.")


def _load(name: str, path: str, wanted: list[type]) -> Any:
    """What a class path names: in full, or by the name alone of a class that is known."""
    module, _, last = path.rpartition(".")
    known = {each.__name__: each for base in wanted for each in _subclasses(base)}
    if not module:
        if last not in known:
            raise ConfigError(f"{name} cannot be {path}: no such {_name(wanted)} is known.{suggest(path, list(known))}")
        return known[last]
    near = importlib.import_module("dmaml_pl")
    try:
        near = importlib.import_module(module)
        return getattr(near, last)
    except Exception as error:  # of a user's own module, too
        beside = [f"{near.__name__}.{each}" for each in getattr(near, "__all__", dir(near)) if each[0] != "_"]
        raise ConfigError(f"{name} cannot be {path}: {error}.{suggest(path, beside)}") from error


def _subclasses(base: type) -> Iterator[type]:
    yield base
    below: type
    for below in type.__subclasses__(base):
        yield from _subclasses(below)


def explain_interpolation(error: OmegaConfBaseException) -> str:
    """One line out of an error of OmegaConf, which reads the references such as `${data.init_args.ways}`.

    Args:
        error: what was raised.
    """
    place = (error.full_key or "").split(".")[1:]  # without the command
    name = ".".join(part for part in place if part != "init_args")
    where = f"{name} refers" if name else "The configuration refers"
    if not isinstance(error, InterpolationKeyError):
        return (
            f"{where} to another setting in a way that cannot be read ({str(error.msg).splitlines()[0]}): a reference "
            "looks like ${data.init_args.ways}."
        )
    wanted = str(error.child_node)
    inside = wanted.removeprefix("${").removesuffix("}")
    up = len(inside) - len(inside.lstrip("."))  # the parser has made it relative to where it stands
    if up and up <= len(place):
        wanted = f"${{{'.'.join([*place[: len(place) - up], inside.lstrip('.')])}}}"
    return f"{where} to {wanted}, but there is no such setting."


def explain_trainer(error: Exception, settings: dict[str, Any]) -> str:
    """One line out of an error of Lightning's Trainer, which names none of its settings.

    Args:
        error: what the Trainer raised.
        settings: its settings; the one without which it can be made is to blame.
    """
    reason = innermost(error)
    defaults = {name: each.default for name, each in inspect.signature(pl.Trainer).parameters.items()}
    apart: dict[str, Any] = {"callbacks": None, "logger": False}
    if not isinstance(settings.get("strategy"), str):
        apart["strategy"] = "auto"  # an instance has been given devices by the Trainer that failed
    for name in dict.fromkeys([*_ADVICE, *settings]):
        if settings.get(name) == defaults.get(name):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                pl.Trainer(**{**settings, **apart, name: defaults[name]})
        except Exception:  # noqa: S112 - whatever else is wrong, another setting is to blame
            continue
        return f"trainer.{name} is {settings[name]!r}{_ADVICE.get(name, '')}: {reason}"
    return f"trainer: {reason}"
