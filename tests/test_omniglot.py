"""Omniglot: found in every form it comes in, split as is usual, and refused with a clear message when damaged.

Most tests use a made-up Omniglot of twelve characters; the last ones the real data set, where it is at hand.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

from data_modules import Omniglot
from data_modules.reading.pictures import InkReader
from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.tasks import check_tasks

REAL = Path(__file__).parents[2] / "shared" / "datasets" / "omniglot"
ALPHABETS = {"images_background": ["Magic", "Runes"], "images_evaluation": ["Signs"]}
CHARACTERS, DRAWINGS = 4, 6


def make_folders(root: Path) -> Path:
    """Twelve characters of six drawings: black bars on white, each character's in another place."""
    number = 0
    for part, alphabets in ALPHABETS.items():
        for alphabet in alphabets:
            for character in range(1, CHARACTERS + 1):
                folder = root / part / alphabet / f"character{character:02}"
                folder.mkdir(parents=True)
                for drawing in range(1, DRAWINGS + 1):
                    pixels = np.full((105, 105), True)
                    pixels[4 * number : 4 * number + 12, 10 * drawing : 10 * drawing + 30] = False
                    Image.fromarray(pixels).save(folder / f"{number:04}_{drawing:02}.png")
                number += 1
    return root


def make_archives(folders: Path, root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for part in ALPHABETS:
        with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
            archive.writestr(f"__MACOSX/{part}/Magic/character01/._0000_01.png", b"not a picture")
            for path in sorted((folders / part).rglob("*.png")):
                archive.write(path, path.relative_to(folders))
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folders(tmp_path / "omniglot")


def small(root: Path, **settings: Any) -> Omniglot:
    """Six characters for training, three for validation, three for testing, unless told otherwise."""
    defaults = {"ways": 2, "shots": 1, "queries": 2, "meta_batch": 2, "train_classes": 6, "val_classes": 3}
    return Omniglot(root=str(root), cache_dir=str(root.parent / "cache"), **{**defaults, **settings})


def equal(a: dict[Any, Tensor], b: dict[Any, Tensor]) -> bool:
    return all(torch.equal(a[split], b[split]) for split in ("train", "val", "test"))


def pictures(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.flatten(0, 1)}


# ---- where it is found


def test_folders_archives_and_torchvisions_layout_give_the_same_splits(root: Path, tmp_path: Path) -> None:
    expected = small(root).load_splits()
    archives = make_archives(root, tmp_path / "a" / "archives")
    torchvisions = tmp_path / "b" / "data"
    shutil.copytree(root, torchvisions / "omniglot-py")
    zipped_torchvisions = make_archives(root, tmp_path / "c" / "data" / "omniglot-py").parent

    for other in (archives, torchvisions, zipped_torchvisions):
        assert equal(expected, small(other).load_splits()), other


def test_files_that_are_no_drawings_are_passed_over(root: Path) -> None:
    expected = small(root).load_splits()
    (root / "images_background" / ".DS_Store").touch()
    (root / "images_background" / "Magic" / "stray.png").touch()
    (root / "images_background" / "Magic" / "character01" / "Thumbs.db").touch()

    assert equal(expected, small(root).load_splits())


@pytest.mark.parametrize("missing", ["everything", "images_background", "images_evaluation"])
def test_a_root_without_omniglot_says_what_belongs_there_and_how_to_get_it(root: Path, missing: str) -> None:
    shutil.rmtree(root if missing == "everything" else root / missing)

    with pytest.raises(DataError) as caught:
        small(root).prepare_data()

    for part in ("data.root", str(root), "images_background", "images_evaluation", "--data.download true"):
        assert part in str(caught.value)


def test_an_empty_part_says_what_belongs_there(root: Path) -> None:
    shutil.rmtree(root / "images_evaluation")
    (root / "images_evaluation").mkdir()

    with pytest.raises(DataError, match=r"images_evaluation holds no pictures: .*<character>/<drawing>\.png"):
        small(root).prepare_data()


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_damaged_picture_is_named(root: Path, content: bytes | None) -> None:
    picture = root / "images_evaluation" / "Signs" / "character02" / "0009_03.png"
    picture.write_bytes(picture.read_bytes()[:-30] if content is None else content)

    with pytest.raises(DataError, match=re.escape(str(picture))):
        small(root).prepare_data()


def test_a_damaged_picture_in_an_archive_is_named_with_its_archive(root: Path, tmp_path: Path) -> None:
    archives = make_archives(root, tmp_path / "archives")
    archive = archives / "images_background.zip"
    content = bytearray(archive.read_bytes())
    content[content.index(b"Runes/character03/0006_02.png") + 60] ^= 255
    archive.write_bytes(content)

    with pytest.raises(DataError, match=r"images_background\.zip/images_background/Runes/character03/0006_02\.png"):
        small(archives).prepare_data()


def test_an_archive_cut_off_is_named(root: Path, tmp_path: Path) -> None:
    archive = make_archives(root, tmp_path / "archives") / "images_background.zip"
    archive.write_bytes(archive.read_bytes()[:1000])

    with pytest.raises(DataError, match=r"images_background\.zip cannot be read .* fetch it anew"):
        small(archive.parent).prepare_data()


def test_a_character_with_drawings_missing_is_named(root: Path) -> None:
    (root / "images_background" / "Runes" / "character02" / "0005_01.png").unlink()

    with pytest.raises(DataError, match=r"Runes/character02 has 5 drawings, but .* has 6"):
        small(root).setup("fit")


# ---- Lake's own split


def lakes(root: Path, **settings: Any) -> Omniglot:
    return small(root, split="lake", val_alphabets=1, rotations=False, **settings)


def alphabet_of(image: Tensor) -> str:
    """Alphabet of a picture, by where its bar begins: character n's in row n of 28."""
    number = int(image.squeeze().amax(dim=1).nonzero()[0])
    return ["Magic", "Runes", "Signs"][number // CHARACTERS]


@pytest.mark.parametrize("sampler", ["batched", "learn2learn"])
def test_in_lakes_split_alphabets_are_of_one_split_and_a_tasks_characters_of_one_alphabet(
    root: Path, sampler: str
) -> None:
    data = lakes(root, sampler=sampler)
    data.setup("fit")
    seen = {}
    for split in ("train", "val", "test"):
        tasks = data.sample_tasks(split, range(20))
        found = [{alphabet_of(image) for image in task} for task in torch.cat([tasks.support_x, tasks.query_x], 1)]
        assert all(len(alphabets) == 1 for alphabets in found)
        seen[split] = set().union(*found)
    assert seen["test"] == {"Signs"}
    assert len(seen["train"]) == len(seen["val"]) == 1
    assert seen["train"] | seen["val"] == {"Magic", "Runes"}


def test_turned_alphabets_are_alphabets_of_their_own(root: Path) -> None:
    data = small(root, split="lake", val_alphabets=1)
    assert {len(set(images.groups)) for images in data.load_splits().values()} == {4}


def test_a_task_of_one_alphabet_is_a_function_of_its_seed_alone(root: Path) -> None:
    data = small(root, split="lake", val_alphabets=1)
    data.setup("fit")
    together = data.sample_tasks("test", range(8))
    for seed in range(8):
        assert torch.equal(data.sample_task("test", seed).support_x, together.support_x[seed])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"val_alphabets": 2}, r"data\.val_alphabets is 2, but .* has 2 alphabets"),
        ({"ways": 5}, r"data\.ways is 5, but the .* split of Omniglot has 4 classes in its largest alphabet"),
        ({"split": "mine"}, r"data\.split is mine, but must be characters or lake"),
    ],
)
def test_lakes_split_tells_what_does_not_fit(root: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        small(root, **{"split": "lake", "val_alphabets": 1, "rotations": False, **settings}).setup("fit")


# ---- download


def test_download_fetches_both_parts_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(target: str, background: bool, download: bool) -> None:
        assert download
        asked.append(background)
        part = "images_background" if background else "images_evaluation"
        shutil.copytree(root / part, Path(target) / "omniglot-py" / part)

    monkeypatch.setattr(torchvision.datasets, "Omniglot", fetch)
    for _ in range(2):
        small(tmp_path / "new" / "data", download=True).prepare_data()

    assert asked == [True, False]


def test_a_failed_download_says_what_to_do_without_a_chain_of_causes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets, "Omniglot", fetch)

    with pytest.raises(DataError, match=r"could not be fetched into data\.root .*Name or service not known") as caught:
        small(tmp_path / "data", download=True).prepare_data()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


