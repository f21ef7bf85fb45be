"""Turns the many-line errors of the parser and of the Trainer into one line: the setting, and what it may be."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.cli import LightningArgumentParser

from dmaml_pl.errors import ConfigError

_NOISE = re.compile(r"^(Does not validate against|Subtypes:|Errors:|Expected a path but)")
_MERE_TYPE = re.compile(r"^Expected a <class '(NoneType|str)'>")
_EXPECTED = re.compile(r"^Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[(.*?)\])(?:\. Got value: (.*))?$")
_GIVEN = re.compile(r"^Given value: (.*)$")
_CLASS = re.compile(r"^Problem with given class_path '([^']+)'")
_CALLABLE = re.compile(r"^Type typing\.Callable\[.*\] expects a function or a callable class: ")
_OF_CALLABLE = re.compile(r"\. Got value: Namespace\(class_path='([^']+)'.*$")
_NOT_SUBCLASS = re.compile(r"^Import path (\S+) does not correspond to a subclass of (\w+)")
_KEY = re.compile(r'^(?:error: )?Parser key "([^"]+)":?\s*(.*)$')
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_FOREIGN = re.compile(r"^(?:Subcommand '\w+' does not accept option '|unrecognized arguments: -+)([^'\s=]+)")
_MISSING = re.compile(r"^the following arguments are required: (.*)$")
_WORD = re.compile(r"^unrecognized arguments: ([^-\s]\S*)")
_COMMAND = re.compile(r"^argument subcommand: invalid choice: '([^']*)' \(choose from (.*)\)$")
_NO_COMMAND = re.compile(r"^expected \"subcommand\" to be one of|is not accepted before subcommand '\w+'$")
_NO_VALUE = re.compile(r"^argument (\S+): expected one argument")
_BELOW_COMMAND = re.compile(r"^(fit|validate|test|predict)\.")
_TYPE_NAMES = {"NoneType": "null", "Sequence": "list", "Iterable": "list"}


class ConfigParser(LightningArgumentParser):
    """Lightning's parser; what it cannot parse is a `ConfigError` of one line, not a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Called by the parser wherever it finds a mistake.

        Raises:
            ConfigError: what is wrong, in one line.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        raise ConfigError(explain(message, _names(self))) from ex


def _names(parser: Any) -> list[str]:
    """Settings of a parser and of its subcommands."""
    names = []
    for action in parser._actions:  # noqa: SLF001 - argparse has no public list of them
        names += [name.lstrip("-") for name in action.option_strings]
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                names += _names(command)
    return names


def explain(message: str, known: list[str]) -> str:
    """One line out of an error message of jsonargparse.

    Args:
        message: the message.
        known: names of the settings at the top level, such as "trainer.max_steps", to suggest from.
    """
    return _about_commands(message) or _about_options(message, known) or _sentence(*_read(message))


def _about_commands(message: str) -> str | None:
    command = _COMMAND.match(message)
    if command:
        commands = re.findall(r"\w+", command[2])
        return f"{command[1]} is not a command.{_suggest(command[1], commands)} dmaml --help lists all."
    if _NO_COMMAND.search(message):
        return "A command comes first: dmaml fit --config FILE. dmaml --help lists all."
    return None


def _about_options(message: str, known: list[str]) -> str | None:
    word = _WORD.match(message)
    if word:
        close = f" Did you mean --config {word[1]}?" if word[1].endswith((".yaml", ".yml")) else ""
        return f"{word[1]} is not a setting: those are given as --NAME VALUE, and files as --config FILE.{close}"
    foreign = _FOREIGN.match(message)
    if foreign:
        return _unknown_setting(foreign[1], known)
    valueless = _NO_VALUE.match(message)
    if valueless:
        return f"{valueless[1].lstrip('-')} has no value: give one after {valueless[1]}."
    missing = _MISSING.match(message)
    if missing:
        return f"Not set: {missing[1].replace('fit.', '')}. Give a --config file, such as configs/sinusoid.yaml."
    return None


def check_config_files(words: list[str]) -> None:
    """Check that the files after --config can be read, as the parser's errors do not name the file.

    Args:
        words: the command line.

    Raises:
        ConfigError: names the file, and the line where it is broken.
    """
    for word, following in pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        name = value if equals else following
        if option not in ("-c", "--config") or name in ("", "-"):
            continue
        path = Path(name)
        if path.is_dir() or not path.exists():
            raise ConfigError(f"--config is {path}, but there is no such file.")
        if path.is_file():  # what comes through a pipe can be read only once
            _check_yaml(path)


def _check_yaml(path: Path) -> None:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"--config {path} is not valid YAML{place}: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not a YAML file, or not in UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}.") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"--config {path} holds no settings: lines of the form `name: value` are expected, as in "
            "configs/sinusoid.yaml."
        )


def explain_interpolation(error: OmegaConfBaseException) -> str:
    """One line out of an error of OmegaConf, which reads the references such as `${data.init_args.ways}`.

    Args:
        error: what was raised.
    """
    reason = str(error).strip().splitlines()[0]
    found = re.match(r"Interpolation key '([^']+)' not found(?: \(resolved to '([^']+)'\))?", reason)
    wanted = _BELOW_COMMAND.sub("", found[2] or found[1]) if found else ""
    name = _BELOW_COMMAND.sub("", error.full_key or "").replace(".init_args", "")
    where = f"{name} refers" if name else "The configuration refers"
    if found:
        return f"{where} to ${{{wanted}}}, but there is no such setting."
    return (
        f"{where} to another setting in a way that cannot be read ({reason}): a reference looks like "
        "${data.init_args.ways}."
    )


