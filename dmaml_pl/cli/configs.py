"""The configurations that come with the package: found by their names, listed and copied by `dmaml configs`."""

import argparse
import shutil
import sys
from itertools import pairwise
from pathlib import Path

from dmaml_pl.checks import suggest
from dmaml_pl.console.options import Options
from dmaml_pl.errors import ConfigError

EPILOG = """\
  dmaml fit --config sinusoid                   train with the one of that name
  dmaml configs copy sinusoid                   put it here, as sinusoid.yaml, to be changed
  dmaml configs copy sinusoid mine.yaml         under another name, or into a folder that is there

Where there is a file of that name here, --config takes it. Files for `dmaml study` lie in studies/: --space
studies/moments finds one."""


def folder() -> Path:
    """Where they lie: in the package, or beside it in a clone of the repository."""
    package = Path(__file__).parents[1]
    return next(each for each in (package / "configs", package.parent / "configs") if each.is_dir())


def names() -> list[str]:
    """Of all of them, without `.yaml`; those for `dmaml study` last."""
    files = [*sorted(folder().glob("*.yaml")), *sorted(folder().glob("*/*.yaml"))]
    return [file.relative_to(folder()).with_suffix("").as_posix() for file in files]


def find(given: str | Path) -> Path:
    """The file that is meant: one that is here, or else one of the package's.

    Args:
        given: a file, or a name such as `sinusoid`; `configs/sinusoid.yaml` where there is no folder `configs`, so that
            the commands of the documentation work anywhere.

    Returns:
        What was given where neither is there.
    """
    path = Path(given)
    if (path.exists() and not path.is_dir()) or path.is_absolute():
        return path
    name = str(given)
    if not Path("configs").is_dir() and path.suffix == ".yaml" and path.parts[0] == "configs":
        name = path.relative_to("configs").with_suffix("").as_posix()
    return folder() / f"{name}.yaml" if name in names() else path


def with_files(words: list[str]) -> list[str]:
    """A command line whose `--config NAME` are files."""
    found = list(words)
    for place, (word, after) in enumerate(pairwise([*words, ""])):
        option, equals, value = word.partition("=")
        if option in ("-c", "--config") and equals:
            found[place] = f"{option}={find(value)}"
        elif word in ("-c", "--config") and place + 1 < len(words):
            found[place + 1] = str(find(after))
    return found


def make_own_importable(words: list[str]) -> None:
    """Let a user's own classes be found: first in the working directory, last beside the configurations named."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    for option, value in pairwise(with_files([each for word in words for each in word.split("=", 1)])):
        beside = str(Path(value).resolve().parent)
        if option in ("-c", "--config") and beside not in sys.path and Path(value).is_file():
            sys.path.append(beside)


def main(words: list[str]) -> int:
    """List the configurations, or copy one; returns the exit code.

    Raises:
        ConfigError: there is none of that name, or the place to copy it to is taken.
    """
    parser = Options(
        prog="dmaml configs",
        description="List the configurations that come with dmaml_pl, or copy one.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    copy = commands.add_parser("copy", help="put one here")
    copy.add_argument("name", metavar="NAME", help="as `dmaml configs` lists it")
    copy.add_argument("target", metavar="TARGET", nargs="?", type=Path, default=Path(), help="a file or a folder")
    given = parser.parse_args(words)
    if given.command == "copy":
        _copy(given.name, given.target)
        return 0
    width = max(map(len, names()))
    for name in names():
        first = (folder() / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:{width}}  {first.removeprefix('# ')}")
    print(f"\nThey lie in {folder()}; its README.md says what they give.\n\n{EPILOG}")
    return 0


def _copy(name: str, target: Path) -> None:
    name = name.removesuffix(".yaml").removeprefix("configs/")
    if name not in names():
        raise ConfigError(f"There is no config {name}.{suggest(name, names())} `dmaml configs` lists them.")
    if target.is_dir():
        target /= f"{Path(name).name}.yaml"
    if target.exists():
        raise ConfigError(f"{target} is there already: name another, as in dmaml configs copy {name} mine.yaml.")
    try:
        shutil.copyfile(folder() / f"{name}.yaml", target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}.") from error
    print(target)
