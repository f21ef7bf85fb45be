"""Mistakes in a user's own pictures, each named by its file, its line or its setting."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dmaml_pl.errors import ConfigError, DataError
from tests.picture_folders import make_classes, make_pictures, paint, ready


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_pictures(tmp_path)


# ---- what may be wrong with a folder


def broken_picture(root: Path) -> None:
    file = root / "class03" / "a.png"
    file.write_bytes(file.read_bytes()[:60])


def text_as_picture(root: Path) -> None:
    (root / "class03" / "a.png").write_text("no picture")


def real_numbers(root: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(root / "class03" / "a.tiff")


def loose(root: Path) -> None:
    paint(root / "stray.png", (0, 0, 0))


def class_in_class(root: Path) -> None:
    paint(root / "class03" / "old" / "x.png", (0, 0, 0))


def only_train(root: Path) -> None:
    make_classes(root, ["train/a"])


def shared_class(root: Path) -> None:
    shutil.rmtree(root)
    make_classes(root, ["train/cat", "train/dog", "val/cat", "test/bird"])


def capital_splits(root: Path) -> None:
    shutil.rmtree(root)
    make_classes(root, [f"{split}/{name}" for split in ("Train", "Valid", "Test") for name in ("cat", "dog")])


def two_names(root: Path) -> None:
    shutil.rmtree(root)
    make_classes(root, ["train/cat", "Val/dog", "validation/cow", "test/bird"])


def two_broken(root: Path) -> None:
    text_as_picture(root)
    (root / "class05" / "c.bmp").write_text("no picture, either")


def stray_class(root: Path) -> None:
    shutil.rmtree(root)
    make_classes(root, ["train/cat", "val/dog", "test/bird", "fish"])


def empty(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def missing(root: Path) -> None:
    shutil.rmtree(root)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (broken_picture, r"class03/a\.png is not a picture that can be read"),
        (text_as_picture, r"class03/a\.png is not a picture that can be read \(it is of no known format\)"),
        (real_numbers, r"class03/a\.tiff .* real numbers, .* save it with 8 or 16 bits"),
        (loose, r"data\.root .*pictures has the picture stray\.png outside of any class: root/CLASS/PICTURE"),
        (
            class_in_class,
            r"class03 holds the picture a\.png, and so is a class, but .*class03/old in it holds pictures",
        ),
        (only_train, r"has the folder train, but not val: train, val, test are expected"),
        (shared_class, r"The class cat is both in .*pictures/train and in .*pictures/val, but .* never seen"),
        (stray_class, r"pictures/fish lies outside of the folders train, val, test of data\.root"),
        (capital_splits, r"The class cat is both in .*pictures/Train and in .*pictures/Valid, but"),
        (two_names, r"pictures has the folders Val and validation: put one split into one folder"),
        (two_broken, r"class03/a\.png is not a picture that can be read .* 1 further ones cannot be read, either"),
        (empty, r"data\.root .* has no folders with pictures in it"),
        (missing, r"data\.root is .*, but there is no such folder"),
    ],
)
def test_a_mistake_in_the_folder_names_the_file(harm: Callable[[Path], None], message: str, root: Path) -> None:
    harm(root)

    with pytest.raises(DataError, match=message):
        ready(root)
    assert not list((root.parent / "cache").glob("*.tmp")) + list((root.parent / "cache").glob("*.pixels"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ways": 3},
            r"data\.ways is 3, but the val split of ImageFolder has 2 classes: .*2, or deal .*data\.val_share",
        ),
        (
            {"queries": 6},
            r"shots \+ data\.queries is 1 \+ 6, but the class class\d\d has 6 samples, and 1 further .* 6 t",
        ),
        ({"val_share": 0.5, "test_share": 0.5}, r"data\.val_share \+ data\.test_share is 0\.5 \+ 0\.5"),
        ({"val_share": 0}, r"data\.val_share is 0"),
        ({"image_size": 0}, r"data\.image_size is 0"),
    ],
)
def test_settings_that_the_folder_cannot_serve_name_the_setting(
    settings: dict[str, Any], message: str, root: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        ready(root, **settings)


def test_a_folder_of_two_classes_is_too_few_to_deal(tmp_path: Path) -> None:
    root = make_classes(tmp_path / "p", ["a", "b"])

    with pytest.raises(DataError, match=r"has 2 classes, which are too few to be dealt"):
        ready(root)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("val.csv", None, r"data\.splits is .*, but val\.csv \(or val\.txt\) is not in it"),
        ("val.csv", "file,class\na.png,b\n", r"val\.csv begins with file,class, but must with filename,label"),
        ("val.csv", "filename,label\nnone.png,b\n", r"val\.csv, line 2: there is no none\.png in data\.root"),
        ("val.csv", "filename,label\na.png,b\n", r"val\.csv, line 2: a\.png is there more than once: .*and .*a\.png"),
        ("val.csv", "filename,label\nb.JPG\n", r"val\.csv, line 2: a file name and a label are expected"),
        ("val.csv", "filename,label\na.png,class02\na.png,class02\n", r"val\.csv, line 3: a\.png stands in line 2"),
        ("val.csv", "filename,label\n", r"val\.csv lists nothing"),
        ("val.csv", "filename,label\na.png,class01\n", r"class01 is both in .*train\.csv and in .*val\.csv"),
        ("val.txt", "class02\nclass99\n", r"val\.txt, line 2: there is no folder class99"),
        ("val.txt", "class02\nclass02\n", r"val\.txt, line 2: the class class02 stands in it already"),
    ],
)
def test_a_mistake_in_a_list_names_its_line(name: str, text: str | None, message: str, root: Path) -> None:
    for split, label in (("train", "class01"), ("test", "class04")):
        (root / f"{split}.csv").write_text(f"filename,label\na.png,{label}\n")
    if text is not None:
        (root / name).write_text(text)

    with pytest.raises(DataError, match=message):
        ready(root, splits=str(root))


def test_a_folder_that_cannot_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data_modules.reading.class_folders.os.scandir", refuse)

    with pytest.raises(DataError, match=re.escape(f"{root} cannot be read (Permission denied)")):
        ready(root)