# ---- images and splits


def test_ink_is_one_and_paper_zero(root: Path) -> None:
    data = small(root)
    data.setup("fit")
    batch = data.sample(worker=0, run=0, iteration=0)

    check_tasks(batch)
    assert batch.support_x.shape == (2, 2, 1, 28, 28)
    assert batch.query_x.shape == (2, 4, 1, 28, 28)
    assert batch.query_x.min() == 0
    assert batch.query_x.max() == 1
    # A bar of 12x30 in 105x105 pixels keeps its share of the picture.
    assert batch.query_x.mean().item() == pytest.approx(12 * 30 / 105**2, rel=0.02)


def test_every_character_is_in_one_split_only(root: Path) -> None:
    splits = small(root, rotations=False).load_splits()

    assert [len(splits[split]) for split in ("train", "val", "test")] == [6, 3, 3]
    assert len(set.union(*map(pictures, splits.values()))) == 12 * DRAWINGS


def test_rotations_are_classes_in_the_split_of_their_character(root: Path) -> None:
    upright = small(root, rotations=False).load_splits()
    turned = small(root).load_splits()

    for split, images in turned.items():
        quarters = images.view(4, -1, DRAWINGS, 1, 28, 28)
        for number in range(4):
            assert torch.equal(quarters[number], torch.rot90(upright[split], number, (3, 4)))


