"""A user's own pictures: every form they come in, and the pixels that are kept of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_modules import images
from data_modules.reading import cache
from data_modules.reading.pictures import PhotoReader
from dmaml_pl.errors import DataError
from dmaml_pl.tasks import SampleReader, check_tasks
from tests.picture_folders import CLASSES, FORMATS, colour_of, folder, make_pictures, paint, ready


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_pictures(tmp_path)


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


def test_a_cache_that_cannot_be_written_names_the_setting_before_anything_is_decoded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PhotoReader, "read", lambda *_: pytest.fail("decoded in vain"))
    (root.parent / "file").touch()

    with pytest.raises(DataError, match=r"cache folder .*file/cache cannot be written .* data\.cache_dir"):
        folder(root, cache_dir=str(root.parent / "file" / "cache")).prepare_data()
