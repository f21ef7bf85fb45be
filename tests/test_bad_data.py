"""Data that cannot be used, or does not fit the network and the objective, is one line, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bad_input import (  # noqa: F401 - two are fixtures
    DATA,
    GLYPHS,
    MODEL,
    OMNIGLOT,
    SINUSOID,
    Refusal,
    as_the_user_left_it,
    changed,
    make_refusal,
)
from tests.test_omniglot import make_folders


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ways": 47}, "data.ways is 47, but the val split of Glyphs has 46 classes: choose 2 to 46."),
        ({"ways": 1}, "data.ways is 1, but a task needs at least 2 classes to tell apart."),
        (
            {"shots": 20},
            "data.shots + data.queries is 20 + 5, but a class of Glyphs has 24 samples: choose them to be ",
        ),
    ],
)
def test_tasks_that_the_data_cannot_give_are_refused(settings: dict[str, int], expected: str, refusal: Refusal) -> None:
    config = changed(GLYPHS, {f"{DATA}.{name}": value for name, value in settings.items()})
    assert refusal(config=config).startswith(expected)


def test_a_data_folder_that_is_missing_is_named_with_what_is_expected_in_it(refusal: Refusal) -> None:
    text = refusal(config=OMNIGLOT)
    assert text.startswith("data.root (omniglot) does not hold Omniglot: images_background and images_evaluation are ")


def test_a_data_folder_without_pictures_is_named(refusal: Refusal) -> None:
    for part in ("images_background", "images_evaluation"):
        Path("omniglot", part).mkdir(parents=True)
    assert refusal(config=OMNIGLOT).startswith("omniglot/images_background holds no pictures: ")


def test_a_picture_that_is_corrupt_is_named(refusal: Refusal) -> None:
    make_folders(Path("omniglot"))
    picture = sorted(Path("omniglot").rglob("*.png"))[7]
    picture.write_bytes(picture.read_bytes()[:60])
    assert refusal(config=changed(OMNIGLOT, {f"{DATA}.cache_dir": "cache"})).startswith(
        f"{picture} is not a picture that can be read"
    )


@pytest.mark.parametrize(("command", "split"), [("fit", "val"), ("fit", "test"), ("validate", "val")])
def test_fewer_tasks_than_workers_are_refused_before_workers_are_started(
    command: str, split: str, refusal: Refusal
) -> None:
    config = changed(SINUSOID, {f"{DATA}.{split}_tasks": 1, "trainer.devices": 2, "meta_test": True})
    assert refusal(command, config=config).startswith(f"data.{split}_tasks is 1, but there are 2 workers to share the ")


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        (
            GLYPHS,
            {f"{MODEL}.network": {"class_path": "dmaml_pl.networks.MLP"}},
            "model.network cannot take samples of shape (1, 28, 28) ",
        ),
        (
            GLYPHS,
            {f"{DATA}.ways": 10},
            "The network's output has shape (10, 5), but the tasks have 10 ways: set the network's ways",
        ),
        (
            GLYPHS,
            {f"{MODEL}.objective": "regression"},
            "The network's output has shape (5, 5), but the targets (5,): set the network's number of outputs",
        ),
        (
            SINUSOID,
            {f"{MODEL}.objective": "classification"},
            "model.objective is classification, but the data has targets of type torch.float32, of shape (10, 1)",
        ),
        (
            SINUSOID,
            {f"{MODEL}.network.init_args.outputs": 2},
            "The network's output has shape (10, 2), but the targets (10, 1): set the network's number of outputs",
        ),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_refused(
    config: dict[str, Any], settings: dict[str, Any], expected: str, refusal: Refusal
) -> None:
    assert refusal(config=changed(config, settings)).startswith(expected)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("ImageFolder", {}, "Not set: data.root, which data_modules.ImageFolder needs."),
        ("ImageFolder", {"root": "none"}, "data.root is none, but there is no such folder: root/CLASS/PICTURE"),
        (
            "ImageFolder",
            {"root": ".", "image_size": 10**6},
            "data.image_size is 1000000, but must be at most 10,000.",
        ),
        ("ImageFolder", {"root": ".", "channels": 2}, "data.channels is '2', but must be one of 1, 3."),
        ("ImageFolder", {"root": ".", "fit": "cut"}, "data.fit is 'cut', but must be one of 'crop', 'pad', 'stretch'."),
        ("MiniImageNet", {"root": "none"}, "data.root (none) does not hold mini-ImageNet: expected are "),
        ("Tabular", {"path": "a.csv"}, "Not set: data."),
        (
            "Tabular",
            {"path": "none.csv", "task_column": "t", "inputs": ["x"], "targets": ["y"]},
            "data.path is none.csv, but there is no such file: a CSV or Parquet file is expected.",
        ),
    ],
)
def test_own_data_that_cannot_be_used_is_told_before_anything_is_trained(
    name: str, settings: dict[str, Any], expected: str, refusal: Refusal
) -> None:
    data = {"class_path": f"data_modules.{name}", "init_args": settings}
    assert refusal(config=GLYPHS | {"data": data}).startswith(expected)
