"""The configurations that come with the package, found by their names."""

import sys
from itertools import pairwise
from pathlib import Path


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
