"""The embedded letters; what all image data sets promise of their tasks is in test_image_tasks.py."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageFilter

from data_modules import Glyphs, glyphs
from data_modules.reading import cache
from dmaml_pl.data import Split
from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.tasks import TaskBatch, check_tasks

SPLITS: list[Split] = ["train", "val", "test"]


def same(a: TaskBatch, b: TaskBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Glyphs:
    data = Glyphs(cache_dir=str(tmp_path_factory.mktemp("glyphs")), meta_batch=2, val_tasks=5)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture
def few_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six letters, so that rendering takes no time."""
    monkeypatch.setattr(glyphs, "LETTERS", {"train": "Ag", "val": "bk", "test": "mR"})


# ---- the letters


def test_the_splits_have_the_classes_and_samples_that_the_docstring_says(letters: Glyphs) -> None:
    splits = letters.load_splits()

    assert {split: tuple(images.shape) for split, images in splits.items()} == {
        "train": (164, 24, 1, 28, 28),
        "val": (46, 24, 1, 28, 28),
        "test": (88, 24, 1, 28, 28),
    }
    for split, images in splits.items():
        assert str(len(images)) in str(Glyphs.__doc__), split
        assert images.dtype == torch.uint8


def test_every_face_has_every_letter() -> None:
    folder = Path(glyphs.load_fonts()[0].path).parent  # type: ignore[arg-type]
    for face in glyphs.FACES:
        known = set(FT2Font(str(folder / face)).get_charmap())
        assert not [letter for letter in chain(*glyphs.LETTERS.values()) if ord(letter) not in known], face


def test_no_two_letters_look_alike_within_a_split_or_across_splits() -> None:
    everything = list(chain(*glyphs.LETTERS.values()))
    assert len(everything) == len(set(everything))
    blur = ImageFilter.GaussianBlur(1.5)
    for font in glyphs.load_fonts():
        pictures = [Image.fromarray(glyphs.render(letter, font)).filter(blur) for letter in everything]
        alike = np.corrcoef(np.array([np.asarray(picture, dtype=float).ravel() for picture in pictures]))
        np.fill_diagonal(alike, 0)
        first, second = np.unravel_index(alike.argmax(), alike.shape)
        # The rule is 0.97; another version of FreeType may draw a little differently.
        assert alike.max() < 0.98, (font.getname(), everything[first], everything[second])


def test_letters_are_white_on_black_and_stay_inside_the_picture(letters: Glyphs) -> None:
    for images in letters.load_splits().values():
        border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], dim=-1)
        assert border.max() == 0
        assert images.flatten(2).amax(-1).min() > 200
        assert 0.1 < images.float().mean() / 255 < 0.25


def test_no_two_samples_are_equal(letters: Glyphs) -> None:
    images = torch.cat([images.flatten(0, 1) for images in letters.load_splits().values()]).flatten(1)

    assert len(images.unique(dim=0)) == len(images)


def test_a_class_is_known_from_its_nearest_sample_better_than_by_chance(letters: Glyphs) -> None:
    data = Glyphs(cache_dir=letters.cache_dir, ways=5, shots=5)
    data.setup()
    right = []
    for index in range(20):
        task = data.evaluation_task("test", index)
        nearest = torch.cdist(task.query_x.flatten(1), task.support_x.flatten(1)).argmin(1)
        right.append((task.support_y[nearest] == task.query_y).float().mean())

    assert 0.5 < torch.stack(right).mean() < 0.99  # neither hopeless nor solved without learning


# ---- the tasks


def test_a_task_has_the_shapes_types_and_range_its_settings_say(letters: Glyphs) -> None:
    batch = letters.sample(worker=0, run=0, iteration=0)

    check_tasks(batch)
    assert batch.support_x.shape == (2, 5, 1, 28, 28)
    assert batch.query_x.shape == (2, 75, 1, 28, 28)
    assert batch.support_x.dtype == torch.float32
    assert batch.support_y.dtype == torch.int64
    assert batch.query_x.min() == 0
    assert 0.9 < batch.query_x.max() <= 1
    assert batch.support_y.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch.query_y[0].tolist() == [label for label in range(5) for _ in range(15)]