def explain_trainer(error: Exception, settings: dict[str, Any]) -> str:
    """One line out of an error of Lightning's Trainer, which names none of its settings.

    Args:
        error: what the Trainer raised.
        settings: its settings.
    """
    text = " ".join(str(error).split())
    if "strategy name" in text:
        return f"trainer.strategy is {settings.get('strategy')!r}, but must be dmaml, auto, or a strategy's class path."
    if "You requested" in text or "devices" in text:
        return f"trainer.devices is {settings.get('devices')!r}, which cannot be had: {text}"
    if "backend" in text or "accelerator" in text.lower():
        return f"trainer.accelerator is {settings.get('accelerator')!r}: {text} Set it to auto or cpu."
    return f"trainer: {text}"


class _Line(NamedTuple):
    indent: int
    text: str


def _lines(message: str) -> Iterator[_Line]:
    for line in message.splitlines():
        text = line.strip().removeprefix("- ").strip()
        if text:
            yield _Line(len(line) - len(line.lstrip()), text)


def _read(message: str) -> tuple[str, str | None, list[str], str | None]:
    """Out of nested errors: the setting, its class, the telling reasons, and the value given."""
    keys: list[str] = []
    classes: list[str] = []
    reasons: list[_Line] = []
    given: list[_Line] = []
    for indent, line in _lines(message):
        text = line
        of_callable = _OF_CALLABLE.search(text)
        if of_callable:
            classes.append(of_callable[1])
            text = text[: of_callable.start()]
        text = _CALLABLE.sub("", text)
        key = _KEY.match(text)
        if key:
            keys.append(key[1])
            text = key[2]
        found, shown = _CLASS.match(text), _GIVEN.match(text)
        if found:
            classes.append(found[1])
        elif shown:
            given.append(_Line(indent, shown[1]))
        elif text and not _NOISE.match(text) and not text.startswith("Given value type"):
            reasons.append(_Line(indent, text))
    telling = [reason for reason in reasons if not _MERE_TYPE.match(reason.text)] or reasons or [_Line(0, message)]
    first = telling[0]
    # The other members of the same union stand in lines indented alike, below which the value stands.
    alike = [reason.text for reason in reasons if reason.indent == first.indent and _EXPECTED.match(reason.text)]
    value = next((text for indent, text in given if indent < first.indent), None)
    return ".".join(keys), classes[-1] if classes else None, [first.text, *alike], value


def _sentence(name: str, class_path: str | None, reasons: list[str], value: str | None) -> str:
    reason, *alike = reasons
    option = _OPTION.search(reason)
    if option:
        settings = _settings_of(class_path)
        has = f" It has: {', '.join(settings)}." if settings else ""
        return f"{name}.{option[1]} is not a setting of {class_path}.{_suggest(option[1], settings)}{has}"
    expected = _EXPECTED.match(reason)
    if expected:
        given = expected[3] or value
        return f"{name}{'' if given is None else f' is {given!r}, but'} must be {_alternatives(alike)}."
    other = _NOT_SUBCLASS.match(reason)
    if other:
        return f"{name} cannot be {other[1]}: it must be a {other[2]}."
    missing = _MISSING.match(reason)
    if missing:
        return f"Not set: {', '.join(f'{name}.{each}' for each in missing[1].split(', '))}, which {class_path} needs."
    if class_path is not None:
        return f"{name} cannot be {class_path}: {reason}.{_suggest(class_path, _neighbours(class_path))}"
    return f"{name}: {reason}" if name else reason


def _alternatives(reasons: list[str]) -> str:
    """What a value may be, out of what the members of a union expected."""
    choices: dict[str, str] = {}
    types: list[str] = []
    for reason in reasons:
        expected = _EXPECTED.match(reason)
        if expected and expected[2]:
            choices |= {choice.strip("'"): choice for choice in expected[2].split(", ")}
        elif expected:
            name = expected[1].rpartition(".")[2]
            types.append(_TYPE_NAMES.get(name, name))
    some = [f"one of {', '.join(choices.values())}"] if choices else []
    named = [name for name in types if name != "null"]
    some += [f"of type {' or '.join(named)}"] if named else []
    return " or ".join(some + ["null"] * ("null" in types))


def _unknown_setting(name: str, known: list[str]) -> str:
    """A setting of nobody; where even its first word is unknown, that is what is misspelt."""
    groups = sorted({setting.partition(".")[0] for setting in known})
    group = name.partition(".")[0]
    if known and group not in groups:
        return f"{group} is not a setting.{_suggest(group, groups)} dmaml COMMAND --help lists all."
    return f"{name} is not a setting.{_suggest(name, known)} dmaml COMMAND --help lists all."


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def _load(class_path: str | None) -> Any:
    module, _, name = (class_path or "").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _settings_of(class_path: str | None) -> list[str]:
    found = _load(class_path)
    if found is None:
        return []
    return [name for name in inspect.signature(found).parameters if name != "params"]


def _neighbours(class_path: str) -> list[str]:
    """Class paths beside a misspelt one."""
    module = class_path.rpartition(".")[0]
    try:
        names = dir(importlib.import_module(module))
    except (ImportError, ValueError):
        names, module = ["MAML", "MLP", "Conv4", "DMAMLStrategy", "MLflowTracker", "MeanMerge"], "dmaml_pl"
    return [f"{module}.{name}" for name in names if not name.startswith("_")]
