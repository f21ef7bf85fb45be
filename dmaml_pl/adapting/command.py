"""`dmaml adapt ...`. Light: its help, and its first checks, need no PyTorch."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dmaml_pl.checks import MOST_STEPS, or_last, require_file, tell_replaced
from dmaml_pl.console.options import Options, whole
from dmaml_pl.errors import ConfigError

_FURTHER = """\
Pictures: --support is a folder with one folder a class, whose names are the classes' names; --query is a picture, a
folder of pictures, or a folder with folders of the same names, by which the accuracy is told. Regression: both are CSV
files with a header, their columns a sample's inputs and then its targets; the query file may lack the targets. What
--save has written is a --ckpt, too, then without --support. Environments: --task tells the one that is meant from
others of its family, such as '{"goal": [0.3, -0.2]}'; the policy acts there, and its returns are told.
"""


def main(words: list[str]) -> int:
    """Adapt and predict as the words after `dmaml adapt` say; returns the exit code.

    Raises:
        DmamlError: what is wrong, in one line.
    """
    asked = _parse(words)
    if asked.trust and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a user's own classes, as `python -m` finds them
    asked.trust = [_module(name) for name in asked.trust]
    if sys.stderr.isatty():
        print("Loading PyTorch ...", end="\r", file=sys.stderr, flush=True)
    from dmaml_pl.adapting.predicting import adapt_and_predict  # noqa: PLC0415 - what needs no PyTorch does not wait

    adapt_and_predict(**vars(asked))
    return 0


def _module(name: str) -> str:
    """The module that is trusted; of a file, its folder becomes one in which Python looks for modules."""
    if not name.endswith(".py"):
        return name
    file = Path(name)
    if not file.is_file():
        raise ConfigError(f"--trust is {name}, but there is no such file.")
    sys.path.append(str(file.resolve().parent))
    return file.stem


def _task(text: str) -> dict[str, Any]:
    """The type of --task."""
    wrong = argparse.ArgumentTypeError(f"""is {text}, but must be a JSON object, such as '{{"goal": [0.3, -0.2]}}'""")
    try:
        task = json.loads(text)
    except json.JSONDecodeError as error:
        raise wrong from error
    if not isinstance(task, dict):
        raise wrong
    return task


def _parse(words: list[str]) -> argparse.Namespace:
    """Read the command line, and check what can be checked without PyTorch."""
    parser = Options(
        "dmaml adapt",
        description="Adapt a trained network to your own samples, and ask it about others; or a policy to a task.",
        epilog=_FURTHER,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--ckpt",
        type=Path,
        metavar="FILE",
        help="a training's checkpoint, such as best.ckpt, or what dmaml export wrote",
    )
    add("--support", type=Path, metavar="DIR", help="samples to adapt to: a folder of class folders, or a CSV file")
    add("--query", type=Path, metavar="DIR_OR_FILE", help="what to ask about: pictures, or a CSV file")
    add("--task", type=_task, metavar="JSON", help="environment to adapt a policy to, in place of samples")
    add("--steps", type=whole(1, MOST_STEPS), metavar="N", help="adaptation steps (default: as many as in training)")
    add("--output", type=Path, metavar="FILE", help=".csv or .json (default: predictions.csv)")
    add("--save", type=Path, metavar="FILE", help="keep the adapted network, such as ADAPTED.pt")
    add("--onnx", type=Path, metavar="FILE", help="write the adapted network as ONNX")
    add(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module or package of yours that the checkpoint "
        "names classes of, such as that of your own network, or its file; may be repeated",
    )
    asked = parser.parse_args(words)
    _check_together(asked)
    _check_files(asked)
    return asked


def _check_together(asked: argparse.Namespace) -> None:
    """Check that all is there, and that samples are asked about, or a policy is given a task, and not both."""
    needed = ("ckpt", "query") if asked.task is None else ("ckpt",)
    if missing := [f"--{option}" for option in needed if getattr(asked, option) is None]:
        other = " (or --task, for a policy)" if missing == ["--query"] else ""
        raise ConfigError(f"Not set: {', '.join(missing)}{other}. dmaml adapt --help lists all.")
    for option in ("support", "query", "output", "onnx") if asked.task is not None else ():
        if getattr(asked, option) is not None:
            raise ConfigError(f"--task is given, to which a policy adapts by acting: leave out --{option}.")


def _check_files(asked: argparse.Namespace) -> None:
    """Check that what is to be read is there, and that what is to be written can lie there."""
    if asked.output is not None and asked.output.suffix not in (".csv", ".json"):
        raise ConfigError(f"--output is {asked.output}, but its name must end in .csv or .json.")
    if not asked.ckpt.exists():
        instead = or_last(asked.ckpt, "give one such as best.ckpt")
        raise ConfigError(f"--ckpt is {asked.ckpt}, but there is no such file: {instead}.")
    for option in ("support", "query"):
        path = getattr(asked, option)
        if path is not None and not path.exists():
            raise ConfigError(f"--{option} is {path}, but there is no such file or folder.")
    if asked.task is None and asked.output is None:
        asked.output = Path("predictions.csv")
    files = ("ckpt", "support", "query", "output", "save", "onnx")
    places = {option: path.resolve() for option in files if (path := getattr(asked, option)) is not None}
    for option in ("output", "save", "onnx"):
        path = getattr(asked, option)
        if taken := [other for other in places if other != option and places[other] == places.get(option)]:
            raise ConfigError(f"--{option} is {path}, as --{taken[0]} is: give it a file of its own.")
        if path is not None:
            require_file(f"--{option}", path)
            tell_replaced(f"--{option}", path)
