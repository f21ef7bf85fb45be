"""A user's own pictures: every form they come in, every way to split them, and every mistake, named by its file."""

from __future__ import annotations

import csv
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from data_modules import Glyphs, ImageFolder, images
from data_modules.reading import cache
from data_modules.reading.pictures import PhotoReader
from data_modules.samplers import SamplerName
from dmaml_pl.data import PlottedTasks
from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.evaluation.figures import plot_image_tasks
from dmaml_pl.evaluation.predictions import PredictionWriter
from dmaml_pl.tasks import SampleReader, check_tasks
from tests.recipes import small_maml, small_trainer

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


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_classes(tmp_path / "pictures", [f"class{number:02}" for number in range(CLASSES)])


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


# ---- augmentation


class Noise(torch.nn.Module):
    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return picture + torch.rand(()) - 0.5


def test_augmentation_changes_every_training_picture_as_its_tasks_seed_says_and_no_other_task(root: Path) -> None:
    plain, data = ready(root), ready(root, augment=[v2.RandomHorizontalFlip(0.5), Noise()])
    state = torch.get_rng_state()
    tasks, unchanged = data.sample_tasks("train", [3, 4]), plain.sample_tasks("train", [3, 4])

    assert torch.equal(torch.get_rng_state(), state)
    shifts = torch.cat([tasks.support_x - unchanged.support_x, tasks.query_x - unchanged.query_x], 1).mean((2, 3, 4))
    assert len(set(shifts.flatten().round(decimals=4).tolist())) == shifts.numel(), "each picture by its own chance"
    assert torch.equal(data.sample_task("train", 4).query_x, tasks.query_x[1])
    assert torch.equal(data.evaluation_task("test", 0).query_x, plain.evaluation_task("test", 0).query_x)
    assert not torch.equal(data.sample_labelled(8, 0).x, plain.sample_labelled(8, 0).x)
    assert torch.equal(data.sample_labelled(8, 0).x, data.sample_labelled(8, 0).x)


def test_support_sets_are_augmented_in_every_split_and_queries_are_not(root: Path) -> None:
    plain, data = ready(root), ready(root, augment_support=[Noise()])
    for split in ("train", "test"):
        tasks, unchanged = data.sample_tasks(split, [5]), plain.sample_tasks(split, [5])
        assert not torch.equal(tasks.support_x, unchanged.support_x)
        assert torch.equal(tasks.query_x, unchanged.query_x)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (v2.Resize(8), r"data\.augment makes of pictures \(3, 16, 16\) such of \(3, 8, 8\), but must keep"),
        (v2.ToDtype(torch.uint8), r"data\.augment: ToDtype gives a tensor of torch\.uint8, but must give a picture"),
        (torch.nn.Linear(3, 3), r"data\.augment: Linear cannot take pictures \(3, 16, 16\)"),
    ],
)
def test_an_augmentation_that_gives_other_pictures_is_refused(
    transform: torch.nn.Module, message: str, root: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        ready(root, augment=[transform])


# ---- pictures of every kind


def test_pictures_of_all_formats_become_tasks_of_one_size(root: Path) -> None:
    batch = ready(root).sample(worker=0, run=0, iteration=0)

    check_tasks(batch)
    assert batch.support_x.shape == (3, 2, 3, 16, 16)
    assert batch.query_x.shape == (3, 4, 3, 16, 16)
    assert batch.query_x.dtype == torch.float32
    seen = (batch.query_x.mean((3, 4)) * 255).reshape(-1, 3)
    nearest = torch.cdist(seen, torch.tensor([colour_of(number) for number in range(CLASSES)]).float()).min(1).values
    assert nearest.max() < 4  # JPEG and WebP are not exact


@pytest.mark.parametrize(
    ("mode", "value", "suffix", "expected"),
    [
        ("1", 1, "png", (255, 255, 255)),
        ("L", 77, "png", (77, 77, 77)),
        ("LA", (77, 255), "png", (77, 77, 77)),
        ("RGBA", (10, 20, 30, 0), "png", (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), "tiff", (10, 20, 30)),
        ("I;16", 200 * 256 + 13, "png", (200, 200, 200)),
        ("I", 200 * 256 + 13, "tiff", (200, 200, 200)),
        ("CMYK", (0, 0, 0, 255), "tiff", (0, 0, 0)),
        ("YCbCr", (128, 128, 128), "tiff", (128, 128, 128)),
    ],
)
def test_every_mode_becomes_the_colours_that_are_seen(
    mode: str, value: Any, suffix: str, expected: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new(mode, (30, 20), value).save(path)

    pixels = PhotoReader(8).read(path)
    grey = PhotoReader(8, channels=1).read(path)

    assert pixels.shape == (3, 8, 8)
    assert np.abs(pixels.reshape(3, -1).T.astype(int) - expected).max() <= 1
    assert grey.shape == (1, 8, 8)
    assert abs(int(grey[0, 0, 0]) - np.dot(expected, (0.299, 0.587, 0.114))) <= 2


def test_a_palette_with_a_transparent_colour_has_white_there(tmp_path: Path) -> None:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 200, 0, 0])
    picture.paste(0, (0, 0, 4, 8))
    picture.save(tmp_path / "a.gif", transparency=0)

    pixels = PhotoReader(8).read(tmp_path / "a.gif")

    assert pixels[:, 4, 1].tolist() == [255, 255, 255]
    assert pixels[:, 4, 6].tolist() == [200, 0, 0]


