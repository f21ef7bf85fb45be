"""Pictures of any kind, made samples of one size: photographs, scans, letters, in any format that Pillow reads.

Legend: C channels, H W image axes.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from dmaml_pl.errors import DataError

Fit = Literal["crop", "pad", "stretch"]
Pixels = NDArray[np.uint8]
Picture = Path | zipfile.Path


@dataclass(frozen=True)
class PictureReader(ABC):
    """Makes a sample of a picture, always the same way: for training, and for a user's own pictures later.

    A picture is turned upright by its EXIF data; what is transparent becomes white; of an animation the first frame is
    taken; of 16 bits the upper 8 remain.

    Args:
        size: pixels along each axis of a sample.
        channels: 3 for red, green and blue, 1 for grey.
    """

    size: int
    channels: Literal[1, 3] = 3

    @abstractmethod
    def make_sample(self, opened: Image.Image) -> Pixels:
        """The pixels (H, W) or (H, W, C) of a picture whose file was opened."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample."""
        return self.channels, self.size, self.size

    @property
    def identity(self) -> str:
        """Changes with everything that a sample's pixels depend on, but the picture."""
        return repr((self, PIL.__version__, "version 2"))

    def read(self, picture: Picture | IO[bytes], name: str | None = None) -> Pixels:
        """The pixels, uint8 (C, H, W).

        Args:
            picture: the file, which may lie in a .zip file.
            name: what to call it in an error, where it is not a file of its own.

        Raises:
            DataError: names the file, which is not a picture that can be read.
        """
        try:
            with picture.open("rb") if isinstance(picture, Picture) else picture as file, Image.open(file) as opened:
                pixels = self.make_sample(opened)
        except MemoryError:
            raise
        except Exception as error:  # on damaged files Pillow raises anything from SyntaxError to struct.error
            raise DataError(
                f"{name or picture} is not a picture that can be read ({_reason(error)}): mend it, or leave it out."
            ) from error
        return np.array(np.atleast_3d(pixels).transpose(2, 0, 1), order="C")  # a copy: Pillow's must not be written to

    def read_all(self, pictures: Iterable[Picture]) -> Iterator[Pixels]:
        """The pixels of many files in their order, read by as many threads as there are cores.

        Raises:
            DataError: names the first file that is not a picture that can be read, and counts them; nothing is given
                after it.
        """
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        waiting: deque[Future[Pixels]] = deque()
        unreadable: list[DataError] = []

        def first() -> Iterator[Pixels]:
            try:
                pixels = waiting.popleft().result()
            except DataError as error:
                unreadable.append(error)
            else:
                if not unreadable:
                    yield pixels

        with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
            # Of a picture's size or metadata; what cannot be read raises.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            try:
                for picture in pictures:
                    waiting.append(pool.submit(self.read, picture))
                    if len(waiting) > 4 * threads:
                        yield from first()
                while waiting:
                    yield from first()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        if unreadable:
            more = f" {len(unreadable) - 1} further ones cannot be read, either." if len(unreadable) > 1 else ""
            raise DataError(f"{unreadable[0]}{more}") from unreadable[0]

    def read_sample(self, path: Path | str) -> Tensor:
        """A picture as a sample, float32 (C, H, W) from 0 to 1.

        Raises:
            DataError: names the file, which is not a picture that can be read.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # as above
            return torch.from_numpy(self.read(Path(path))).float().div_(255)


@dataclass(frozen=True)
class PhotoReader(PictureReader):
    """Reads pictures as they are. They are reduced by Lanczos' filter, as in the MAML paper's code.

    Args:
        size: pixels along each axis of a sample.
        channels: 3 for red, green and blue, 1 for grey.
        fit: what happens to a picture that is not square: "crop" takes the largest square from its middle, "pad" gives
            it black sides, "stretch" squeezes it.
    """

    fit: Fit = "crop"

    def make_sample(self, opened: Image.Image) -> Pixels:
        """The pixels (H, W) or (H, W, 3) of a picture whose file was opened."""
        opened.draft("RGB", (2 * self.size, 2 * self.size))  # large JPEGs are decoded at a fraction of the size
        picture = _flat(ImageOps.exif_transpose(opened), "L" if self.channels == 1 else "RGB")
        size, method = (self.size, self.size), Image.Resampling.LANCZOS
        if self.fit == "crop":
            return np.asarray(ImageOps.fit(picture, size, method))
        if self.fit == "pad":
            return np.asarray(ImageOps.pad(picture, size, method))
        return np.asarray(picture.resize(size, method))


@dataclass(frozen=True)
class InkReader(PictureReader):
    """Reads pictures of letters: 0 for the ground and 255 for the ink.

    What most of a picture shows is the ground, so that dark ink on light paper and light letters on black give the
    same. A picture that is not square gets ground at its sides. It is reduced by the mean over each pixel's area:
    nothing rings, and thin strokes stay.
    """

    channels: Literal[1, 3] = 1

    def make_sample(self, opened: Image.Image) -> Pixels:
        """The pixels (H, W) of a picture whose file was opened."""
        grey = _flat(ImageOps.exif_transpose(opened), "RGB").convert("L")
        ground = int(np.median(np.asarray(grey)))
        side = max(grey.size)
        square = Image.new("L", (side, side), ground)
        square.paste(grey, ((side - grey.width) // 2, (side - grey.height) // 2))
        small = np.asarray(square.resize((self.size, self.size), Image.Resampling.BOX))
        return 255 - small if ground > 127 else small


def _flat(picture: Image.Image, mode: str) -> Image.Image:
    """In 8 bits a channel, and without transparency."""
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        return Image.fromarray((np.asarray(picture).clip(0, 65535) // 256).astype(np.uint8)).convert(mode)
    if picture.mode == "F":
        raise ValueError("its pixels are real numbers, and none of them says what is white: save it with 8 or 16 bits")
    if picture.has_transparency_data:
        coloured = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)
    return picture.convert(mode)


def _reason(error: Exception) -> str:
    """Pillow's words without the path, which stands before them already."""
    return "it is of no known format" if isinstance(error, PIL.UnidentifiedImageError) else str(error)
