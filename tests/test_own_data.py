"""From a user's own files to a network adapted to further ones: train, adapt, keep, export, register."""

from __future__ import annotations

import copy
import csv
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import dmaml_pl
from dmaml_pl.__main__ import main
from tests.adapting import FEW, LETTERS_SEEN, SINES, train

COLOURS = {f"colour{number:02}": (20 * number, 255 - 20 * number, (90 * number) % 256) for number in range(12)}
NEW = {"black": (0, 0, 0), "gold": (250, 200, 0)}


def paint(folder: Path, colours: dict[str, tuple[int, int, int]], files: tuple[str, ...], seed: int = 0) -> Path:
    """Pictures of a colour each, with noise, of several sizes and formats."""
    generator = np.random.default_rng(seed)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for file in files:
            width, height = generator.integers(20, 40, 2)
            pixels = np.array(colour) + generator.normal(0, 5, (height, width, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / file)
    return folder


def write_lines(path: Path, header: list[str], lines: list[list[Any]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *lines])
    return path


def rows(file: str) -> list[dict[str, str]]:
    with Path(file).open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a training on a folder of pictures that is gone since."""
    folder = tmp_path_factory.mktemp("colours")
    root = paint(folder / "pictures", COLOURS, ("a.png", "b.jpg", "c.bmp", "d.gif"))
    config = copy.deepcopy(LETTERS_SEEN)
    settings = {"root": str(root), "ways": 2, "queries": 1, "image_size": 16, "cache_dir": str(folder / "cache")}
    config["data"] = {"class_path": "data_modules.ImageFolder", "init_args": FEW | settings}
    config["model"]["init_args"]["network"]["init_args"] = {
        "ways": "${data.init_args.ways}",
        "channels": "${data.init_args.channels}",
        "image_size": "${data.init_args.image_size}",
        "filters": 4,
    }
    checkpoint = train(folder, config, "--trainer.logger=false")
    shutil.rmtree(root)
    return checkpoint


@pytest.fixture(scope="module")
def sensors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a training on a table whose units are far from 0 and 1, registered in MLflow as `sensors`."""
    folder = tmp_path_factory.mktemp("sensors")
    generator = random.Random(0)  # noqa: S311 - nothing secret
    lines = []
    for sensor in range(20):
        slope = generator.uniform(-3, 3)
        for _ in range(12):
            celsius, humidity = generator.uniform(-20, 60), generator.uniform(0, 100)
            lines.append([f"s{sensor}", celsius, humidity, 5000 + 20 * slope * celsius + humidity])
    table = write_lines(folder / "table.csv", ["sensor", "celsius", "humidity", "pascal"], lines)
    config = copy.deepcopy(SINES)
    config["data"] = {
        "class_path": "data_modules.Tabular",
        "init_args": FEW
        | {
            "path": str(table),
            "task_column": "sensor",
            "inputs": ["celsius", "humidity"],
            "targets": ["pascal"],
            "shots": 5,
            "queries": 5,
        },
    }
    config["model"]["init_args"]["network"]["init_args"] = {"inputs": 2, "hidden": [8, 8]}
    checkpoint = train(folder, config, "--register=sensors")
    table.unlink()
    return checkpoint


# ---- pictures


def test_a_network_trained_on_a_folder_adapts_to_pictures_of_new_classes(colours: Path) -> None:
    support = paint(Path("support"), NEW, ("a.png", "b.tiff"), seed=1)
    query = paint(Path("query"), NEW, ("c.jpg", "d.webp"), seed=2)

    words = ["adapt", "--ckpt", colours, "--support", support, "--query", query, "--steps", "5"]
    assert main([*map(str, words)]) == 0

    found = rows("predictions.csv")
    assert [row["file"] for row in found] == ["black/c.jpg", "black/d.webp", "gold/c.jpg", "gold/d.webp"]
    assert all(row["prediction"] == row["class"] for row in found), "two colours are told apart after five steps"
    learner = dmaml_pl.load(colours)
    files = sorted(query.rglob("*.*"))
    x = torch.stack([learner.data.read_sample(file) for file in files])
    assert x.shape == (4, 3, 16, 16)
    sample = learner.data.read_sample(query / "gold" / "c.jpg")
    assert (sample.mean((1, 2)) * 255 - torch.tensor(NEW["gold"])).abs().max() < 5


def test_a_damaged_picture_is_named_when_adapting(colours: Path, capfd: pytest.CaptureFixture[str]) -> None:
    support = paint(Path("support"), NEW, ("a.png",))
    (support / "gold" / "a.png").write_bytes(b"no picture")

    assert main(["adapt", "--ckpt", str(colours), "--support", str(support), "--query", str(support)]) == 1

    assert capfd.readouterr().err.startswith("dmaml: error: support/gold/a.png is not a picture that can be read")


# ---- tables


SUPPORT = [[celsius, 50.0, 5000 + 40 * celsius + 50] for celsius in (-20.0, 0.0, 20.0, 40.0, 60.0)]


def test_a_network_trained_on_a_table_takes_and_gives_the_units_of_the_table(sensors: Path) -> None:
    learner = dmaml_pl.load(sensors)
    assert learner.scaling is not None
    assert learner.scaling.y_mean[0] == pytest.approx(5000, abs=1500)
    table = torch.tensor(SUPPORT)
    x, y = table[:, :2], table[:, 2:]

    with torch.no_grad():
        before = learner.scaling.values(learner.module.network(learner.scaling.inputs(x)))
    after = learner.adapt(x, y, steps=200).predict(x)

    assert (after - y).square().mean() < (before - y).square().mean() / 4
    assert (after.mean() - y.mean()).abs() < 300


def test_the_command_finds_columns_by_name_and_says_what_python_says(sensors: Path) -> None:
    support = write_lines(
        Path("support.csv"),
        ["pascal", "comment", "humidity", "celsius"],
        [[y, "x", humidity, celsius] for celsius, humidity, y in SUPPORT],
    )
    query = write_lines(Path("query.csv"), ["celsius", "humidity"], [[10, 40], [30, 60]])

    words = ["adapt", "--ckpt", sensors, "--support", support, "--query", query, "--save", "adapted.pt"]
    assert main([*map(str, words)]) == 0
    found = rows("predictions.csv")
    assert main(["adapt", "--ckpt", "adapted.pt", "--query", str(query), "--output", "again.csv"]) == 0

    table = torch.tensor(SUPPORT)
    adapted = dmaml_pl.load(sensors).adapt(table[:, :2], table[:, 2:])
    expected = adapted.predict([[10.0, 40.0], [30.0, 60.0]])
    assert [row["celsius"] for row in found] == ["10.0", "30.0"]
    predicted = [float(next(value for name, value in row.items() if "pascal" in name)) for row in found]
    assert predicted == pytest.approx(expected.squeeze(1).tolist(), rel=1e-5)
    assert rows("again.csv")
    again = dmaml_pl.load_adapted("adapted.pt").predict([[10.0, 40.0], [30.0, 60.0]])
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("header", [["celsius", "pascal"], ["celsius", "humidity", "humidity", "pascal"]])
def test_a_support_without_a_column_of_the_training_is_refused(
    header: list[str], sensors: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    support = write_lines(Path("support.csv"), header, [[1.0] * len(header)] * 3)

    assert main(["adapt", "--ckpt", str(sensors), "--support", str(support), "--query", str(support)]) == 1

    message = capfd.readouterr().err
    assert "must have humidity once: the network was trained on celsius, humidity to predict pascal." in message


def test_onnx_takes_and_gives_the_units_of_the_table(sensors: Path) -> None:
    table = torch.tensor(SUPPORT)
    adapted = dmaml_pl.load(sensors).adapt(table[:, :2], table[:, 2:])
    adapted.to_onnx("adapted.onnx")
    session = onnxruntime.InferenceSession("adapted.onnx", providers=["CPUExecutionProvider"])

    (found,) = session.run(["values"], {"x": table[:, :2].numpy()})

    torch.testing.assert_close(torch.from_numpy(found), adapted.predict(table[:, :2]))


def test_the_registered_model_takes_and_gives_the_units_of_the_table(
    sensors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.setattr(sys, "path", sys.path.copy())  # to which MLflow adds the model's own code
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{sensors.parents[1]}/mlruns/mlflow.db")
    model = mlflow.pyfunc.load_model("models:/sensors/1")
    table = torch.tensor(SUPPORT)
    request = {name: table[:, :2].numpy() for name in ("support_x", "query_x")} | {"support_y": table[:, 2:].numpy()}

    answer = model.predict(request)

    expected = dmaml_pl.load(sensors).adapt(table[:, :2], table[:, 2:]).predict(table[:, :2])
    assert np.allclose(answer, expected.numpy(), rtol=1e-5)
    assert 2000 < np.asarray(model.input_example["support_y"]).mean() < 8000