def test_plots_show_the_first_meta_test_tasks(letters: Glyphs) -> None:
    figure = letters.tasks_to_plot(3).tasks

    check_tasks(figure)
    assert figure.numbers is not None
    assert figure.numbers.tolist() == [0, 1, 2]
    assert all(same(figure.task(index), letters.evaluation_task("test", index)) for index in range(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 1}, r"data\.ways is 1, .* at least 2"),
        ({"ways": 60}, r"data\.ways is 60, but the val split of Glyphs has 46 classes: choose 2 to 46\."),
        ({"ways": 500}, r"data\.ways is 500, but the val split of Glyphs has 46 classes: choose 2 to 46\."),
        ({"sampler": "fast"}, r"data\.sampler is 'fast', but must be one of batched, learn2learn\."),
        ({"shots": 10}, r"data\.shots \+ data\.queries is 10 \+ 15, but .* 24 samples: .* at most 24"),
    ],
)
def test_settings_that_the_letters_cannot_serve_are_refused_before_training(
    letters: Glyphs, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Glyphs(cache_dir=letters.cache_dir, **settings).setup("fit")


# ---- the cache


def test_letters_are_rendered_once(few_letters: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Glyphs(cache_dir=str(tmp_path)).prepare_data()
    monkeypatch.setattr(glyphs, "_render_all", lambda: pytest.fail("rendered again"))

    Glyphs(cache_dir=str(tmp_path), ways=2).setup("fit")

    assert len(list(tmp_path.glob("*.pixels"))) == 1


def test_other_rendering_settings_use_another_file(
    few_letters: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Glyphs(cache_dir=str(tmp_path)).prepare_data()
    monkeypatch.setattr(glyphs, "LETTER", 18)
    Glyphs(cache_dir=str(tmp_path)).prepare_data()

    assert len(list(tmp_path.glob("*.pixels"))) == 2


def test_rendering_is_the_same_every_time(few_letters: None) -> None:
    for (*names, image), (*again, other) in zip(glyphs._render_all(), glyphs._render_all(), strict=True):
        assert names == again
        assert np.array_equal(image, other)


@pytest.mark.parametrize("damage", ["empty", "cut off", "a byte changed", "another size"])
def test_a_damaged_cache_file_is_rendered_anew(few_letters: None, tmp_path: Path, damage: str) -> None:
    whole = {split: images.clone() for split, images in Glyphs(cache_dir=str(tmp_path)).load_splits().items()}
    (file,) = tmp_path.glob("*.pixels")
    content = file.read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    file.write_bytes({"empty": b"", "cut off": content[:middle], "a byte changed": changed}.get(damage, b"no" * 99))

    again = Glyphs(cache_dir=str(tmp_path)).load_splits()

    assert all(torch.equal(whole[split], again[split]) for split in SPLITS)
    assert file.read_bytes() == content


def test_a_cache_folder_that_cannot_be_written_is_named(few_letters: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(DataError, match=r"file/cache cannot be written .*: set data\.cache_dir"):
        Glyphs(cache_dir=str(tmp_path / "file" / "cache")).prepare_data()


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)

    with pytest.raises(DataError, match="No space left on device"):
        cache.load_or_make(tmp_path / "x", (1, 1, 3), lambda: iter([("a", "b", np.zeros((1, 1, 3), np.uint8))]), "x")
    assert [file.name for file in tmp_path.iterdir()] == [".x.lock"]


def test_of_several_that_want_the_same_images_one_makes_them(tmp_path: Path) -> None:
    made = []

    def make() -> Iterator[cache.Sample]:
        made.append(1)
        yield from (("all", f"class{number}", np.full((1, 10, 10), 7, np.uint8)) for number in range(100))

    def load(_: int) -> int:
        return int(cache.load_or_make(tmp_path / "x", (1, 10, 10), make, "x")["all"].pixels.sum())

    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(load, range(64)))

    assert set(sums) == {7 * 100 * 100}
    assert len(made) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == [".x.lock", "x.json", "x.pixels"]


def test_the_cache_folder_follows_the_xdg_custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder(None) == tmp_path / "xdg" / "dmaml_pl"
    assert cache.cache_folder(str(tmp_path)) == tmp_path

    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache.cache_folder(None) == tmp_path / ".cache" / "dmaml_pl"
