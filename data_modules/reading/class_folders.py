"""Pictures sorted into folders, one a class, and lists that say which of them belong to which split."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from PIL import Image

from dmaml_pl.data import SPLITS
from dmaml_pl.errors import DataError

UNSPLIT = "all"
HIDDEN = (".", "__MACOSX")
FORM = "root/CLASS/PICTURE, or root/train/CLASS/PICTURE and the same with val and test"

Files = dict[str, dict[str, list[Path]]]
"""Of each split (or of the one part `UNSPLIT`) the pictures of each class, by its name."""


def find_classes(root: Path) -> Files:
    """The pictures below a folder; the folder that holds a picture is its class, and so is named.

    Where the folder has the sub-folders `train`, `val` and `test`, without pictures of their own, these are the splits.
    Hidden files, and files that are no pictures by their names, are passed over.

    Raises:
        DataError: the folder is missing or empty, or it cannot be told what is a class.
    """
    if not root.is_dir():
        raise DataError(f"data.root is {root}, but there is no such folder: {FORM} is expected.")
    suffixes = _suffixes()
    below = _pictures_below(root, suffixes, ())
    if root in below:
        raise DataError(f"data.root {root} has the picture {below[root][0].name} outside of any class: {FORM}.")
    if not below:
        raise DataError(f"data.root {root} has no folders with pictures in it: {FORM} is expected.")
    for folder, files in below.items():
        outer = next((parent for parent in folder.parents if parent in below), None)
        if outer is not None:
            raise DataError(
                f"{outer} holds the picture {below[outer][0].name}, and so is a class, but {files[0].parent} in it "
                "holds pictures, too: put the pictures of a class into one folder."
            )
    splits = [name for name in SPLITS if (root / name).is_dir() and root / name not in below]
    if not splits:
        return {UNSPLIT: {folder.relative_to(root).as_posix(): files for folder, files in below.items()}}
    if len(splits) < len(SPLITS):
        missing = next(name for name in SPLITS if name not in splits)
        raise DataError(
            f"data.root {root} has the folder {splits[0]}, but not {missing}: {', '.join(SPLITS)} are expected, or no "
            "such folder, and then the classes are dealt to the splits."
        )
    stray = next((folder for folder in below if folder.relative_to(root).parts[0] not in splits), None)
    if stray is not None:
        raise DataError(f"{stray} lies outside of the folders {', '.join(SPLITS)} of data.root {root}: move it there.")
    found: Files = {split: {} for split in splits}
    for folder, files in below.items():
        split, *names = folder.relative_to(root).parts
        found[split]["/".join(names)] = files
    _check_disjoint(found, {split: str(root / split) for split in splits})
    return found


def read_lists(root: Path, lists: Path) -> Files:
    """The pictures that lists name, one list a split.

    Args:
        root: where the pictures are.
        lists: folder with `train`, `val` and `test` as .csv files with the columns `filename` and `label`, as Ravi and
            Larochelle's of mini-ImageNet, or as .txt files with the name of a class folder in each line, as CIFAR-FS's.
            A file name is looked for in `root`, in the folder `images` there, and in that of the label.

    Raises:
        DataError: a list is missing or broken, or a picture is not there; names the file and the line.
    """
    if not root.is_dir():
        raise DataError(f"data.root is {root}, but there is no such folder.")
    found: Files = {}
    chosen: dict[str, str] = {}
    for split in SPLITS:
        path = next((lists / f"{split}{suffix}" for suffix in (".csv", ".txt") if _exists(lists, split, suffix)), None)
        if path is None:
            raise DataError(f"data.splits is {lists}, but {split}.csv (or {split}.txt) is not in it: one a split is.")
        try:
            found[split] = _read_csv(root, path) if path.suffix == ".csv" else _read_names(root, path)
        except (OSError, csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read ({error}).") from error
        if not found[split]:
            raise DataError(f"{path} lists nothing.")
        chosen[split] = str(path)
    _check_disjoint(found, chosen)
    return found


def _exists(folder: Path, split: str, suffix: str) -> bool:
    return (folder / f"{split}{suffix}").is_file()


def _read_csv(root: Path, path: Path) -> dict[str, list[Path]]:
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
            file = next((each for each in candidates if each.is_file()), None)
            if file is None:
                raise DataError(f"{where}: there is no {name} in data.root {root}, in its images or in its {label}.")
            if file in seen:
                raise DataError(f"{where}: {name} stands in line {seen[file]} already.")
            seen[file] = reader.line_num
            classes.setdefault(label, []).append(file)
    return {label: sorted(classes[label]) for label in sorted(classes)}


def _read_names(root: Path, path: Path) -> dict[str, list[Path]]:
    classes: dict[str, list[Path]] = {}
    suffixes = _suffixes()
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        where = f"{path}, line {number}"
        if not (root / name).is_dir():
            raise DataError(f"{where}: there is no folder {name} in data.root {root}.")
        if name in classes:
            raise DataError(f"{where}: the class {name} stands in it already.")
        below = _pictures_below(root / name, suffixes, ())
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


def _pictures_below(folder: Path, suffixes: frozenset[str], within: tuple[Path, ...]) -> dict[Path, list[Path]]:
    """Folders that hold pictures, and these, in the order of their names; follows links, but never in a circle."""
    real = folder.resolve()
    if real in within:
        return {}
    try:
        with os.scandir(folder) as scan:
            entries = sorted((each for each in scan if not each.name.startswith(HIDDEN)), key=lambda each: each.name)
        files = [Path(each) for each in entries if _suffix(each.name) in suffixes and each.is_file()]
        folders = [Path(each) for each in entries if each.is_dir()]
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}).") from error
    found = {folder: files} if files else {}
    for each in folders:
        found |= _pictures_below(each, suffixes, (*within, real))
    return found


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - of hundreds of thousands of names


def _suffixes() -> frozenset[str]:
    """Of all formats that Pillow reads."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in Image.OPEN)
