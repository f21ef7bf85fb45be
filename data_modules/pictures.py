"""Pictures read from a folder, or from a .zip file as it is."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dmaml_pl.errors import DataError

# Name of each picture -> its size, and its checksum (.zip) or time of change (folder): other pictures, other listing.
Listing = dict[str, tuple[int, int]]


def list_pictures(source: Path, depth: int) -> Listing:
    """The .png files of a folder or .zip file, in the order of their names.

    Args:
        source: a folder `<name>`, or `<name>.zip` with such a folder inside.
        depth: only pictures so many folders below `<name>` count.

    Returns:
        the listing; its names begin with `<name>/`, whether from a folder or a .zip file.

    Raises:
        DataError: the folder or file cannot be read.
    """
    try:
        if source.suffix == ".zip":
            with zipfile.ZipFile(source) as archive:
                found = {entry.filename: (entry.file_size, entry.CRC) for entry in archive.infolist()}
        else:
            found = {}
            for path in source.glob("/".join(["*"] * (depth + 1))):
                status = path.stat()
                found[path.relative_to(source.parent).as_posix()] = (status.st_size, status.st_mtime_ns)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{source} cannot be read ({error}): remove it, and fetch it anew.") from error
    prefix = f"{source.stem}/" if source.suffix == ".zip" else f"{source.name}/"
    return {
        name: found[name]
        for name in sorted(found)
        if name.startswith(prefix) and name.endswith(".png") and name.count("/") == depth + 1
    }


def read_pictures(source: Path, names: list[str], size: int) -> Iterator[np.ndarray]:
    """Pictures of a folder or .zip file as grey values, reduced to uint8 (size, size).

    Args:
        source: as for `list_pictures`.
        names: which pictures, as `list_pictures` names them.
        size: pixels along each axis.

    Raises:
        DataError: names the picture that cannot be read.
    """
    with _opened(source) as open_picture:
        for name in names:
            try:
                with open_picture(name) as file, Image.open(file) as picture:
                    # The mean over each pixel's area: nothing rings, and thin strokes stay.
                    small = picture.convert("L").resize((size, size), Image.Resampling.BOX)
            except Exception as error:  # on damaged files Pillow raises anything from SyntaxError to struct.error
                where = f"{source}, in it {name}," if source.suffix == ".zip" else f"{source.parent / name}"
                raise DataError(f"{where} is not a picture that can be read ({error}): fetch it anew.") from error
            yield np.asarray(small)


def read_ink(path: Path, size: int) -> Tensor:
    """A user's own picture of a letter as a sample: float32 (1, size, size), 0 for the ground and 1 for the ink.

    Any format that Pillow reads, grey or in colour; what is transparent is ground. What most of the picture shows is
    the ground, so that dark ink on light paper and light letters on black give the same. A picture that is not square
    gets ground at its sides. It is reduced as the training's own pictures are.

    Args:
        path: the picture.
        size: pixels along each axis.

    Raises:
        DataError: names the file, which is not a picture that can be read.
    """
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I;16"):  # which Pillow would cut off at 255
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            coloured = upright.convert("RGBA")
        paper = Image.new("RGBA", coloured.size, "white")
        grey = Image.alpha_composite(paper, coloured).convert("L")
        ground = int(np.median(np.asarray(grey)))
        side = max(grey.size)
        square = Image.new("L", (side, side), ground)
        square.paste(grey, ((side - grey.width) // 2, (side - grey.height) // 2))
        small = square.resize((size, size), Image.Resampling.BOX)
    except Exception as error:  # on damaged files Pillow raises anything from SyntaxError to struct.error
        raise DataError(f"{path} is not a picture that can be read ({error}): mend it, or leave it out.") from error
    ink = 255 - np.asarray(small) if ground > 127 else np.array(small)
    return torch.from_numpy(ink).float().div_(255).unsqueeze(0)


@contextmanager
def _opened(source: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    if source.suffix == ".zip":
        with zipfile.ZipFile(source) as archive:
            yield archive.open
    else:
        yield lambda name: (source.parent / name).open("rb")
