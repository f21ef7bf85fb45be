"""`dmaml completion`: prints a script by which a shell completes commands, configurations and settings."""

import argparse
from collections.abc import Iterator
from typing import Any, NoReturn
from unittest import mock

import shtab

from dmaml_pl.cli import configs
from dmaml_pl.cli.commands import LIGHT, TRAININGS, light_command
from dmaml_pl.console.options import Options

EPILOG = """\
  dmaml completion bash > ~/.local/share/bash-completion/completions/dmaml
  dmaml completion zsh > ~/.zfunc/_dmaml         with `fpath+=~/.zfunc; autoload -Uz compinit; compinit` in ~/.zshrc

New shells then complete. After an update of dmaml_pl, print it anew."""

CONFIG = {"bash": "_dmaml_config", "zsh": "_dmaml_config"}
FUNCTIONS = {
    "bash": '_dmaml_config() { compgen -W "NAMES" -- "$1"; compgen -f -- "$1"; }',
    "zsh": "_dmaml_config() { compadd -- NAMES; _files }",
}
"""What completes the name of a configuration, or of a file."""

FILES_OF_OURS = ("config", "own", "rows", "space")
"""Options that find the package's files by name."""


def main(words: list[str]) -> int:
    """Print the script of a shell; returns the exit code."""
    parser = Options(
        "dmaml completion",
        description="Print a script by which a shell completes commands, configurations and settings.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=[*FUNCTIONS])
    given = parser.parse_args(words)
    from dmaml_pl.cli.schema import config_schema  # noqa: PLC0415 - PyTorch is loaded only to be asked for its settings

    print(script(given.shell, config_schema()))
    return 0


def script(shell: str, schema: dict[str, Any]) -> str:
    """What `dmaml completion` prints.

    Args:
        shell: bash or zsh.
        schema: that of the configurations, whose settings are options of all trainings and studies.
    """
    function = FUNCTIONS[shell].replace("NAMES", " ".join(configs.names()))
    return str(shtab.complete(_every_command(schema), shell, preamble=function))


def settings(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The schemas of all settings by their dotted names, as the command line takes them: without `init_args`."""
    found: dict[str, dict[str, Any]] = {}

    def walk(node: Any, prefix: str, classes: frozenset[str]) -> None:
        for each in _ways(node, schema["$defs"], classes):
            inside = classes | {each["$ref"]} if "$ref" in each else classes
            for choice in each.get("allOf", []):
                walk(choice["then"]["properties"]["init_args"], prefix, inside)
            for name, inner in each.get("properties", {}).items():
                if name not in ("$schema", "class_path", "init_args", "dict_kwargs"):
                    found.setdefault(prefix + name, inner)
                    walk(inner, f"{prefix}{name}.", inside)

    walk(schema, "", frozenset())
    return found


def _ways(node: Any, classes: dict[str, Any], seen: frozenset[str] = frozenset()) -> Iterator[dict[str, Any]]:
    """What a setting may be, one by one, or an item of its list; a class with its settings, unless it is in `seen`."""
    if not isinstance(node, dict):
        return
    if "$ref" in node:
        if node["$ref"] not in seen:
            yield {**classes[node["$ref"].rpartition("/")[2]], "$ref": node["$ref"]}
        return
    yield node
    for each in [*node.get("anyOf", []), node.get("items")]:
        yield from _ways(each, classes, seen)


def _choices(node: dict[str, Any], classes: dict[str, Any]) -> list[str]:
    values: list[str] = []
    for each in _ways(node, classes):
        values += ["true", "false"] * ("boolean" in each.get("type", ()))
        values += [value for value in each.get("enum", []) if isinstance(value, str)]
        if "class_path" in each.get("properties", {}):
            values += _choices(each["properties"]["class_path"], classes)
    return [*dict.fromkeys(values)]


def _every_command(schema: dict[str, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dmaml")
    parser.add_argument("--version", action="store_true")
    commands = parser.add_subparsers()
    trainings = [commands.add_parser(name, help=f"dmaml {name} --help") for name in TRAININGS]
    for training in trainings:
        vars(training.add_argument("-c", "--config"))["complete"] = CONFIG  # shtab's way to be told
        training.add_argument("--print_config", action="store_true")
    for name in LIGHT:
        light = _parser_of(name)
        copied = commands.add_parser(name, help=light.description, parents=[light], add_help=False)
        for action in (action for each in [copied, *_below(copied)] for action in _actions(each)):
            if name == "configs" and action.dest == "name":
                action.choices = configs.names()
            elif not action.choices and action.nargs != 0:
                vars(action)["complete"] = CONFIG if action.dest in FILES_OF_OURS else shtab.FILE
        trainings += _below(copied) if name == "study" else []
    for name, setting in settings(schema).items():
        choices = _choices(setting, schema["$defs"])
        told = setting.get("description", name).replace("%", "%%")
        for training in trainings:
            action = training.add_argument(f"--{name}", choices=choices or None, help=told)
            vars(action).update({} if choices else {"complete": shtab.FILE})
    return parser


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return parser._actions  # noqa: SLF001 - argparse has no public way to ask what a parser takes


def _below(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [action.choices for action in _actions(parser) if isinstance(action, argparse._SubParsersAction)]  # noqa: SLF001
    return [below for choices in found for below in choices.values()]


class _Shown(Exception):  # noqa: N818 - nothing is wrong
    """Carries the parser of a command that has got as far as using it."""


def _parser_of(command: str) -> Options:
    def show(parser: Options, *_: Any) -> NoReturn:
        raise _Shown(parser)

    with mock.patch.object(Options, "parse_known_args", show):
        try:
            light_command(command)([])
        except _Shown as shown:
            parser: Options = shown.args[0]
    return parser
