"""Pictures sorted into folders, one a class, and lists that say which of them belong to which split."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path

from PIL import Image
from pytorch_lightning.utilities import rank_zero_info

from dmaml_pl.checks import PICTURES, require_pictures
from dmaml_pl.data import SPLITS, Split
from dmaml_pl.errors import DataError

UNSPLIT = "all"
HIDDEN = (".", "__MACOSX", "Thumbs.db", "desktop.ini")
SPLIT_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What folders of splits are called, in whatever case."""

HEIC = (".heic", ".heif", ".hif")
_SAID: set[str] = set()

Files = dict[str, dict[str, list[Path]]]
"""Of each split (or of the one part `UNSPLIT`) the pictures of each class, by its name."""


def find_classes(root: Path) -> Files:
    """The pictures below a folder; the folder that holds a picture is its class, and so is named.

    Where the folder has the sub-folders `train`, `val` and `test` (also Train, valid, Validation, testing and so on),
    without pictures of their own, these are the splits. Hidden files are passed over, and so are files that are no
    pictures by their names, which are counted, and said.

    Raises:
        DataError: the folder is missing or empty, or it cannot be told what is a class.
    """
    require_pictures(root)
    below = pictures_below(root)
    if root in below:
        raise DataError(f"data.root {root} has the picture {below[root][0].name} outside of any class: {PICTURES}.")
    if not below:
        raise DataError(f"data.root {root} has no folders with pictures in it: {PICTURES} is expected.")
    for folder, files in below.items():
        outer = next((parent for parent in folder.parents if parent in below), None)
        if outer is not None:
            raise DataError(
                f"{outer} holds the picture {below[outer][0].name}, and so is a class, but {files[0].parent} in it "
                "holds pictures, too: put the pictures of a class into one folder."
            )
    return _by_split(root, below)


def _by_split(root: Path, below: dict[Path, list[Path]]) -> Files:
    """Class folders by the folders of splits that they are in; all together where there are none."""
    homes = {folder: SPLIT_NAMES.get(folder.relative_to(root).parts[0].lower()) for folder in below}
    split_of = {folder.relative_to(root).parts[0]: split for folder, split in homes.items() if split is not None}
    split_of = {n: each for each in SPLITS for n, split in split_of.items() if split == each and root / n not in below}
    if not split_of:
        return {UNSPLIT: {folder.relative_to(root).as_posix(): files for folder, files in below.items()}}
    if doubled := next((name for name, split in split_of.items() if list(split_of.values()).count(split) > 1), None):
        others = [name for name, split in split_of.items() if split == split_of[doubled]]
        raise DataError(f"data.root {root} has the folders {' and '.join(others)}: put one split into one folder.")
    missing = next((split for split in SPLITS if split not in split_of.values()), None)
    if missing is not None:
        raise DataError(
            f"data.root {root} has the folder {next(iter(split_of))}, but not {missing}: {', '.join(SPLITS)} are "
            "expected, or no such folder, and then the classes are dealt to the splits."
        )
    stray = next((folder for folder in below if folder.relative_to(root).parts[0] not in split_of), None)
    if stray is not None:
        raise DataError(
            f"{stray} lies outside of the folders {', '.join(split_of)} of data.root {root}: move it there."
        )
    found: Files = {split: {} for split in SPLITS}
    for folder, files in below.items():
        name, *names = folder.relative_to(root).parts
        found[split_of[name]]["/".join(names)] = files
    _check_disjoint(found, {split: str(root / name) for name, split in split_of.items()})
    return found


