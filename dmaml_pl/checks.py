"""What is asked of settings before the work begins: that they are in range, and that what they name can be written."""

import difflib
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from dmaml_pl.errors import ConfigError, DataError


def require_kind(setting: str, value: object, kind: type, such_as: str) -> None:
    """Check that a part of a training is an object of its kind, and not its class, its name, or what else stands there.

    Raises:
        ConfigError: names the setting, and an object that would do.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{setting} is {value!r}, but must be of type {kind.__name__}, such as {such_as}.")


def _require_numbers(settings: dict[str, float]) -> None:
    for name, value in settings.items():
        if not hasattr(value, "__float__"):  # which numbers of NumPy and of PyTorch have, too
            raise ConfigError(f"{name} is {value!r}, but must be a number.")


def require_positive(**settings: float) -> None:
    """Check that each setting is greater than zero, and finite.

    Raises:
        ConfigError: names the first setting that is not.
    """
    _require_numbers(settings)
    for name, value in settings.items():
        if not value > 0:
            raise ConfigError(f"{name} is {value}, but must be greater than 0.")
        if math.isinf(value):
            raise ConfigError(f"{name} is {value}, but must be finite.")


def require_counts(**settings: int) -> None:
    """Check that each setting is a whole number greater than zero.

    Raises:
        ConfigError: names the first setting that is not.
    """
    for name, value in settings.items():
        if not hasattr(value, "__index__"):
            raise ConfigError(f"{name} is {value!r}, but must be a whole number.")
    require_positive(**settings)


def require_not_negative(**settings: float) -> None:
    """Check that each setting is zero or greater, and finite.

    Raises:
        ConfigError: names the first setting that is not.
    """
    _require_numbers(settings)
    for name, value in settings.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} is {value}, but must be 0 or greater{', and finite' * (value > 0)}.")


def require_all_counts(setting: str, values: Sequence[int]) -> None:
    """Check that a setting is a list of numbers, each of them as of `require_counts`.

    Raises:
        ConfigError: names the setting, and the first number that is not.
    """
    if not hasattr(values, "__iter__"):
        raise ConfigError(f"{setting} is {values!r}, but must be a list of whole numbers.")
    require_counts(**{f"{setting}[{number}]": value for number, value in enumerate(values)})


PICTURES = "root/CLASS/PICTURE, or root/train/CLASS/PICTURE and the same with val and test"
"""How a user's own pictures are to lie."""

MOST_STEPS = 10_000
"""Steps of an inner loop; even one task is tried with them before a training."""


def require_at_most(most: float, **settings: float) -> None:
    """Check that no setting is greater than a bound.

    Raises:
        ConfigError: names the first setting that is.
    """
    for name, value in settings.items():
        if value > most:
            raise ConfigError(f"{name} is {value}, but must be at most {most:,}.")


def require_one_of(setting: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that a setting is one of its choices.

    Raises:
        ConfigError: names the setting and the choices.
    """
    if value not in choices:
        raise ConfigError(f"{setting} is {value}, but must be {' or '.join(choices)}.")


def at_home(path: str) -> Path:
    """The path with `~` as the user's folder; that of a user who is not there stays as it is, and is not found."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - which raises an error of no setting


def require_platform() -> None:
    """Check that this is a system that can fork.

    Raises:
        ConfigError: it is Windows; says where on it this package runs.
    """
    if sys.platform == "win32":
        raise ConfigError("dmaml forks its workers, which Windows cannot: run it in WSL, Windows' own Linux.")


def require_pictures(root: Path) -> None:
    """Check that the folder of a user's own pictures is there.

    Raises:
        DataError: it is not; says what is expected of it.
    """
    if not root.is_dir():
        raise DataError(f"data.root is {root}, but there is no such folder: {PICTURES} is expected.")


def require_table(path: Path, setting: str = "data.path") -> None:
    """Check that a user's own table is there.

    Raises:
        DataError: it is not; names the setting.
    """
    if not path.is_file():
        raise DataError(f"{setting} is {path}, but there is no such file: a CSV or Parquet file is expected.")


def require_folder(setting: str, folder: Path) -> None:
    """Check that files can be written to a folder, which may still have to be made; makes nothing.

    Raises:
        ConfigError: names the setting.
    """
    _try(setting, folder, folder)


def tell_replaced(setting: str, file: Path) -> None:
    """Say that a file is there already, before it is replaced by what is to be written."""
    if file.exists():
        print(f"{setting} is {file}, which is there already, and will be replaced.", file=sys.stderr, flush=True)


def or_last(missing: Path, otherwise: str) -> str:
    """What to give in place of a checkpoint that is not there: `last.ckpt` where a training has left that alone.

    Args:
        missing: the checkpoint.
        otherwise: what to say where it is none such.
    """
    last = missing.parent / "last.ckpt"
    alone = missing.name == "best.ckpt" and last.is_file()
    return f"give {last}, which a training without validation leaves alone" if alone else otherwise


def require_file(setting: str, file: Path) -> None:
    """Check that a file can be written, whose folder may still have to be made; changes nothing.

    Raises:
        ConfigError: names the setting.
    """
    try:
        if file.exists():
            if not file.is_file():  # a device would be no more where a file is written beside it, and put in its place
                raise ConfigError(f"{setting} is {file}, which is there, and no file: set it to another one.")
            with file.open("ab"):
                return
    except OSError as error:
        raise unwritable(setting, file, error) from error
    _try(setting, file, file.parent)


def _try(setting: str, shown: Path, folder: Path) -> None:
    try:
        # A link to nowhere is there, too, and no folder can be made in its place.
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise unwritable(setting, shown, error) from error


def unwritable(setting: str, path: Path, error: OSError) -> ConfigError:
    """The error of a path that cannot be written."""
    return ConfigError(
        f"{setting} is {path}, which cannot be written ({error.strerror or error}): set it to another one."
    )


def suggest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A sentence with the nearest of the known words, in letters of any case, with a space before it; or nothing."""
    near = {each.lower(): each for each in known}
    close = [near[each] for each in difflib.get_close_matches(word.lower(), near, n=1, cutoff=0.6)]
    return f" Did you mean {prefix}{close[0]}?" if close and close[0] != word else ""