def test_a_picture_turned_by_its_exif_data_is_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32))
    picture.paste((255, 255, 255), (0, 0, 32, 16))  # white above
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned: what is left in the file is above in the scene
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)

    pixels = PhotoReader(8, channels=1).read(tmp_path / "a.jpg")[0]

    assert pixels[:, -2:].min() > 200
    assert pixels[:, :2].max() < 50


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])

    assert PhotoReader(4).read(tmp_path / "a.gif")[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("fit", "left", "middle"), [("crop", 100, 200), ("stretch", 100, 200), ("pad", 100, 200)])
def test_pictures_that_are_not_square_are_cropped_squeezed_or_padded(
    fit: Any, left: int, middle: int, tmp_path: Path
) -> None:
    picture = Image.new("L", (64, 32), 100)
    picture.paste(200, (16, 0, 48, 32))  # the middle square
    picture.save(tmp_path / "a.png")

    pixels = PhotoReader(16, channels=1, fit=fit).read(tmp_path / "a.png")[0]

    assert pixels[8, 8] == middle
    if fit == "crop":
        assert pixels.min() >= 190
    elif fit == "pad":
        assert (pixels[0].max(), pixels[-1].max(), pixels[8, 1]) == (0, 0, left)
    else:
        assert pixels[0, 1] == pixels[-1, 1] == left


@pytest.mark.parametrize("channels", [1, 3])
def test_a_users_own_picture_is_read_as_those_of_training_are(channels: int, root: Path) -> None:
    data = ready(root, channels=channels)
    store = data.load_splits()["train"]
    assert isinstance(data, SampleReader)

    sample = data.read_sample(root / store.names[0] / "a.png")

    assert torch.equal(sample, store.pixels[store.starts[0]].float() / 255)


# ---- splits


def test_classes_are_dealt_by_their_names_and_the_seed_alone(root: Path, tmp_path: Path) -> None:
    dealt = names(folder(root))
    sizes = {split: len(classes) for split, classes in dealt.items()}
    assert sizes == {"train": 8, "val": 2, "test": 2}
    assert len(set(itertools.chain(*dealt.values()))) == CLASSES
    elsewhere = Path(shutil.copytree(root, tmp_path / "other" / "place"))

    assert names(folder(elsewhere, seed=5, image_size=8)) == dealt
    assert names(folder(root, split_seed=1)) != dealt
    assert {split: len(c) for split, c in names(folder(root, val_share=0.3, test_share=0.3)).items()} == {
        "train": 4,
        "val": 4,
        "test": 4,
    }


def test_a_class_is_the_folder_that_holds_its_pictures_however_deep(tmp_path: Path) -> None:
    root = make_classes(tmp_path / "letters", [f"{script}/{letter}" for script in "pqr" for letter in "abc"])

    assert sorted(itertools.chain(*names(folder(root)).values())) == [f"{s}/{n}" for s in "pqr" for n in "abc"]