def test_the_split_follows_its_seed_alone(root: Path) -> None:
    splits = small(root, seed=0).load_splits()

    assert equal(splits, small(root, seed=1, evaluation_seed=1).load_splits())
    assert not equal(splits, small(root, split_seed=1).load_splits())


def test_a_split_that_leaves_no_test_characters_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train_classes \+ data\.val_classes is 9 \+ 3, .* has 12 characters"):
        small(root, train_classes=9).setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 13}, r"data\.ways is 13, but the val split of Omniglot has 12 classes: choose 2 to 12\."),
        ({"ways": 4, "rotations": False}, r"has 3 classes: choose 2 to 3\."),
        ({"queries": 6}, r"data\.shots \+ data\.queries is 1 \+ 6, but .* 6 samples: .* at most 6"),
    ],
)
def test_settings_that_omniglot_cannot_serve_are_refused(root: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(root, **settings).setup("fit")


def test_split_sizes_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"data\.val_classes is 0"):
        Omniglot(val_classes=0)


# ---- the cache


def test_pictures_are_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(root).prepare_data()
    monkeypatch.setattr(InkReader, "read", lambda *_: pytest.fail("read again"))

    small(root, split_seed=3, rotations=False).setup("fit")


def test_changed_pictures_are_read_anew(root: Path) -> None:
    before = small(root).load_splits()
    Image.new("1", (105, 105)).save(root / "images_background" / "Magic" / "character01" / "0000_01.png")

    assert not equal(before, small(root).load_splits())


# ---- the real data set


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Omniglot:
    if not REAL.is_dir():
        pytest.skip(f"the real Omniglot is not at {REAL}")
    data = Omniglot(root=str(REAL), cache_dir=str(tmp_path_factory.mktemp("omniglot")), ways=20)
    data.prepare_data()
    data.setup("fit")
    return data


def test_the_real_omniglot_has_the_usual_split(real: Omniglot) -> None:
    splits = real.load_splits()

    assert {split: tuple(images.shape) for split, images in splits.items()} == {
        "train": (4400, 20, 1, 28, 28),
        "val": (400, 20, 1, 28, 28),
        "test": (1692, 20, 1, 28, 28),
    }


def test_the_real_omniglot_gives_twenty_way_tasks(real: Omniglot) -> None:
    task = real.evaluation_task("test", 0)

    assert task.support_x.shape == (20, 1, 28, 28)
    assert task.query_x.shape == (300, 1, 28, 28)
    assert 0.03 < task.query_x.mean() < 0.2  # thin strokes, white on black


def test_classes_of_the_real_omniglot_are_told_apart_better_than_by_chance(real: Omniglot) -> None:
    right = []
    for number in range(10):
        task = real.evaluation_task("test", number)
        nearest = torch.cdist(task.query_x.flatten(1), task.support_x.flatten(1)).argmin(1)
        right.append((task.support_y[nearest] == task.query_y).float().mean())

    assert torch.stack(right).mean() > 0.2  # by chance 0.05
