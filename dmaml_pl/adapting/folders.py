"""A user's own pictures: a support folder with one folder a class, and the pictures to be told apart.

Legend: B pictures, C H W image axes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_modules.reading.class_folders import HIDDEN, suffixes, tell_passed_over
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
        """All of them as samples (B, C, H, W); the reader's error names the first that is damaged."""
        return torch.stack([reader.read_sample(file) for file in self.files])


def find_pictures(option: str, path: Path, classes: list[str] | None = None) -> Pictures:
    """The pictures of an option: one file, a folder of them, or a folder with one folder for each of some classes.

    Raises:
        DataError: names what is not there, or is no class.
    """
    if path.is_file():
        return Pictures([path], [path.name], None)
    folders, files = _contents(path)
    if not folders and not files:
        raise DataError(f"{option} {path} has no pictures in it, and no folders with pictures.")
    if not folders:
        return Pictures(files, [file.name for file in files], None)
    known = [folder.name for folder in folders] if classes is None else classes
    strange = [folder.name for folder in folders if folder.name not in known]
    if strange:
        raise DataError(
            f"{option} {path} has the folder {strange[0]}, which is no class of the support ({', '.join(known)}): "
            "give a folder of pictures, or one with folders of these names."
        )
    if files:
        raise DataError(f"{option} {path} has class folders, but {files[0].name} lies outside of them: sort all.")
    for folder in folders:
        pictures = _contents(folder)[1]
        if not pictures:
            raise DataError(f"{option} {path}: the folder of class {folder.name} has no pictures in it.")
        files += pictures
    return Pictures(files, [file.relative_to(path).as_posix() for file in files], [file.parent.name for file in files])


def _contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and pictures in a folder; other files are passed over, which is said of those that are not hidden."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith(HIDDEN))
    files, known = [entry for entry in entries if entry.is_file()], suffixes()
    tell_passed_over(folder, [file for file in files if file.suffix.lower() not in known], [folder])
    return [entry for entry in entries if entry.is_dir()], [file for file in files if file.suffix.lower() in known]
