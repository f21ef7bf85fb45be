"""Command lines that a user can copy: the one that was given, changed in a few words."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dmaml_pl.errors import redact


def program() -> list[str]:
    """How a person starts this program: `python -m package` has a path of its own inside."""
    path = Path(sys.argv[0] or sys.executable)
    if path.name == "__main__.py":
        return ["python", "-m", path.parent.name]
    return ["python", str(path)] if path.suffix == ".py" else [path.name]


def command(words: Sequence[str]) -> str:
    """A command line of this program as a shell takes it, without secrets, of the words after the program's name.

    In a notebook it is that of the program which computes for it, of which nobody types anything.
    """
    if Path(sys.argv[0]).name == "ipykernel_launcher.py":
        return "a notebook"
    return redact(shlex.join([*program(), *words]))


def without(words: Sequence[str], *options: str) -> list[str]:
    """Words without some options and their values, as `--NAME VALUE` and as `--NAME=VALUE`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in options:
        parser.add_argument(option, nargs="?")
    return parser.parse_known_args(words)[1]


def meta_test_command(words: Sequence[str], checkpoint: str) -> str | None:
    """The command that meta-tests a checkpoint as a `dmaml fit` or `dmaml test` did; None after another program."""
    if not words or words[0] not in ("fit", "test"):
        return None
    rest = without(words[1:], "--ckpt_path", "--meta_test", "--register")
    return command(["test", *rest, "--ckpt_path", checkpoint])


def resume_command(words: Sequence[str], checkpoint: str) -> str:
    """The command that goes on with a `dmaml fit`."""
    return command([*without(words, "--ckpt_path"), "--ckpt_path", checkpoint])