def read_lists(root: Path, lists: Path) -> Files:
    """The pictures that lists name, one list a split.

    Args:
        root: where the pictures are.
        lists: folder with `train`, `val` and `test` as .csv files with the columns `filename` and `label`, as Ravi and
            Larochelle's of mini-ImageNet, or as .txt files with the name of a class folder in each line, as CIFAR-FS's.
            A file name is looked for in `root`, in the folder `images` there, in that of the label, and else anywhere
            below `root`: so pictures that are sorted otherwise, as by another split, need not be moved.

    Raises:
        DataError: a list is missing or broken, or a picture is not there; names the file and the line.
    """
    if not root.is_dir():
        raise DataError(f"data.root is {root}, but there is no such folder.")
    found: Files = {}
    chosen: dict[str, str] = {}
    anywhere = _Anywhere(root)
    for split in SPLITS:
        path = next((lists / f"{split}{suffix}" for suffix in (".csv", ".txt") if _exists(lists, split, suffix)), None)
        if path is None:
            raise DataError(f"data.splits is {lists}, but {split}.csv (or {split}.txt) is not in it: one a split is.")
        try:
            found[split] = _read_csv(root, path, anywhere) if path.suffix == ".csv" else _read_names(root, path)
        except (OSError, csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read ({error}).") from error
        if not found[split]:
            raise DataError(f"{path} lists nothing.")
        chosen[split] = str(path)
    _check_disjoint(found, chosen)
    return found


def _exists(folder: Path, split: str, suffix: str) -> bool:
    return (folder / f"{split}{suffix}").is_file()


class _Anywhere:
    """The pictures below a folder by their file names, read when the first is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def _places(self) -> dict[str, list[Path]]:
        places: dict[str, list[Path]] = {}
        for files in _pictures_below(self.root, suffixes(), [], ()).values():
            for file in files:
                places.setdefault(file.name, []).append(file)
        return places

    def find(self, name: str, where: str) -> Path:
        """The one picture of a name that stands in a list `where`."""
        places = self._places.get(name, [])
        if not places:
            raise DataError(f"{where}: there is no {name} in data.root {self.root}, nor in any folder below it.")
        if len(places) > 1:
            raise DataError(f"{where}: {name} is there more than once: {places[0]} and {places[1]}.")
        return places[0]


def _read_csv(root: Path, path: Path, anywhere: _Anywhere) -> dict[str, list[Path]]:
    classes: dict[str, list[Path]] = {}
    seen: dict[Path, int] = {}
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if not {"filename", "label"} <= set(reader.fieldnames or ()):
            raise DataError(f"{path} begins with {','.join(reader.fieldnames or ())}, but must with filename,label.")
        for row in reader:
            name, label = row["filename"], row["label"]
            where = f"{path}, line {reader.line_num}"
            if not name or not label:
                raise DataError(f"{where}: a file name and a label are expected.")
            candidates = (root / name, root / "images" / name, root / label / name)
            file = next((each for each in candidates if each.is_file()), None) or anywhere.find(name, where)
            if file in seen:
                raise DataError(f"{where}: {name} stands in line {seen[file]} already.")
            seen[file] = reader.line_num
            classes.setdefault(label, []).append(file)
    return {label: sorted(classes[label]) for label in sorted(classes)}


def _read_names(root: Path, path: Path) -> dict[str, list[Path]]:
    classes: dict[str, list[Path]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        where = f"{path}, line {number}"
        if not (root / name).is_dir():
            raise DataError(f"{where}: there is no folder {name} in data.root {root}.")
        if name in classes:
            raise DataError(f"{where}: the class {name} stands in it already.")
        below = pictures_below(root / name)
        classes[name] = sorted(file for files in below.values() for file in files)
        if not classes[name]:
            raise DataError(f"{where}: the folder {root / name} has no pictures in it.")
    return {name: classes[name] for name in sorted(classes)}


def _check_disjoint(found: Files, origin: dict[str, str]) -> None:
    """Check that no class is in two splits, which would make of meta-testing a test of memory."""
    home: dict[str, str] = {}
    for split, classes in found.items():
        for name in classes:
            if name in home:
                raise DataError(
                    f"The class {name} is both in {origin[home[name]]} and in {origin[split]}, but few-shot learning "
                    "is evaluated by classes never seen before: put every class into one split, with all its pictures."
                )
            home[name] = split


def pictures_below(folder: Path) -> dict[Path, list[Path]]:
    """Folders that hold pictures, and these, in the order of their names; says which other files are passed over.

    Raises:
        DataError: a folder cannot be read.
    """
    passed_over: list[Path] = []
    found = _pictures_below(folder, suffixes(), passed_over, ())
    tell_passed_over(folder, passed_over, found)
    return found


def tell_passed_over(folder: Path, files: list[Path], found: Iterable[Path]) -> None:
    """Say, once, how many files in a folder are passed over as no pictures, and which folders hold nothing else.

    Args:
        folder: that was searched.
        files: no pictures by their names.
        found: folders with pictures.
    """
    if not files:
        return
    known = set(found)
    empty = list(dict.fromkeys(file.parent for file in files if file.parent not in known and file.parent != folder))
    count = f"{len(files)} file{'s' * (len(files) > 1)}"
    line = f"Passed over in {folder}, as no pictures: {count}, such as {files[0].relative_to(folder)}."
    if empty:
        line += f" There is nothing else in {len(empty)} of the folders, such as {empty[0].relative_to(folder)}."
    if any(_suffix(file.name) in HEIC for file in files):
        line += " For HEIC: pip install pillow-heif."
    if line not in _SAID:
        _SAID.add(line)
        rank_zero_info(line)


def _pictures_below(
    folder: Path, wanted: frozenset[str], passed_over: list[Path], within: tuple[Path, ...]
) -> dict[Path, list[Path]]:
    """As `pictures_below`; follows links, but never in a circle."""
    real = folder.resolve()
    if real in within:
        return {}
    try:
        with os.scandir(folder) as scan:
            entries = sorted((each for each in scan if not each.name.startswith(HIDDEN)), key=lambda each: each.name)
        pictures: list[Path] = []
        folders: list[Path] = []
        for each in entries:
            picture = each.is_file() and _suffix(each.name) in wanted
            # What is none of the two may also be a link to nowhere.
            (folders if each.is_dir() else pictures if picture else passed_over).append(Path(each))
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}).") from error
    found = {folder: pictures} if pictures else {}
    for below in folders:
        found |= _pictures_below(below, wanted, passed_over, (*within, real))
    return found


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - of hundreds of thousands of names


def suffixes() -> frozenset[str]:
    """Of all formats that Pillow reads, HEIC among them where pillow-heif is installed."""
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in Image.OPEN)
