"""What is wrong with a configuration that the parser has refused, in one line: the setting, and what it may be.

The parser tells at length, in its own English. That is not read: what was given is held against the settings that the
parser knows and their types, one by one, until one is refused alone. What is not found so is told in its words.
"""

import argparse
import contextlib
import copy
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial, reduce
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dmaml_pl.checks import suggest
from dmaml_pl.errors import ConfigError, reason_of

# Private names of argparse and jsonargparse below: neither has a public way to ask a parser what it knows.

_OF_A_CLASS = {"class_path", "init_args", "dict_kwargs"}


def refuse(parser: ArgumentParser, words: list[str], error: Exception) -> NoReturn:
    """Say in one line why the parser has refused a command line.

    Args:
        parser: the command's.
        words: those after the command.
        error: what the parser has raised.

    Raises:
        ConfigError: always.
    """
    options = list(options_of(parser, words))
    groups = {name.partition(".")[0] for name in _known(parser)}
    for name, value in options:
        if name.endswith(".help"):
            raise ConfigError(f"--{name} is {value}, but must be a class path, whose settings it shows.")
        if value is None and name.partition(".")[0] in groups:
            raise ConfigError(f"{name} has no value: give one after --{name}.")
    _inspect(parser, _given(options))
    _check_defaults("", _given(options))
    raise ConfigError(f"{reason_of(error)}.")


def prefer_classes(parser: ArgumentParser) -> None:
    """Let settings that may be text or a class try the class first: else a class path alone would be text.

    Args:
        parser: whose settings are changed.
    """
    for action in parser._actions:  # noqa: SLF001
        ways = _ways(getattr(action, "_typehint", None))
        if str in ways[:-1] and any(_classes(way) for way in ways):
            action._typehint = Union[*(way for way in ways if way is not str), str]  # type: ignore[attr-defined]  # noqa: SLF001 - of a tuple


def check_path(setting: str, path: Any, kind: type) -> None:
    """Check a class path that the parser has taken for text, as it could not make the class of it.

    Args:
        setting: its name.
        path: the text; one without a dot, and anything else, is left alone.
        kind: what the class must be.

    Raises:
        ConfigError: what is wrong with it.
    """
    if isinstance(path, str) and "." in path:
        _check_class(setting, path, {}, _find(setting, path, (kind,)), 0)


def no_settings(section: str, given: Any) -> ConfigError:
    """The error of a section that is no settings by name."""
    return ConfigError(
        f"{section} is {'null' if given is None else given}, but must be settings by name: leave it out for its "
        "defaults."
    )


# -- what was given ----------------------------------------------------------------------------------------------------


def _known(parser: ArgumentParser) -> dict[str, argparse.Action]:
    """The settings of a parser by name; what asks for help, or is a group of settings, is none."""
    return {action.dest: action for action in parser._actions if action.default is not argparse.SUPPRESS}  # noqa: SLF001


def options_of(parser: ArgumentParser, words: list[str]) -> Iterator[tuple[str, str | None]]:
    """Names and values, as they were written; None where there is no value."""
    known = _known(parser)
    actions = [action for action in parser._actions if action.dest not in known]  # noqa: SLF001
    sections = {name.partition(".")[0] for name in known}
    others = {option for action in actions if action.dest not in sections for option in action.option_strings}
    for word, after in pairwise([*words, "--"]):
        option, equals, value = word.partition("=")
        if (option.startswith("--") or option == "-c") and option not in others:
            name = "config" if option == "-c" else option[2:]
            yield name, value if equals else None if after.startswith("--") else after


def settings_of(name: str, text: str | None) -> dict[str, Any]:
    """What an option sets, as a configuration would: all that its file says, or one setting."""
    above: Any = text
    with contextlib.suppress(yaml.YAMLError):
        if name == "config" and text is not None and Path(text).is_file():  # from a pipe it is read only once
            settings: dict[str, Any] = yaml.safe_load(Path(text).read_text(encoding="utf-8"))
            return settings
        if text is not None and text.startswith(("{", "[")):
            above = yaml.safe_load(text)
    nested: dict[str, Any] = reduce(lambda inner, part: {part: inner}, reversed(name.split(".")), above)
    return nested


