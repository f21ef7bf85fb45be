"""One line for each mistake in a configuration: the setting, and what it may be.

The parser tells why it refuses a configuration as a tree of lines, indented below the settings and classes on the way;
the innermost ones are told. What is not recognized there is told in the parser's own words.
"""

import difflib
import importlib
import inspect
import re
import warnings
from collections.abc import Iterable
from itertools import pairwise, takewhile
from pydoc import locate
from typing import Any, NoReturn

import pytorch_lightning as pl
from jsonargparse import ArgumentParser
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from dmaml_pl.errors import ConfigError

_STEP = re.compile(r"""Parser key "(?P<setting>[^"]+)":|Problem with given class_path '(?P<class_path>[^']+)':""")
"""What a line of the parser's tree goes down into."""

_ADVICE = {
    "strategy": ", but must be dmaml, auto, or a strategy's class path",
    "accelerator": ", but must be auto, cpu, or one that this machine has",
    "devices": ", which cannot be had",
}


def suggest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A sentence with the nearest of the known words, with a space before it; nothing if none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {prefix}{close[0]}?" if close and close[0] != word else ""


def refuse(parser: ArgumentParser, words: list[str], error: Exception) -> NoReturn:
    """Say in one line why the parser has refused a command line.

    Args:
        parser: the command's.
        words: those after the command.
        error: what the parser has raised.

    Raises:
        ConfigError: always.
    """
    setting, owner, reason = _innermost(str(error))
    prefix = f"{setting}." if setting else ""
    if match := re.search(r"[Oo]ption '([^']+)'|unrecognized arguments: (\S+)", reason):
        raise ConfigError(_unknown(parser, prefix, owner, match[1] or match[2]))
    if match := re.search(r"arguments are required: ([\w., ]+)", reason):
        missing = ", ".join(prefix + name.rpartition(".")[2] for name in match[1].split(", "))
        advice = f", which {owner} needs." if owner else ". Give a --config file, such as configs/sinusoid.yaml."
        raise ConfigError(f"Not set: {missing}{advice}")
    if match := re.search(r"argument (--\S+): expected", reason):
        bare = [word for word, after in pairwise([*words, "--"]) if word.startswith(match[1]) and after[:2] == "--"]
        option = bare[0] if bare else match[1]
        raise ConfigError(f"{option.lstrip('-')} has no value: give one after {option}.")
    if match := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", reason):
        raise ConfigError(f"{setting} cannot be {match[1]}: it must be a {match[2]}.")
    value = re.search(
        r"(?:Got value|Given value|import path string): (.*?)(?:\. Got value: .*)?$", reason, re.MULTILINE
    )
    if value and (wanted := _wanted(reason)):
        known = importlib.import_module("dmaml_pl").__all__ if "class path" in wanted else []
        near = suggest(value[1], known, "dmaml_pl.")
        raise ConfigError(f"{setting} is {value[1]!r}, but must be {wanted}.{near}")
    reason = " ".join(reason.split())
    if owner:
        raise ConfigError(f"{setting} cannot be {owner}: {reason}.{suggest(owner, _beside(owner))}")
    raise ConfigError(f"{setting}: {reason}" if setting else reason)


def _innermost(tree: str) -> tuple[str, str, str]:
    """The innermost setting of a tree, the class that refuses it or one of its own settings if one does, and why."""
    way: list[tuple[int, re.Match[str]]] = []
    deepest, lines = way, tree.splitlines()
    below = 0
    for number, line in enumerate(lines, 1):
        if step := _STEP.search(line):
            indent = len(line) - len(line.lstrip(" -"))
            way = [above for above in way if above[0] < indent] + [(indent, step)]
            if len(way) > len(deepest):
                deepest, below = way, number
    indent = deepest[-1][0] if deepest else -1
    reason = "\n".join(takewhile(lambda line: not line or line[: indent + 1].isspace() or indent < 0, lines[below:]))
    owner = deepest[-1][1]["class_path"] if deepest else None
    if made := re.search(r"callable class: (.*)\. Got value: .*class_path='([^']+)'", reason):
        reason, owner = made.groups()
    return ".".join(step["setting"] for _, step in deepest if step["setting"]), owner or "", reason


def _unknown(parser: ArgumentParser, prefix: str, owner: str, word: str) -> str:
    name = word.lstrip("-").partition("=")[0]
    if owner:
        names = _settings_of(owner)
        has = f" It has: {', '.join(names)}." if names else ""
        return f"{prefix}{name} is not a setting of {owner}.{suggest(name, names)}{has}"
    known = vars(parser.get_defaults().as_flat())
    groups = sorted({each.partition(".")[0] for each in known} | {"config"})
    group = name.partition(".")[0]
    # Where even the first word is unknown, that is what is misspelt.
    name, near = (name, list(known)) if group in groups else (group, groups)
    return f"{name} is not a setting.{suggest(name, near)} dmaml COMMAND --help lists all."


def _settings_of(class_path: str) -> list[str]:
    parser, found = ArgumentParser(exit_on_error=False), locate(class_path)
    if not inspect.isclass(found):
        return []
    parser.add_class_arguments(found, fail_untyped=False)
    return list(dict.fromkeys(name.partition(".")[0] for name in vars(parser.get_defaults().as_flat())))


def _wanted(reason: str) -> str:
    """What a setting may be, in words."""
    choices = ", ".join(re.findall(r"Expected a typing\.Literal\[(.*?)\]", reason))
    types = dict.fromkeys(re.findall(r"Expected a <class '(?:\w+\.)*(\w+)'>", reason))
    names = ["list" if name in ("Iterable", "Sequence") else name for name in types if name != "NoneType"]
    kinds = dict.fromkeys(re.findall(r"Not a valid subclass of (\w+)", reason))
    ways = [f"one of {choices}"] if choices else []
    ways += [f"of type {' or '.join(names)}"] if names else []
    ways += [f"the class path of a {' or '.join(kinds)}"] if kinds else []
    ways += ["a class path"] * ("Expected a dot import path" in reason)
    return " or ".join(ways + ["null"] * ("NoneType" in types))


def _beside(class_path: str) -> list[str]:
    """The full names of what stands in the module of a class path, or in this package."""
    try:
        module = importlib.import_module(class_path.rpartition(".")[0])
    except Exception:  # of a user's own module, too
        module = importlib.import_module("dmaml_pl")
    return [f"{module.__name__}.{name}" for name in getattr(module, "__all__", dir(module))]


def explain_interpolation(error: OmegaConfBaseException) -> str:
    """One line out of an error of OmegaConf, which reads the references such as `${data.init_args.ways}`."""
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
    """One line out of an error of Lightning's Trainer: the setting without which it can be made is to blame."""
    while error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    reason = " ".join(str(error).split())
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
