"""Arrays that are costly to make (letters rendered, drawings decoded), kept on disk as one .npz a data set."""

from __future__ import annotations

import os
import uuid
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dmaml_pl.errors import DataError

Arrays = dict[str, np.ndarray]


def cache_folder(cache_dir: str | None) -> Path:
    """The folder the user named, or `$XDG_CACHE_HOME/dmaml_pl`, or `~/.cache/dmaml_pl`.

    Raises:
        DataError: no folder was named, and the user has no home folder.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if Path(xdg).is_absolute():  # the XDG specification asks to ignore relative paths
        return Path(xdg) / "dmaml_pl"
    try:
        return Path.home() / ".cache" / "dmaml_pl"
    except RuntimeError as error:
        raise DataError("There is no home folder to keep a cache in: set data.cache_dir to a folder.") from error


def load_or_make(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """The arrays kept at `path`; made, and kept there, when the file is missing or damaged.

    Any number of processes may do this at once: each that finds no file makes its own, and the last one stays.

    Args:
        path: an .npz file. Its name must change with everything that `make` depends on.
        make: makes the arrays.

    Raises:
        DataError: the folder of `path` cannot be written.
    """
    arrays = _load(path)
    if arrays is None:
        _write(path, None)  # before the work, so that a folder that cannot be written is told at once
        arrays = make()
        _write(path, arrays)
    return arrays


def _load(path: Path) -> Arrays | None:
    try:
        # Opened here because np.load leaves a damaged file open; the zip's checksums find damage in its middle.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error):
        return None


def _write(path: Path, arrays: Arrays | None) -> None:
    """Put the file in its place in one step, so that no other process ever reads half of it; with None, only try."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                if arrays is not None:
                    np.savez(file, **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle
            if arrays is not None:
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"The cache folder {path.parent} cannot be written ({error.strerror}): set data.cache_dir to one that can."
        ) from error
