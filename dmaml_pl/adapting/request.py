"""What is asked of `dmaml adapt`: its options, read and checked without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dmaml_pl.console.options import Options, whole
from dmaml_pl.errors import ConfigError

_FURTHER = """\
Pictures: --support is a folder with one folder a class, whose names are the classes' names; --query is a picture, a
folder of pictures, or a folder with folders of the same names, by which the accuracy is told. Regression: both are CSV
files with a header, their columns a sample's inputs and then its targets; the query file may lack the targets. What
--save has written is a --ckpt, too, then without --support.
"""


@dataclass(frozen=True)
class Request:
    """What a user asks of `dmaml adapt`; see its help."""

    ckpt: Path
    support: Path | None
    query: Path
    steps: int | None
    output: Path
    save: Path | None
    onnx: Path | None
    trust: list[str]


def _parser() -> Options:
    parser = Options(
        "dmaml adapt",
        description="Adapt a trained network to your own samples, and ask it about others.",
        epilog=_FURTHER,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, metavar="FILE", help="checkpoint of a training, such as best.ckpt")
    add("--support", type=Path, metavar="DIR", help="samples to adapt to: a folder of class folders, or a CSV file")
    add(
        "--query", type=Path, required=True, metavar="DIR_OR_FILE", help="samples to ask about: pictures, or a CSV file"
    )
    add("--steps", type=whole(1), metavar="N", help="adaptation steps (default: as many as in training)")
    add(
        "--output",
        type=Path,
        default=Path("predictions.csv"),
        metavar="FILE",
        help=".csv or .json (default: %(default)s)",
    )
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
    return parser


def parse(words: list[str]) -> Request:
    """Read the command line, and check what can be checked without PyTorch.

    Raises:
        ConfigError: names the option.
    """
    request = Request(**vars(_parser().parse_args(words)))
    if request.output.suffix not in (".csv", ".json"):
        raise ConfigError(f"--output is {request.output}, but its name must end in .csv or .json.")
    if not request.ckpt.is_file():
        raise ConfigError(f"--ckpt is {request.ckpt}, but there is no such file: give one such as best.ckpt.")
    for option, path in (("--support", request.support), ("--query", request.query)):
        if path is not None and not path.exists():
            raise ConfigError(f"{option} is {path}, but there is no such file or folder.")
    for option, path in (("--output", request.output), ("--save", request.save), ("--onnx", request.onnx)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"{option} is {path}, but must be a file in a folder that is there.")
    return request
