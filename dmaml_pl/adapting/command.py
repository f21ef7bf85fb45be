"""`dmaml adapt ...`. Light: its help, and its first checks, need no PyTorch."""

import argparse
import sys
from pathlib import Path

from dmaml_pl.console.options import Options, whole
from dmaml_pl.errors import ConfigError

_FURTHER = """\
Pictures: --support is a folder with one folder a class, whose names are the classes' names; --query is a picture, a
folder of pictures, or a folder with folders of the same names, by which the accuracy is told. Regression: both are CSV
files with a header, their columns a sample's inputs and then its targets; the query file may lack the targets. What
--save has written is a --ckpt, too, then without --support.
"""


def main(words: list[str]) -> int:
    """Adapt and predict as the words after `dmaml adapt` say; returns the exit code.

    Raises:
        DmamlError: what is wrong, in one line.
    """
    asked = _parse(words)
    if asked.trust and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a user's own classes, as `python -m` finds them
    if sys.stderr.isatty():
        print("Loading PyTorch ...", end="\r", file=sys.stderr, flush=True)
    from dmaml_pl.adapting.predicting import adapt_and_predict  # noqa: PLC0415 - what needs no PyTorch does not wait

    adapt_and_predict(**vars(asked))
    return 0


def _parse(words: list[str]) -> argparse.Namespace:
    """Read the command line, and check what can be checked without PyTorch."""
    parser = Options(
        "dmaml adapt",
        description="Adapt a trained network to your own samples, and ask it about others.",
        epilog=_FURTHER,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, metavar="FILE", help="checkpoint of a training, such as best.ckpt")
    add("--support", type=Path, metavar="DIR", help="samples to adapt to: a folder of class folders, or a CSV file")
    add("--query", type=Path, required=True, metavar="DIR_OR_FILE", help="what to ask about: pictures, or a CSV file")
    add("--steps", type=whole(1), metavar="N", help="adaptation steps (default: as many as in training)")
    add("--output", type=Path, default="predictions.csv", metavar="FILE", help=".csv or .json (default: %(default)s)")
    add("--save", type=Path, metavar="FILE", help="keep the adapted network, such as ADAPTED.pt")
    add("--onnx", type=Path, metavar="FILE", help="write the adapted network as ONNX")
    add(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module or package of yours that the checkpoint "
        "names classes of, such as that of your own network; may be repeated",
    )
    asked = parser.parse_args(words)
    if asked.output.suffix not in (".csv", ".json"):
        raise ConfigError(f"--output is {asked.output}, but its name must end in .csv or .json.")
    if not asked.ckpt.is_file():
        raise ConfigError(f"--ckpt is {asked.ckpt}, but there is no such file: give one such as best.ckpt.")
    for option in ("support", "query"):
        path = getattr(asked, option)
        if path is not None and not path.exists():
            raise ConfigError(f"--{option} is {path}, but there is no such file or folder.")
    for option in ("output", "save", "onnx"):
        path = getattr(asked, option)
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"--{option} is {path}, but must be a file in a folder that is there.")
    return asked
