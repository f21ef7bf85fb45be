"""Images that are costly to make: made once into a file, which is then mapped into memory.

The pixels stay on disk, and the system keeps in memory what is used of them and fits; workers on a machine share that.
So there may be more images than memory.

Legend: C channels, H W image axes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from data_modules.class_images import ClassImages
from dmaml_pl.checks import at_home
from dmaml_pl.errors import DataError

SAY_EVERY = 60.0  # seconds
CHECKED_UP_TO = 2**26
"""Bytes of an entry whose checksums are checked, in some hundredths of a second; larger ones by their size alone."""

Sample = tuple[str, str, NDArray[np.uint8]]
"""Part of the data set, name of the class, and the pixels (C, H, W). The samples of a class come one after another."""


def cache_folder(cache_dir: str | None) -> Path:
    """The folder the user named, or `$XDG_CACHE_HOME/dmaml_pl`, or `~/.cache/dmaml_pl`.

    Raises:
        DataError: no folder was named, and the user has no home folder.
    """
    if cache_dir is not None:
        return at_home(cache_dir)
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if Path(xdg).is_absolute():  # the XDG specification asks to ignore relative paths
        return Path(xdg) / "dmaml_pl"
    try:
        return Path.home() / ".cache" / "dmaml_pl"
    except RuntimeError as error:
        raise DataError("There is no home folder to keep a cache in: set data.cache_dir to a folder.") from error


def fingerprint(identity: str, files: Mapping[str, Path] | None = None) -> str:
    """A name that changes with `identity`, and with the names, sizes and times of change of files.

    Args:
        identity: says all else that a cache entry depends on.
        files: by name.
    """
    key = hashlib.blake2b(identity.encode(), digest_size=8)
    for name, file in (files or {}).items():
        status = file.stat()
        key.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
    return key.hexdigest()


def load_or_make(
    path: Path, shape: tuple[int, int, int], make: Callable[[], Iterator[Sample]], what: str, count: int | None = None
) -> dict[str, ClassImages]:
    """The images kept at `path`, by part of the data set; made, and kept there, when they are missing or damaged.

    Processes that do this at once wait for the first, which makes them for all.

    Args:
        path: names `<path>.pixels` and `<path>.json`. Its name must change with everything that `make` depends on.
        shape: (C, H, W) of an image.
        make: yields the samples.
        what: what they are called while they are made.
        count: how many there will be, if that is known.

    Raises:
        DataError: the folder of `path` cannot be written.
    """
    images = _load(path, shape)
    if images is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{path.name}.lock")):
                images = _load(path, shape)  # another process may have made them meanwhile
                if images is None:
                    _write(path, _telling(make(), what, count))
                    images = _load(path, shape)
        except OSError as error:
            raise DataError(
                f"The cache folder {path.parent} cannot be written ({error.strerror or error}): set data.cache_dir to "
                "one that can."
            ) from error
    if images is None:
        raise DataError(f"{_files(path)[0]} was changed while it was made: use another data.cache_dir.")
    return images


def _files(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}.pixels"), path.with_name(f"{path.name}.json")


def _load(path: Path, shape: tuple[int, int, int]) -> dict[str, ClassImages] | None:
    pixels, index = _files(path)
    try:
        classes = [tuple(listed) for listed in json.loads(index.read_text(encoding="utf-8"))]
        parts, names, samples, checksums = (np.array(column) for column in zip(*classes, strict=True))
        ends = samples.cumsum()
        size = int(ends[-1]) * math.prod(shape)
        if pixels.stat().st_size != size:
            return None
        # Copy on write, as PyTorch knows no tensors that must not be written to.
        mapped = np.memmap(pixels, dtype=np.uint8, mode="c", shape=(int(ends[-1]), *shape))
        if size <= CHECKED_UP_TO:
            found = [zlib.crc32(mapped[end - number : end].data) for end, number in zip(ends, samples, strict=True)]
            if found != checksums.tolist():
                return None
    except (OSError, ValueError, TypeError):
        return None
    whole = ClassImages(torch.from_numpy(mapped), ends - samples, samples, names.tolist())
    return {part: whole.choose(np.flatnonzero(parts == part)) for part in dict.fromkeys(parts.tolist())}


def _write(path: Path, samples: Iterator[Sample]) -> None:
    """Write both files, each put in its place in one step, the index last: with it the entry is whole."""
    classes: dict[tuple[str, str], tuple[int, int]] = {}
    temporary = [file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp") for file in _files(path)]
    try:
        with temporary[0].open("xb") as file:
            for part, name, pixels in samples:
                content = pixels.tobytes()
                number, checksum = classes.get((part, name), (0, 0))
                classes[part, name] = number + 1, zlib.crc32(content, checksum)
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        listed = [[*names, *counted] for names, counted in classes.items()]
        temporary[1].write_text(json.dumps(listed), encoding="utf-8")
        for made, final in zip(temporary, _files(path), strict=True):
            made.replace(final)
    finally:
        for file_left in temporary:
            file_left.unlink(missing_ok=True)


def _telling(samples: Iterator[Sample], what: str, count: int | None) -> Iterator[Sample]:
    """The samples; where that takes minutes, a line a minute says how far it is."""
    said = time.monotonic()
    for number, sample in enumerate(samples):
        if time.monotonic() - said >= SAY_EVERY:
            said = time.monotonic()
            of = "" if count is None else f" of {count}"
            print(f"Decoding {what}, once: {number}{of} pictures.", file=sys.stderr, flush=True)
        yield sample
