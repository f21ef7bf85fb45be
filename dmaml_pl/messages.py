"""Turns the parser's many-line errors into one line that names the setting, and what it may be."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from typing import Any, NoReturn

from pytorch_lightning.cli import LightningArgumentParser

from dmaml_pl.errors import ConfigError

_NOISE = re.compile(r"^(Does not validate against|Subtypes:|Errors:|Given value|Expected a path but)")
_MERE_TYPE = re.compile(r"^Expected a <class '(NoneType|str)'>")
_EXPECTED = re.compile(r"^Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[(.*)\])(?:\. Got value: (.*))?$")
_CLASS = re.compile(r"^Problem with given class_path '([^']+)'")
_KEY = re.compile(r'^(?:error: )?Parser key "([^"]+)":?\s*(.*)$')
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_FOREIGN = re.compile(r"^Subcommand '\w+' does not accept option '([^']+)'")
_MISSING = re.compile(r"^the following arguments are required: (.*)$")
_UNKNOWN = re.compile(r"^unrecognized arguments: (--)?([^\s=]+)")


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
    foreign = _FOREIGN.match(message) or _UNKNOWN.match(message)
    if foreign:
        name = foreign.groups()[-1]
        return f"{name} is not a setting.{_suggest(name, known)} dmaml COMMAND --help lists all."
    missing = _MISSING.match(message)
    if missing:
        return f"Not set: {missing[1].replace('fit.', '')}. Give a --config file, such as configs/sinusoid.yaml."
    keys: list[str] = []
    classes: list[str] = []
    reasons: list[str] = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ").strip()
        key = _KEY.match(text)
        if key:
            keys.append(key[1])
            text = key[2]
        found = _CLASS.match(text)
        if found:
            classes.append(found[1])
        elif text and not _NOISE.match(text):
            reasons.append(text)
    telling = [reason for reason in reasons if not _MERE_TYPE.match(reason)] or reasons or [message]
    return _sentence(".".join(keys), classes[-1] if classes else None, telling[0])


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


def _sentence(name: str, class_path: str | None, reason: str) -> str:
    option = _OPTION.search(reason)
    if option:
        inner = re.search(r"class_path='([^']+)'", reason)
        owner = inner[1] if inner else class_path
        settings = _settings_of(owner)
        has = f" It has: {', '.join(settings)}." if settings else ""
        return f"{name}.{option[1]} is not a setting of {owner}.{_suggest(option[1], settings)}{has}"
    expected = _EXPECTED.match(reason)
    if expected:
        wanted = f"one of {expected[2]}" if expected[2] else f"of type {expected[1]}"
        given = f" is {expected[3]!r}, but" if expected[3] else ""
        return f"{name}{given} must be {wanted}."
    if class_path is not None:
        return f"{name} cannot be {class_path}: {reason}.{_suggest(class_path, _neighbours(class_path))}"
    return f"{name}: {reason}" if name else reason


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
