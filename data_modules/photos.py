"""Pictures of any kind, made samples of one size: photographs, scans, drawings, in any format that Pillow reads.

Legend: C channels, H W image axes.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True)
class PhotoReader:
    """Makes a sample of a picture, always the same way: for training, and for a user's own pictures later.

    A picture is turned upright by its EXIF data; what is transparent becomes white; of an animation the first frame is
    taken; of 16 bits the upper 8 remain. It is reduced by Lanczos' filter, as in the MAML paper's code.

    Args:
        size: pixels along each axis of a sample.
        channels: 3 for red, green and blue, 1 for grey.
        fit: what happens to a picture that is not square: "crop" takes the largest square from its middle, "pad" gives
            it black sides, "stretch" squeezes it.
    """

    size: int
    channels: Literal[1, 3] = 3
    fit: Fit = "crop"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample."""
        return self.channels, self.size, self.size

    @property
    def identity(self) -> str:
        """Changes with everything that a sample's pixels depend on, but the picture."""
        return repr((self.size, self.channels, self.fit, PIL.__version__, "version 1"))

    def read(self, picture: Path | IO[bytes], name: str | Path | None = None) -> Pixels:
        """The pixels, uint8 (C, H, W).

        Args:
            picture: the file.
            name: what to call it in an error, where it is not a file of its own.

        Raises:
            DataError: names the file, which is not a picture that can be read.
        """
        try:
            with Image.open(picture) as opened:
                opened.draft("RGB", (2 * self.size, 2 * self.size))  # large JPEGs are decoded at a fraction of the size
                upright = ImageOps.exif_transpose(opened)
                flat = _flat(upright, "L" if self.channels == 1 else "RGB")
            pixels = np.asarray(self._fitted(flat))
        except Exception as error:  # on damaged files Pillow raises anything from SyntaxError to struct.error
            raise DataError(
                f"{name or picture} is not a picture that can be read ({_reason(error)}): mend it, or leave it out."
            ) from error
        return np.array(np.atleast_3d(pixels).transpose(2, 0, 1), order="C")  # a copy: Pillow's must not be written to

    def read_all(self, files: Sequence[Path]) -> Iterator[Pixels]:
        """The pixels of many files in their order, read by as many threads as there are cores.

        Raises:
            DataError: names the first file that is not a picture that can be read.
        """
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        waiting: deque[Future[Pixels]] = deque()
        with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
            # Of a picture's size or metadata; what cannot be read raises.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            try:
                for file in files:
                    waiting.append(pool.submit(self.read, file))
                    if len(waiting) > 4 * threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def read_sample(self, path: Path) -> Tensor:
        """A picture as a sample, float32 (C, H, W) from 0 to 1.

        Raises:
            DataError: names the file, which is not a picture that can be read.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # as above
            return torch.from_numpy(self.read(path)).float().div_(255)

    def _fitted(self, picture: Image.Image) -> Image.Image:
        size, method = (self.size, self.size), Image.Resampling.LANCZOS
        if self.fit == "crop":
            return ImageOps.fit(picture, size, method)
        if self.fit == "pad":
            return ImageOps.pad(picture, size, method)
        return picture.resize(size, method)


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
