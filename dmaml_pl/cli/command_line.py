"""Reads a command line and its files without the parser: what is wrong with them, and what has been set."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from dmaml_pl.errors import ConfigError

_ALONE = ("h", "help", "print_config")
"""Options without a value."""

_BELOW = ("init_args", "dict_kwargs")
"""Where a class path has the settings of its class; both may be left out on the command line."""


def check_command(words: list[str], commands: list[str]) -> None:
    """Check that the command line begins with a command.

    Raises:
        ConfigError: names the nearest one.
    """
    if not words or words[0].startswith("-"):
        raise ConfigError("A command comes first: dmaml fit --config FILE. dmaml --help lists all.")
    if words[0] not in commands:
        raise ConfigError(f"{words[0]} is not a command.{suggest(words[0], commands)} dmaml --help lists all.")


def suggest(word: str, known: list[str]) -> str:
    """A sentence with the nearest of the known words, with a space before it; nothing if none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def options(words: list[str]) -> Iterator[tuple[str, str | None]]:
    """The options of a command line, without their dashes, each with its value.

    Args:
        words: those after the command.

    Yields:
        A name and a value; the value is None where there is none, the name empty where no name comes before a value.
    """
    left = list(reversed(words))
    while left:
        word = left.pop()
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            yield "", word
        elif equals or name.lstrip("-") in _ALONE:
            yield name.lstrip("-"), value
        else:
            yield name.lstrip("-"), left.pop() if left and not left[-1].startswith("--") else None


def _files(words: list[str]) -> Iterator[Path]:
    for name, value in options(words):
        if name in ("c", "config") and value not in (None, "", "-"):
            yield Path(str(value))


def check_config_files(words: list[str]) -> None:
    """Check that the files after --config can be read, as the parser's errors do not name the file.

    Args:
        words: the command line.

    Raises:
        ConfigError: names the file, and the line where it is broken.
    """
    for path in _files(words[1:]):
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


def given_settings(words: list[str], known: Collection[str]) -> Iterator[tuple[str, Any]]:
    """What has been set, in the order in which a later value wins: the files', then single ones.

    Args:
        words: those after the command.
        known: full names of all settings, such as "trainer.max_steps".

    Yields:
        A full name and its value; what lies deeper than a known setting is laid into its `init_args`.
    """
    for path in _files(words):
        yield from _flat("", yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}, known)
    for option, value in options(words):
        name = option.removesuffix("+")
        if name in ("", "c", "config", *_ALONE) or name.endswith(".help"):
            continue
        parts = name.split(".")
        depth = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known), len(parts))
        laid: Any = [value] if option.endswith("+") else value
        for before, part in reversed(list(pairwise(["", *parts[depth:]]))):
            laid = {part: laid}
            if part not in (*_BELOW, "class_path") and before not in _BELOW:
                laid = {"init_args": laid}
        yield ".".join(parts[:depth]), laid


def _flat(prefix: str, settings: dict[str, Any], known: Collection[str]) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        is_group = name not in known and any(setting.startswith(f"{name}.") for setting in known)
        if is_group and isinstance(value, dict):
            yield from _flat(f"{name}.", value, known)
        else:
            yield name, value


def laid_over(below: Any, above: Any) -> Any:
    """One value laid over another, as files are laid over each other.

    Args:
        below: what was set before; a class path alone stands for a class without settings.
        above: what is set now; another class drops the settings of the class before.
    """
    if not isinstance(above, dict):
        return above
    if isinstance(below, list) and below:
        return [*below[:-1], laid_over(below[-1], above)]  # single settings are those of the last one
    below = {"class_path": below} if isinstance(below, str) else below
    if not isinstance(below, dict) or above.get("class_path", below.get("class_path")) != below.get("class_path"):
        below = {}
    return below | {name: laid_over(below.get(name), value) for name, value in above.items()}
