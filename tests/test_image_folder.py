"""A user's own pictures: every way to split them, the tasks made of them, and where these go."""

from __future__ import annotations

import csv
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from data_modules import Glyphs
from data_modules.samplers import SamplerName
from dmaml_pl.data import PlottedTasks
from dmaml_pl.errors import ConfigError
from dmaml_pl.evaluation.figures import plot_image_tasks
from dmaml_pl.evaluation.predictions import PredictionWriter
from tests.picture_folders import CLASSES, colour_of, folder, make_classes, make_pictures, names, paint, ready
from tests.recipes import small_maml, small_trainer


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_pictures(tmp_path)


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


@pytest.mark.parametrize("called", [("Train", "Val", "Test"), ("training", "VALIDATION", "testing")])
def test_the_folders_of_the_splits_are_found_whatever_their_case(called: tuple[str, ...], tmp_path: Path) -> None:
    listed = [f"{split}/{number}{name}" for number, split in enumerate(called) for name in ("cat", "dog")]

    assert names(folder(make_classes(tmp_path / "pictures", listed))) == {
        "train": ["0cat", "0dog"],
        "val": ["1cat", "1dog"],
        "test": ["2cat", "2dog"],
    }


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


# ---- predictions and plots


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
