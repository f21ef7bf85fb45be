"""Settings that a study reads from YAML files of its own, and how they are written on the command line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dmaml_pl.cli.command_line import check_yaml
from dmaml_pl.errors import ConfigError

Settings = tuple[tuple[str, str], ...]
"""Names and values as on the command line."""


def as_settings(values: Mapping[str, Any]) -> Settings:
    """Settings as they are written on the command line."""
    return tuple((str(name), text_of(value)) for name, value in values.items())


def text_of(value: Any) -> str:
    """A value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def read_settings(option: str, path: Path, form: str) -> dict[Any, Any]:
    """Read what a YAML file maps to what; not empty.

    Raises:
        ConfigError: names the option, the file, and what is wrong with it, or the form that is expected.
    """
    try:
        check_yaml(option, path)
    except OSError as error:
        raise ConfigError(f"{option} is {path}, which cannot be read: {error.strerror}.") from error
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{option} {path} holds no settings: {form}.")
    return content


def read_own(path: Path | None, workers: Sequence[int], option: str = "--own") -> dict[int, Settings]:
    """Read the settings of each number of workers' own, so that each is compared at its best.

    1: {model.meta_optimizer.init_args.lr: 0.0008}
    4: {model.meta_optimizer.init_args.lr: 0.002}

    It may have further ones than are asked for. Numbers that it lacks are trained as the configuration says, which is
    told.

    Raises:
        ConfigError: names the file, and what in it is not understood.
    """
    if path is None:
        return {}
    form = "lines of the form `W: {NAME: VALUE, ...}` are expected, with W a number of workers"
    content = read_settings(option, path, form)
    for count, settings in content.items():
        if not isinstance(count, int) or count < 1 or not isinstance(settings, dict):
            raise ConfigError(f"{option} {path} has {count}: {settings}, but {form}.")
        if "trainer.devices" in settings:
            raise ConfigError(f"{option} {path} sets trainer.devices of {count} workers: leave it out.")
    if set(content).isdisjoint(workers):
        given, asked = (", ".join(map(str, numbers)) for numbers in (content, workers))
        raise ConfigError(f"{option} {path} has settings of {given} workers, but --workers asks for {asked}.")
    if lacking := [str(count) for count in workers if count not in content]:
        words = f"{option} {path} has no settings of {', '.join(lacking)}"
        print(f"{words} worker{'s' * (lacking != ['1'])}: the configuration's are taken.", flush=True)
    return {count: as_settings(settings) for count, settings in content.items() if count in workers}


def read_rows(path: Path) -> dict[str, Settings]:
    """Read the rows of a table (`--rows`), each a label with the settings that are its own.

    MAML: {model.algorithm: MAML, model.algorithm.inner_lr: 0.01}

    Raises:
        ConfigError: names the file, and what in it is not understood.
    """
    form = "lines of the form `LABEL: {NAME: VALUE, ...}` are expected"
    content = read_settings("--rows", path, form)
    for label, settings in content.items():
        if not isinstance(settings, dict):
            raise ConfigError(f"--rows {path} has {label}: {settings}, but {form}.")
    return {str(label): as_settings(settings) for label, settings in content.items()}
