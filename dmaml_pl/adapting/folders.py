"""A user's own pictures: a support folder with one folder a class, and the pictures to be told apart.

Legend: S support samples, Q query samples, C H W image axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dmaml_pl.errors import DataError
from dmaml_pl.tasks import SampleReader


@dataclass(frozen=True)
class Pictures:
    """Pictures, found but not yet read.

    Attributes:
        files: the pictures.
        names: what to call each in a table: its path below the folder that was given.
        classes: the class of each, by name; None where the user has not sorted them.
    """

    files: list[Path]
    names: list[str]
    classes: list[str] | None

    def read(self, reader: SampleReader) -> Tensor:
        """All of them as samples (B, C, H, W).

        Raises:
            DataError: names the first that is damaged.
        """
        return torch.stack([reader.read_sample(file) for file in self.files])


def find_support(folder: Path) -> Pictures:
    """The pictures of a support folder: one folder a class, which gives it its name, with one or more pictures.

    Raises:
        DataError: names the folder, and what is expected in it.
    """
    form = "one folder a class, with one or more pictures in each, is expected"
    if not folder.is_dir():
        raise DataError(f"--support is {folder}, which is not a folder: {form} in it.")
    classes, loose = _contents(folder)
    if loose:
        raise DataError(f"--support {folder} has the picture {loose[0].name} outside of any class: {form}.")
    if not classes:
        raise DataError(f"--support {folder} has no folders in it: {form}.")
    return _sorted_pictures(folder, classes, "--support")


def find_query(path: Path, classes: list[str]) -> Pictures:
    """The pictures to be told apart: one file, a folder of them, or a folder with folders of the support's classes.

    Args:
        path: the file or folder.
        classes: names of the support's classes.

    Raises:
        DataError: names what is not there, or is no class.
    """
    if path.is_file():
        return Pictures([path], [path.name], None)
    if not path.is_dir():
        raise DataError(f"--query is {path}, but there is no such file or folder.")
    folders, loose = _contents(path)
    if not folders:
        if not loose:
            raise DataError(f"--query {path} has no pictures in it.")
        return Pictures(loose, [file.name for file in loose], None)
    strange = [folder.name for folder in folders if folder.name not in classes]
    if strange:
        raise DataError(
            f"--query {path} has the folder {strange[0]}, which is no class of the support ({', '.join(classes)}): "
            "give a folder of pictures, or one with folders of these names."
        )
    if loose:
        raise DataError(
            f"--query {path} has class folders, but {loose[0].name} lies outside of them: sort all or none."
        )
    return _sorted_pictures(path, folders, "--query")


def _contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and pictures in a folder; other files, and hidden ones, are passed over."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    suffixes = Image.registered_extensions()
    pictures = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in suffixes]
    return [entry for entry in entries if entry.is_dir()], pictures


def _sorted_pictures(folder: Path, folders: list[Path], option: str) -> Pictures:
    files: list[Path] = []
    for each in folders:
        pictures = _contents(each)[1]
        if not pictures:
            raise DataError(f"{option} {folder}: the folder of class {each.name} has no pictures in it.")
        files += pictures
    names = [file.relative_to(folder).as_posix() for file in files]
    return Pictures(files, names, [file.parent.name for file in files])