def _given(options: list[tuple[str, str | None]]) -> dict[str, Any]:
    """The settings of files and options, each laid over those before it, and references replaced where they lead."""
    given: dict[str, Any] = {}
    for name, text in options:
        given = _lay_over(given, settings_of(name, text))
    with contextlib.suppress(OmegaConfBaseException):
        given = OmegaConf.to_container(OmegaConf.create(given), resolve=True)  # type: ignore[assignment]
    return given


def _lay_over(below: Any, above: Any) -> Any:
    """Settings laid over others; those of a class go where another class is named."""
    if isinstance(below, list) and below and isinstance(above, dict):
        return [*below[:-1], _lay_over(below[-1], above)]  # an option of a list means its last one
    if isinstance(below, str):
        below = {"class_path": below}
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if "class_path" in below:
        if not above.keys() & _OF_A_CLASS:
            above = {"init_args": above}
        if above.get("class_path", below["class_path"]) != below["class_path"]:
            return above
    return below | {name: _lay_over(below.get(name), value) for name, value in above.items()}


# -- what is wrong with it ---------------------------------------------------------------------------------------------


def _inspect(parser: ArgumentParser, given: dict[str, Any], prefix: str = "", owner: str = "") -> None:
    """Hold settings against those that a parser knows; of a class, the `owner`, those in the setting `prefix`.

    Raises:
        ConfigError: what is wrong with the first that is.
    """
    known = _known(parser)

    def look(name: str, value: Any) -> None:
        is_group = any(each.startswith(f"{name}.") for each in known)
        if is_group and not isinstance(value, dict):
            raise no_settings(name, value)
        if is_group:
            for inner, each in value.items():
                look(f"{name}.{inner}", each)
        elif action := known.get(name.removesuffix("+")):
            default = action.default.as_dict() if hasattr(action.default, "as_dict") else None  # a class
            _check(prefix + action.dest, getattr(action, "_typehint", Any), _lay_over(default, value))
        else:
            raise ConfigError(_unknown(list(known), name, prefix, owner, given))

    for name, value in given.items():
        look(str(name), value)
    needed = [name for name, action in known.items() if action.required] + sorted(parser._extra_required_keys)  # noqa: SLF001
    if missing := [prefix + name for name in needed if "." not in name and given.get(name) is None]:
        advice = f", which {owner} needs." if owner else ". Give a --config file, such as --config sinusoid."
        raise ConfigError(f"Not set: {', '.join(missing)}{advice}")


def _unknown(known: list[str], name: str, prefix: str, owner: str, given: Any) -> str:
    groups = list(dict.fromkeys(each.partition(".")[0] for each in known))
    if owner:
        has = f" It has: {', '.join(groups)}." if groups else ""
        return f"{prefix}{name} is not a setting of {owner}.{suggest(name, groups)}{has}"
    group, _, last = name.partition(".")[0], *name.rpartition(".")[1:]
    elsewhere = [each for each in (*known, *_of_classes(given)) if each.rpartition(".")[2] == last]
    if elsewhere:  # best in the same section
        near = f" Did you mean {max(elsewhere, key=lambda each: each.startswith(f'{group}.'))}?"
    elif group in groups:
        beside = [each.removeprefix(f"{group}.") for each in known if each.startswith(f"{group}.")]
        near = suggest(name.removeprefix(f"{group}."), beside, f"{group}.")
    else:  # even the first word is misspelt
        name, near = group, suggest(group, groups)
    return f"{name} is not a setting.{near} dmaml COMMAND --help lists all."


def _of_classes(given: Any, prefix: str = "") -> Iterator[str]:
    """The settings of all classes in a configuration, by the names that they have on the command line."""
    path = given.get("class_path") if isinstance(given, dict) else given
    if isinstance(path, str) and prefix:
        with contextlib.suppress(Exception):  # whatever is wrong with it is told in its turn
            yield from (f"{prefix}.{name}" for name in _known(_parser_of(_find(prefix, path, (object,)), 0)))
    for name, inner in given.items() if isinstance(given, dict) else ():
        yield from _of_classes(inner, prefix if name in _OF_A_CLASS else f"{prefix}.{name}".lstrip("."))


