"""Folders of pictures, each class of its own colour, as a user may have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from data_modules import ImageFolder

FORMATS = ("a.png", "b.JPG", "c.bmp", "d.gif", "e.webp", "f.tiff")
CLASSES = 12


def paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def colour_of(number: int) -> tuple[int, int, int]:
    return 20 * number, 255 - 20 * number, 100


def make_classes(root: Path, names: list[str]) -> Path:
    """Each class of its own colour, in six formats."""
    for number, name in enumerate(names):
        for file in FORMATS:
            paint(root / name / file, colour_of(number))
    return root


def make_pictures(folder: Path) -> Path:
    """`CLASSES` classes, in a new folder of this one."""
    return make_classes(folder / "pictures", [f"class{number:02}" for number in range(CLASSES)])


def folder(root: Path, **settings: Any) -> ImageFolder:
    defaults = {"ways": 2, "queries": 2, "image_size": 16, "meta_batch": 3, "cache_dir": str(root.parent / "cache")}
    return ImageFolder(root=str(root), **{**defaults, **settings})


def ready(root: Path, **settings: Any) -> ImageFolder:
    data = folder(root, **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def names(data: ImageFolder) -> dict[str, list[str]]:
    return {split: split_images.names for split, split_images in data.load_splits().items()}
