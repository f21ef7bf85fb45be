"""What is wrong with a configuration that the parser has refused, in one line: the setting, and what it may be.

The parser tells at length, in its own English. That is not read: what was given is held against the settings that the
parser knows and their types, one by one, until one is refused alone. What is not found so is told in its words.
"""

import argparse
import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial, reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dmaml_pl.checks import suggest
from dmaml_pl.cli.kinds import classes_of, find_class, in_words, meant_by, name_of, ways_of
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
        ways = ways_of(getattr(action, "_typehint", None))
        if str in ways[:-1] and any(classes_of(way) for way in ways):
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
        _check_class(setting, path, {}, find_class(setting, path, (kind,)), 0)


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
            yield from (f"{prefix}.{name}" for name in _known(_parser_of(find_class(prefix, path, (object,)), 0)))
    for name, inner in given.items() if isinstance(given, dict) else ():
        yield from _of_classes(inner, prefix if name in _OF_A_CLASS else f"{prefix}.{name}".lstrip("."))


def _check(setting: str, kind: Any, value: Any) -> None:
    """Hold a value against the type of its setting.

    Raises:
        ConfigError: it is refused, alone, and it can be told why.
    """
    if (isinstance(value, str) and "${" in value) or _takes(kind, value):
        return
    ways = ways_of(kind)
    for way in ways:
        if get_args(way) and get_origin(way) is not Callable:
            _check_within(setting, name_of(way), get_args(way)[-1], value)
    classes = {made: arguments for way in ways for made, arguments in classes_of(way).items()}
    path = value.get("class_path") if isinstance(value, dict) else value
    if classes and isinstance(path, str):
        found = find_class(setting, path, tuple(classes)) if all(map(str.isidentifier, path.split("."))) else None
        if found is not None:
            _check_class(setting, path, value if isinstance(value, dict) else {}, found, max(classes.values()))
            return
        value = path
    if wanted := in_words(ways):
        raise ConfigError(
            f"{setting} is {str(value)!r}, but must be {wanted}.{meant_by(str(value), wanted, list(classes))}"
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
        for name, parameter in inspect.signature(find_class(setting, path, (object,))).parameters.items():
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