def _check(setting: str, kind: Any, value: Any) -> None:
    """Hold a value against the type of its setting.

    Raises:
        ConfigError: it is refused, alone, and it can be told why.
    """
    if (isinstance(value, str) and "${" in value) or _takes(kind, value):
        return
    ways = _ways(kind)
    for way in ways:
        if get_args(way) and get_origin(way) is not Callable:
            _check_within(setting, _name(way), get_args(way)[-1], value)
    classes = {made: arguments for way in ways for made, arguments in _classes(way).items()}
    path = value.get("class_path") if isinstance(value, dict) else value
    if classes and isinstance(path, str):
        found = _find(setting, path, tuple(classes)) if all(map(str.isidentifier, path.split("."))) else None
        if found is not None:
            _check_class(setting, path, value if isinstance(value, dict) else {}, found, max(classes.values()))
            return
        value = path
    if wanted := _wanted(ways):
        raise ConfigError(
            f"{setting} is {str(value)!r}, but must be {wanted}.{_near(str(value), wanted, list(classes))}"
        )


def _near(value: str, wanted: str, classes: list[type]) -> str:
    """What may have been meant by a value that names none of the classes."""
    if wanted.startswith("the class path") and not value.isidentifier():
        return " That is MODULE.CLASS, as Python imports it."
    package = importlib.import_module("dmaml_pl")
    ours = [name for name in package.__all__ if classes and _fits(getattr(package, name), tuple(classes))]
    return suggest(value, ours, "dmaml_pl.") or suggest(
        value, [each.__name__ for kind in classes for each in _below(kind)]
    )


def _check_within(setting: str, name: str, inner: Any, value: Any) -> None:
    """Hold what a list or a dict has against its type."""
    if isinstance(value, list) and name == "list":
        for each in value:
            _check(setting, inner, each)
    elif isinstance(value, dict) and name == "dict":
        for key, each in value.items():
            _check(f"{setting}.{key}", inner, each)


def _check_class(setting: str, path: str, value: dict[str, Any], found: Any, skip: int) -> None:
    """Hold the settings of a class (or function) against its own, but for its first `skip`, which it gets later."""
    if beside := sorted(value.keys() - _OF_A_CLASS):
        raise ConfigError(f"{setting}.{beside[0]} stands beside class_path, but must be in init_args there.")
    settings = value.get("init_args", {})
    if not isinstance(settings, dict):
        raise ConfigError(f"{setting} cannot be {path}: its init_args are {settings!r}, but must be settings by name.")
    _inspect(_parser_of(found, skip), settings, f"{setting}.", path)


def _parser_of(found: Any, skip: int) -> ArgumentParser:
    """A parser of the settings of a class (or function), but for its first `skip`."""
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(found) else parser.add_function_arguments
    add(found, skip={skip}, fail_untyped=False, sub_configs=True)
    return parser


def _check_defaults(setting: str, value: Any) -> None:
    """Check that the classes in a configuration have defaults that the parser can write down.

    Raises:
        ConfigError: names the first that has not.
    """
    if not isinstance(value, dict):
        return
    path, given = value.get("class_path"), value.get("init_args") or {}
    if isinstance(path, str) and "." in path and isinstance(given, dict):
        for name, parameter in inspect.signature(_find(setting, path, (object,))).parameters.items():
            if isinstance(parameter.default, partial) and name not in given:
                made = parameter.default.func
                raise ConfigError(
                    f"{setting}.{name} is {parameter.default!r} by default, which a config with references (${{...}}) "
                    f"cannot hold: set it to a class path, such as {made.__module__}.{made.__qualname__}."
                )
    for name, inner in value.items():
        _check_defaults(setting if name in _OF_A_CLASS else f"{setting}.{name}".lstrip("."), inner)


def _takes(kind: Any, value: Any) -> bool:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind, sub_configs=True)
    try:
        parser.parse_object({"value": copy.deepcopy(value)})  # it writes into what it is given
    except Exception:  # also of a user's own module, when it is imported
        return False
    return True


