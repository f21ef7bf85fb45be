"""Whether a file can be written is asked before the long work whose outcome it is to hold."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dmaml_pl.errors import ConfigError


def require_folder(setting: str, folder: Path) -> None:
    """Check that files can be written to a folder, which may still have to be made; makes nothing.

    Raises:
        ConfigError: names the setting.
    """
    _try(setting, folder, folder)


def require_file(setting: str, file: Path) -> None:
    """Check that a file can be written, whose folder may still have to be made; changes nothing.

    Raises:
        ConfigError: names the setting.
    """
    if not file.exists():
        _try(setting, file, file.parent)
        return
    try:
        with file.open("ab"):
            pass
    except OSError as error:
        raise unwritable(setting, file, error) from error


def _try(setting: str, shown: Path, folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise unwritable(setting, shown, error) from error


def unwritable(setting: str, path: Path, error: OSError) -> ConfigError:
    """The error of a path that cannot be written."""
    return ConfigError(
        f"{setting} is {path}, which cannot be written ({error.strerror or error}): set it to another one."
    )
