"""Pictures that may be more than fit in memory: decoded once into a file, which is mapped into memory.

The pixels stay on disk, and the system keeps in memory what is used of them and fits; workers on a machine share that.

Legend: C channels, H W image axes.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from dmaml_pl.errors import DataError

SAY_EVERY = 60.0  # seconds

Sample = tuple[str, str, NDArray[np.uint8]]
"""Part of the data set, name of the class, and the pixels (C, H, W). The samples of a class come one after another."""


@dataclass(frozen=True)
class Block:
    """The samples of a class: so many rows of the pixels, from a first one."""

    name: str
    start: int
    samples: int


@dataclass(frozen=True)
class PixelStore:
    """The decoded pictures of a data set.

    Attributes:
        pixels: uint8 (samples, C, H, W), mapped into memory; not to be written to.
        parts: of each part of the data set, its classes.
    """

    pixels: Tensor
    parts: dict[str, list[Block]]


def load_or_decode(
    path: Path, shape: tuple[int, int, int], decode: Callable[[], Iterator[Sample]], *, what: str, count: int | None
) -> PixelStore:
    """What is kept at `path`; decoded, and kept there, when it is missing or cut off.

    Processes that do this at once wait for the first, which decodes for all of them.

    Args:
        path: names `<path>.pixels` and `<path>.json`. Its name must change with everything that `decode` depends on.
        shape: (C, H, W) of a sample.
        decode: yields the samples.
        what: what they are called while they are decoded.
        count: how many there will be, if that is known.

    Raises:
        DataError: the folder of `path` cannot be written.
    """
    store = _load(path, shape)
    if store is None:
        with _writing(path.parent), _lock(path):
            store = _load(path, shape)  # another process may have decoded meanwhile
            if store is None:
                _decode(path, _told(decode(), what, count))
                store = _load(path, shape)
    if store is None:
        raise DataError(f"{_files(path)[0]} was changed while it was made: use another data.cache_dir.")
    return store


def _files(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}.pixels"), path.with_name(f"{path.name}.json")


def _load(path: Path, shape: tuple[int, int, int]) -> PixelStore | None:
    pixels, index = _files(path)
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))
        parts: dict[str, list[Block]] = {}
        samples = 0
        for part, name, number in listed:
            parts.setdefault(part, []).append(Block(name, samples, number))
            samples += number
        if pixels.stat().st_size != samples * math.prod(shape):
            return None
        # Copy on write, as PyTorch knows no tensors that must not be written to.
        mapped = np.memmap(pixels, dtype=np.uint8, mode="c", shape=(samples, *shape))
    except (OSError, ValueError, TypeError):
        return None
    return PixelStore(torch.from_numpy(mapped), parts)


def _decode(path: Path, samples: Iterator[Sample]) -> None:
    """Write both files, each put in its place in one step, the index last: with it the entry is whole."""
    counts: dict[tuple[str, str], int] = {}
    temporary = [file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp") for file in _files(path)]
    try:
        with temporary[0].open("xb") as file:
            for part, name, pixels in samples:
                counts[part, name] = counts.get((part, name), 0) + 1
                file.write(pixels.tobytes())
            file.flush()
            os.fsync(file.fileno())
        listed = [[part, name, number] for (part, name), number in counts.items()]
        temporary[1].write_text(json.dumps(listed), encoding="utf-8")
        for made, final in zip(temporary, _files(path), strict=True):
            made.replace(final)
    finally:
        for file_left in temporary:
            file_left.unlink(missing_ok=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(
            f"The cache folder {folder} cannot be written ({error.strerror or error}): set data.cache_dir to one that "
            "can."
        ) from error


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def _told(samples: Iterator[Sample], what: str, count: int | None) -> Iterator[Sample]:
    """The samples; where that takes minutes, a line a minute says how far it is."""
    said = time.monotonic()
    for number, sample in enumerate(samples):
        if time.monotonic() - said >= SAY_EVERY:
            said = time.monotonic()
            of = "" if count is None else f" of {count}"
            print(f"Decoding {what}, once: {number}{of} pictures.", file=sys.stderr, flush=True)
        yield sample