# -- types, and what they are called -----------------------------------------------------------------------------------


def _ways(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _name(way: Any) -> str:
    origin = get_origin(way) or way
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return "dict"
    return "list" if getattr(origin, "__module__", "") == "collections.abc" else getattr(origin, "__name__", "")


def _classes(way: Any) -> dict[type, int]:
    """The classes that such a setting names by their path, and how many arguments they get when they are made later."""
    arguments = 0
    if get_origin(way) is Callable and get_args(way):
        taken, way = get_args(way)
        arguments = len(taken) if isinstance(taken, list) else 0
    kinds = [get_origin(each) or each for each in _ways(way)]
    built_in = sys.stdlib_module_names
    made: list[type] = [each for each in kinds if inspect.isclass(each)]
    return {each: arguments for each in made if each.__module__.partition(".")[0] not in built_in}


def _wanted(ways: tuple[Any, ...]) -> str:
    """What a setting may be, in words."""
    choices = [repr(choice) for way in ways if get_origin(way) is Literal for choice in get_args(way)]
    classes = [made for way in ways for made in _classes(way)]
    plain = [way for way in ways if get_origin(way) not in (Literal, Callable) and not _classes(way)]
    names = dict.fromkeys(_name(way) for way in plain if way is not NoneType)
    said = [f"one of {', '.join(choices)}"] if choices else []
    said += [f"of type {' or '.join(names)}"] if names else []
    said += [f"the class path of {_one_of(classes)}"] if classes else []
    said += ["a class path"] if not classes and any(get_origin(way) is Callable for way in ways) else []
    return " or ".join(said + ["null"] * (NoneType in ways))


def _one_of(classes: list[type] | tuple[type, ...]) -> str:
    names = " or ".join(dict.fromkeys(each.__name__ for each in classes))
    return f"{'an' if names.startswith(tuple('AEIOU')) else 'a'} {names}"


def _find(setting: str, path: str, kinds: tuple[type, ...]) -> Any:
    """What a class path names; None where it is one word that no class is called.

    Raises:
        ConfigError: there is no such thing, or it is of another kind.
    """
    if "." not in path:
        return next((each for kind in kinds for each in _below(kind) if each.__name__ == path), None)
    try:
        try:
            found = pkgutil.resolve_name(path)
        except AttributeError as error:
            module = importlib.import_module(path.rpartition(".")[0])  # whose own error says more
            own, found_in = Path(f"{path.partition('.')[0]}.py"), getattr(module, "__file__", None)
            if own.is_file() and found_in and "." not in module.__name__ and not own.samefile(found_in):
                raise AttributeError(f"{found_in} hides {own}, which needs another name") from error
            raise
        made = found if inspect.isclass(found) else get_type_hints(found).get("return")
    except Exception as error:  # of a user's own module, too
        raise ConfigError(f"{setting} cannot be {path}: {reason_of(error)}.{suggest(path, _beside(path))}") from error
    if not _fits(made, kinds):
        raise ConfigError(f"{setting} cannot be {path}: it must be {_one_of(kinds)}.")
    if lacking := sorted(getattr(found, "__abstractmethods__", ())):
        raise ConfigError(f"{setting} cannot be {path}: it is abstract, and needs {', '.join(lacking)}.")
    return found


def _fits(made: Any, kinds: tuple[type, ...]) -> bool:
    try:
        return inspect.isclass(made) and issubclass(made, kinds)
    except TypeError:  # a protocol, which cannot be asked
        return True


def _below(kind: type) -> Iterator[type]:
    """A class, and all that are made of it."""
    yield kind
    subclasses: list[type] = kind.__subclasses__()
    for each in subclasses:
        yield from _below(each)


def _beside(class_path: str) -> list[str]:
    """The full names of the classes in the module of a class path, or in this package."""
    try:
        module = importlib.import_module(class_path.rpartition(".")[0])
    except Exception:  # of a user's own module, too
        module = importlib.import_module("dmaml_pl")
    names = getattr(module, "__all__", dir(module))
    return [f"{module.__name__}.{name}" for name in names if inspect.isclass(getattr(module, name, None))]