def test_folders_train_val_and_test_are_the_splits(tmp_path: Path) -> None:
    root = make_classes(tmp_path / "p", ["train/a", "train/b", "train/c", "val/d", "val/e", "test/f", "test/g"])

    assert names(ready(root)) == {"train": ["a", "b", "c"], "val": ["d", "e"], "test": ["f", "g"]}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    root = make_classes(tmp_path / "p", ["train", "ship", "plane", "car", "bus", "bike"])

    assert "train" in itertools.chain(*names(folder(root, val_share=0.34, test_share=0.34)).values())


def write_lists(folder: Path) -> None:
    """Six classes of four pictures each, two classes a split."""
    for split, first in (("train", 0), ("val", 8), ("test", 16)):
        rows = [f"n{number:02}.png,class{number // 4}" for number in range(first, first + 8)]
        (folder / f"{split}.csv").write_text("filename,label\n" + "\n".join(rows) + "\n")


@pytest.mark.parametrize("place", ["", "images"])
def test_lists_of_files_and_labels_are_the_splits(place: str, tmp_path: Path) -> None:
    root = tmp_path / "mini"
    for number in range(24):
        paint(root / place / f"n{number:02}.png", colour_of(number // 4))
    write_lists(root)

    data = ready(root, splits=str(root), shots=2, queries=2)

    assert names(data) == {"train": ["class0", "class1"], "val": ["class2", "class3"], "test": ["class4", "class5"]}
    store = data.load_splits()["val"]
    assert store.samples.tolist() == [4, 4]
    assert store.pixels[store.starts[1], :, 0, 0].tolist() == list(colour_of(3))


def test_listed_files_are_found_in_whatever_folders_they_are_sorted_into(tmp_path: Path) -> None:
    root, lists = tmp_path / "mini", tmp_path / "lists"
    lists.mkdir()
    for number in range(24):
        part = "train" if number % 4 else "val"  # pictures of every class in both, as of another split
        paint(root / part / f"class{number // 4}" / f"n{number:02}.png", colour_of(number // 4))
    write_lists(lists)

    data = ready(root, splits=str(lists), shots=2, queries=2)

    assert names(data) == {"train": ["class0", "class1"], "val": ["class2", "class3"], "test": ["class4", "class5"]}
    store = data.load_splits()["test"]
    assert store.samples.tolist() == [4, 4]
    for row, colour in zip(store.starts.tolist(), (4, 5), strict=True):
        assert (store.pixels[row : row + 4, :, 0, 0] == torch.tensor(colour_of(colour))).all()


def test_lists_of_class_names_are_the_splits(root: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    for split, chosen in (("train", "class01\nclass07\n"), ("val", "class02\nclass03"), ("test", "class05\nclass00\n")):
        (lists / f"{split}.txt").write_text(chosen)

    assert names(ready(root, splits=str(lists)))["test"] == ["class00", "class05"]


def test_hidden_files_and_files_that_are_no_pictures_are_passed_over(root: Path) -> None:
    before = names(folder(root))
    (root / "class00" / "Thumbs.db").touch()
    (root / "class00" / "._a.png").touch()
    (root / ".cache" / "x").mkdir(parents=True)
    paint(root / ".cache" / "x" / "a.png", (0, 0, 0))
    (root / "notes.txt").touch()

    assert names(folder(root)) == before


def test_links_to_folders_are_followed_but_not_in_circles(root: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for number in range(CLASSES):
        (linked / f"class{number:02}").symlink_to(root / f"class{number:02}")
    (linked / "again").symlink_to(linked)

    assert names(folder(linked)) == names(folder(root))


# ---- tasks


@pytest.mark.parametrize("sampler", ["batched", "learn2learn"])
def test_classes_of_different_sizes_give_tasks_of_their_own_samples_only(sampler: SamplerName, root: Path) -> None:
    for number in range(CLASSES):
        for copy in range(number):
            paint(root / f"class{number:02}" / f"more{copy}.png", colour_of(number))
    data = ready(root, shots=2, queries=4, sampler=sampler)
    colours = torch.tensor([colour_of(number) for number in range(CLASSES)]).float()
    seen = set()
    for seed in range(40):
        task = data.sample_task("train", seed)
        x = torch.cat([task.support_x, task.query_x])
        numbers = torch.cdist(x.mean((2, 3)) * 255, colours).argmin(1)
        labels = torch.cat([task.support_y, task.query_y])
        assert len({(int(a), int(b)) for a, b in zip(numbers, labels, strict=True)}) == 2
        seen |= set(numbers.tolist())
    assert len(seen) == 8


def test_a_task_follows_from_its_seed_and_both_calls_give_the_same(root: Path) -> None:
    one, other = ready(root), ready(root)

    batch = one.sample_tasks("val", [3, 4])
    for a, b in zip(batch.task(1).tensors(), other.sample_task("val", 4).tensors(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(
        one.sample(worker=0, run=1, iteration=2).query_x, other.sample(worker=0, run=1, iteration=2).query_x
    )


# ---- the decoded pictures


def test_the_pixels_stay_on_disk_and_all_splits_share_them(root: Path) -> None:
    splits = ready(root).load_splits()

    assert len({split.pixels.data_ptr() for split in splits.values()}) == 1
    (file,) = (root.parent / "cache").glob("*.pixels")
    assert file.stat().st_size == splits["train"].pixels.nbytes == CLASSES * len(FORMATS) * 3 * 16 * 16
    assert str(file) in Path("/proc/self/maps").read_text()


def test_pictures_are_decoded_once_whatever_the_split(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(root).prepare_data()
    monkeypatch.setattr(PhotoReader, "read", lambda *_: pytest.fail("decoded again"))

    ready(root, split_seed=2, ways=2)


@pytest.mark.parametrize("change", ["content", "name", "gone", "size", "channels", "fit"])
def test_what_changes_the_pixels_decodes_anew(root: Path, change: str) -> None:
    folder(root).prepare_data()
    settings: dict[str, Any] = {"size": {"image_size": 8}, "channels": {"channels": 1}, "fit": {"fit": "pad"}}
    if change == "content":
        paint(root / "class00" / "a.png", (1, 2, 3), size=(24, 24))
    elif change == "name":
        (root / "class00" / "a.png").rename(root / "class00" / "z.png")
    elif change == "gone":
        (root / "class00" / "a.png").unlink()

    folder(root, **settings.get(change, {})).prepare_data()

    assert len(list((root.parent / "cache").glob("*.pixels"))) == 2


@pytest.mark.parametrize("damage", ["pixels cut off", "no index", "index broken"])
def test_a_damaged_cache_is_made_anew(root: Path, damage: str) -> None:
    before = folder(root).load_splits()["train"].pixels.clone()
    (pixels,) = (root.parent / "cache").glob("*.pixels")
    index = pixels.with_suffix(".json")
    if damage == "pixels cut off":
        pixels.write_bytes(pixels.read_bytes()[:-1])
    elif damage == "no index":
        index.unlink()
    else:
        index.write_text("[[")

    assert torch.equal(folder(root).load_splits()["train"].pixels, before)


def test_a_training_goes_on_while_another_one_decodes_the_changed_folder(root: Path) -> None:
    data = ready(root)
    before = data.sample_task("train", 0)
    paint(root / "class00" / "a.png", (1, 2, 3))
    folder(root).prepare_data()

    assert torch.equal(data.sample_task("train", 0).query_x, before.query_x)


def test_large_splits_stay_where_they_are_and_only_tasks_move(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data: Any = ready(root)
    trainer = type("T", (), {"strategy": type("S", (), {"root_device": torch.device("meta")})})
    data.trainer = trainer
    monkeypatch.setattr(images, "MOVED_UP_TO", 0)
    batch = data.sample(worker=0, run=0, iteration=0)
    assert (batch.support_x.device.type, batch.query_y.device.type) == ("meta", "meta")
    assert data._images["train"].device.type == "cpu"

    monkeypatch.setattr(images, "MOVED_UP_TO", 10**9)
    data.sample(worker=0, run=0, iteration=0)
    assert data._images["train"].device.type == "meta"
    assert data._images["val"] is data._images["train"]


def test_decoding_that_takes_long_says_how_far_it_is(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "SAY_EVERY", 0.0)

    folder(root).prepare_data()

    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"Decoding {root}, once: {CLASSES * len(FORMATS) - 1} of {CLASSES * len(FORMATS)} pictures."


# ---- mistakes


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


@pytest.mark.parametrize("called", [("Train", "Val", "Test"), ("training", "VALIDATION", "testing")])
def test_the_folders_of_the_splits_are_found_whatever_their_case(called: tuple[str, ...], tmp_path: Path) -> None:
    listed = [f"{split}/{number}{name}" for number, split in enumerate(called) for name in ("cat", "dog")]

    assert names(folder(make_classes(tmp_path / "pictures", listed))) == {
        "train": ["0cat", "0dog"],
        "val": ["1cat", "1dog"],
        "test": ["2cat", "2dog"],
    }


def test_files_that_are_no_pictures_by_their_names_are_counted_and_named_once(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("class00/IMG_1.HEIC", "class00/raw.CR2", "class00/Thumbs.db", "class00/.hidden", "heic/IMG_2.HEIC"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"no picture that Pillow reads")
    with caplog.at_level("INFO"):
        ready(root)

    (line,) = caplog.messages
    assert f"Passed over in {root}, as no pictures: 3 files, such as class00/IMG_1.HEIC." in line
    assert "There is nothing else in 1 of the folders, such as heic. For HEIC: pip install pillow-heif." in line


def test_predictions_name_the_files_that_they_are_of(root: Path, tmp_path: Path) -> None:
    data = ready(root, test_tasks=30)
    module = small_maml(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), objective="classification")
    for _ in range(2):  # the second replaces the first
        writer = PredictionWriter(str(tmp_path / "said.csv"))
        small_trainer(callbacks=[writer]).predict(module, data, return_predictions=False)
    with (tmp_path / "said.csv").open(newline="") as stream:
        said = list(csv.DictReader(stream))

    assert list(said[0]) == ["task", "query", "file", "target", "prediction"]
    assert [row["task"] + row["query"] for row in said[:5]] == ["00", "01", "02", "03", "10"]
    task = data.evaluation_task("test", 7)
    for row, picture in zip(said[28:32], task.query_x, strict=True):
        assert row["task"] == "7"
        torch.testing.assert_close(data.read_sample(root / row["file"]), picture)


def test_grey_pictures_are_plotted_as_they_are_and_ink_dark_on_light(root: Path, tmp_path: Path) -> None:
    assert not ready(root, channels=1).tasks_to_plot(1).ink_is_bright
    glyphs = Glyphs(cache_dir=str(tmp_path / "glyphs"))
    glyphs.setup("test")
    assert glyphs.tasks_to_plot(1).ink_is_bright
    tasks, files = ready(root, channels=1).evaluation_tasks("test", [0]), (tmp_path / "as_is.png", tmp_path / "ink.png")
    tasks = tasks.map_inputs(torch.ones_like)
    for file, ink in zip(files, (False, True), strict=True):
        plot_image_tasks(PlottedTasks(tasks, ink_is_bright=ink), torch.zeros(1, 1, 4, 2), 0, file)
    dark = [int((np.asarray(Image.open(file).convert("L")) < 8).sum()) for file in files]
    assert dark[1] > 10 * dark[0], "white is white, and ink is black"


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


def test_a_cache_that_cannot_be_written_names_the_setting_before_anything_is_decoded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PhotoReader, "read", lambda *_: pytest.fail("decoded in vain"))
    (root.parent / "file").touch()

    with pytest.raises(DataError, match=r"cache folder .*file/cache cannot be written .* data\.cache_dir"):
        folder(root, cache_dir=str(root.parent / "file" / "cache")).prepare_data()


def test_a_folder_that_cannot_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data_modules.reading.class_folders.os.scandir", refuse)

    with pytest.raises(DataError, match=re.escape(f"{root} cannot be read (Permission denied)")):
        ready(root)
