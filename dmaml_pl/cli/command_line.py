"""Reads a command line and its files before the parser does, whose errors name neither the command nor the file."""

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import yaml

from dmaml_pl.checks import at_home, or_last, require_pictures, require_table, suggest
from dmaml_pl.cli import configs
from dmaml_pl.errors import CheckpointError, ConfigError, reason_of

LARGEST = 1_000_000
"""Bytes; reading so much takes some seconds."""

MOST_VALUES = 100_000
"""Values in a file, those that references (`*NAME`) repeat counted each time."""

STREAMS = ("/dev/stdin", "/dev/fd/")
"""Where a configuration may come through a pipe: of the shell's `|`, and its `<(...)`."""

OWN_DATA: dict[str, tuple[str, Callable[[Path], None]]] = {
    "ImageFolder": ("root", require_pictures),
    "Tabular": ("path", require_table),
    "TabularClasses": ("path", require_table),
}
"""The data modules that read a user's own files: which setting names them, and the check that they are there."""

MERGE = "tag:yaml.org,2002:merge"
"""Of the key `<<`, which may come more than once."""

STRATEGIES = {"dmaml": "dmaml_pl.DMAMLStrategy", "task_parallel": "dmaml_pl.TaskParallelStrategy"}
"""Names by which Lightning knows ours, and their classes."""


def with_strategies(words: list[str]) -> list[str]:
    """A command line whose `--trainer.strategy` is a class, and no name of Lightning's: only that may have settings."""
    option = "--trainer.strategy"
    named = {f"{option}={name}": f"{option}={path}" for name, path in STRATEGIES.items()}
    after = ["", *words[:-1]]
    return [
        STRATEGIES.get(word, word) if before == option else named.get(word, word)
        for before, word in zip(after, words, strict=True)
    ]


def check_command(words: list[str], commands: list[str]) -> None:
    """Check that the command line begins with a command, and that settings follow.

    Raises:
        ConfigError: names what is none, and what may have been meant.
    """
    if not words or words[0].startswith("-"):
        raise ConfigError("A command comes first: dmaml fit --config FILE. dmaml --help lists all.")
    if words[0] not in commands:
        raise ConfigError(f"{words[0]} is not a command.{suggest(words[0], commands)} dmaml --help lists all.")
    for before, word in pairwise(words):
        if not word.startswith("-") and (not before.startswith("-") or "=" in before):
            is_one = word.endswith((".yaml", ".yml")) or word in configs.names()
            close = f" Did you mean --config {word}?" if is_one else ""
            raise ConfigError(
                f"{word} is not a setting: those are given as --NAME VALUE, and files as --config FILE.{close}"
            )


def check_config_files(words: list[str]) -> None:
    """Check that the files after --config can be read.

    Raises:
        ConfigError: names the file, and the line where it is broken.
    """
    for word, after in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        given = value if equals else after
        if name not in ("-c", "--config") or given in ("", ".", "-"):
            continue
        try:
            path = configs.find(given)
            if path.is_dir() or not path.exists():
                near = suggest(Path(given).name, configs.names(), "--config ")
                raise ConfigError(
                    f"--config is {given}, but there is no such file.{near} `dmaml configs` lists those that come with "
                    "it."
                )
            if path.is_file():
                check_yaml("--config", path)
            elif not str(path).startswith(STREAMS):  # what comes through those can be read only once
                raise ConfigError(
                    f"--config is {given}, which is no file, and may never end or never come: give a file, /dev/stdin, "
                    "or <(...) of the shell."
                )
        except OSError as error:
            raise ConfigError(f"--config {given} cannot be read: {error.strerror}.") from error


def check_checkpoint(words: list[str]) -> None:
    """Check that the file after --ckpt_path is there; last, best and auto are found later.

    Raises:
        CheckpointError: there is no such file.
    """
    for word, after in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        wanted = value if equals else after
        chosen = wanted not in ("", "null", "best", "last", "auto")
        if name == "--ckpt_path" and chosen and not os.path.isfile(wanted):  # noqa: PTH113 - also of a name too long
            instead = or_last(Path(wanted), "give best, last or a file")
            raise CheckpointError(f"--ckpt_path is {wanted}, but there is no such file: {instead}.")


def check_own_data(words: list[str]) -> None:
    """Check that the pictures or the table to train on are there, where a data module of ours will read them.

    Raises:
        DataError: names the setting.
    """
    if any(word.startswith(("--help", "-h", "--print_config")) for word in words):
        return
    kind, settings = "", dict[str, object]()
    for word, after in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        given = value if equals else after
        if name in ("-c", "--config") and (path := configs.find(given)).is_file():
            data = yaml.safe_load(path.read_text(encoding="utf-8")).get("data")
            data = data if isinstance(data, dict) else {"class_path": data}
            kind = str(data.get("class_path") or kind)
            given_here = data.get("init_args")
            settings |= given_here if isinstance(given_here, dict) else {}
        elif name in ("--data", "--data.class_path"):
            kind = given
        else:
            settings[name.removeprefix("--data.").removeprefix("init_args.")] = given
    package, _, kind = kind.rpartition(".")
    if kind in OWN_DATA and package.partition(".")[0] in ("", "data_modules", "dmaml_pl"):
        setting, check = OWN_DATA[kind]
        named = settings.get(setting)
        if isinstance(named, str) and named and "$" not in named:
            check(at_home(named))


def check_yaml(option: str, path: Path) -> None:
    """Check that a YAML file can be read, and holds settings by name, each of them once.

    Raises:
        ConfigError: names the option, the file, and the line where it is broken.
        OSError: there is none that may be read.
    """
    file = f"{option} {path}"
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise ConfigError(f"{file} has {size:,} bytes, but a configuration has at most {LARGEST:,}.")
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        _check_values(file, root)
        loader.construct_document(root)  # finds tags and dates that are none
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{file} is not valid YAML{place}: {error.problem}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{file} is not a YAML file, or not in UTF-8 ({reason_of(error)}).") from error
    except RecursionError as error:
        raise ConfigError(f"{file} is nested too deeply to be read.") from error


def _check_values(file: str, root: yaml.Node | None) -> None:
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{file} holds no settings: lines of the form `name: value` are expected, as in "
            "`dmaml configs copy sinusoid`."
        )
    if _count(file, root, {}) > MOST_VALUES:
        raise ConfigError(f"{file} has more than {MOST_VALUES:,} values, those repeated by references (*NAME) counted.")


def _count(file: str, node: yaml.Node, counts: dict[int, int | None]) -> int:
    """Count the values of a node and below it; those of nodes that references lead to are counted once, and known then.

    YAML's readers let the last of two settings of a name stand, and drop the first without a word. A NUL, which no path
    or name may hold, is found here, too.
    """
    line = node.start_mark.line + 1
    if id(node) in counts:
        known = counts[id(node)]
        if known is None:
            raise ConfigError(f"{file} has a value that holds itself, in line {line}: leave its reference out.")
        return known
    counts[id(node)] = None
    below = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
        raise ConfigError(f"{file} has a NUL character in line {line}: leave it out.")
    if isinstance(node, yaml.MappingNode):
        _check_keys(file, node)
        below = [value for _, value in node.value]
    counts[id(node)] = total = 1 + sum(_count(file, each, counts) for each in below)
    return total


def _check_keys(file: str, node: yaml.MappingNode) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{file} has a setting in line {line} whose name is no text.")
        if key.value in seen and key.tag != MERGE:
            lines = f"{seen[key.value]} and {line}"
            raise ConfigError(f"{file} has {key.value} twice in one place, in lines {lines}: leave one of them.")
        seen[key.value] = line
