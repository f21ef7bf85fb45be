"""The configurations in configs/paper: what the papers' code sets, and that each trains and is meta-tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dmaml_pl.cli import configs
from dmaml_pl.cli.run import run
from tests.trainings import flags

SMALL = {
    "data.meta_batch": 2,
    "data.val_tasks": 2,
    "data.test_tasks": 2,
    "trainer.strategy.run_length": 1,
    "trainer.val_check_interval": 1,
    "trainer.max_steps": 1,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "trainer.logger": "false",
    "model.compile": "false",
    "report.baseline_budget": 0,
    "report.tasks": 1,
}
LETTERS = SMALL | {
    "data.train_classes": 7,
    "data.val_classes": 5,
    "data.rotations": "false",
    "model.network.filters": 4,
}
UNTESTED = {"meta_test": "false"}
PHOTOS = SMALL | {"data.queries": 2, "model.network.filters": 4}


@pytest.fixture(autouse=True)
def _lightnings_call_is_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def settings(capsys: pytest.CaptureFixture[str], *names: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of data, model and trainer, of configurations laid over each other."""
    words = [word for name in names for word in ("--config", str(configs.folder() / f"{name}.yaml"))]
    with pytest.raises(SystemExit) as stop:
        run(["fit", *words, "--print_config"])
    assert stop.value.code == 0
    whole = yaml.safe_load(capsys.readouterr().out)
    return whole["data"]["init_args"], whole["model"]["init_args"], whole["trainer"]


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seventeen made-up characters of twenty drawings, where Omniglot would be."""
    root = tmp_path_factory.mktemp("omniglot")
    generator = np.random.default_rng(0)
    for number in range(17):
        part = "images_background" if number < 12 else "images_evaluation"
        for drawing in range(20):
            pixels = generator.random((105, 105)) > 0.1
            pixels[5 * number : 5 * number + 15] = False
            save(root / part / "Magic" / f"character{number:02}" / f"{number:04}_{drawing:02}.png", pixels)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes a split, as Ravi and Larochelle's lists say, in the folders of another split."""
    root = tmp_path_factory.mktemp("mini")
    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        rows = ["filename,label"]
        for label in (f"{split}{number}" for number in range(5)):
            for picture in range(4):
                name = f"{label}_{picture}.png"
                folder = root / ("val" if picture == 3 else "train") / label
                save(folder / name, generator.integers(256, size=(84, 84, 3), dtype=np.uint8))
                rows.append(f"{name},{label}")
        (root / f"{split}.csv").write_text("\n".join(rows))
    return root


def trained(names: list[str], small: dict[str, Any], root: Path | None, folder: Path) -> Path:
    """The folder of a training of one meta-iteration."""
    words = [word for name in names for word in ("--config", name)]
    where = {} if root is None else {"data.root": root, "data.cache_dir": root.parent / f"cache of {root.name}"}
    given = small | where | {"checkpoint.dirpath": folder}
    assert run(configs.with_files(["fit", *words, *flags(given)])) == 0
    assert (folder / "last.ckpt").is_file()
    return folder


def meta_tested(folder: Path) -> int:
    """Tasks of the report."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return int(report["tasks"])


def test_omniglot_has_the_settings_of_the_maml_papers_code(capsys: pytest.CaptureFixture[str]) -> None:
    data, model, trainer = settings(capsys, "paper/omniglot")
    assert (data["ways"], data["shots"], data["queries"], data["meta_batch"]) == (5, 1, 1, 32)
    inner = model["algorithm"]["init_args"]
    assert (inner["inner_lr"], inner["inner_steps"]) == (5 * 0.4, 1)  # their loss is summed over the ways
    assert (model["meta_optimizer"]["init_args"]["lr"], trainer["max_steps"]) == (0.001, 60000)


def test_mini_imagenet_is_tested_with_as_many_queries_as_shots_and_trained_with_fifteen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, model, trainer = settings(capsys, "mini_imagenet", "paper/mini_imagenet")
    assert (data["ways"], data["shots"], data["meta_batch"]) == (5, 1, 4)
    assert (data["queries"], data["test_queries"]) == (15, 1)
    inner, network = model["algorithm"]["init_args"], model["network"]["init_args"]
    assert (inner["inner_lr"], inner["inner_steps"], model["evaluation_steps"]) == (5 * 0.01, 5, 10)
    assert (network["filters"], network["pooling"], network["normalization"]) == (32, "max", "batch_shift")
    assert (model["gradient_clip"], trainer["max_steps"]) == (10, 60000)


def test_reptile_has_the_settings_of_its_papers_command(capsys: pytest.CaptureFixture[str]) -> None:
    data, model, trainer = settings(capsys, "paper/omniglot", "paper/omniglot_reptile")
    assert (data["shots"] + data["queries"], data["test_queries"], data["meta_batch"]) == (15, 1, 10)
    inner = model["algorithm"]["init_args"]
    assert (inner["inner_lr"], inner["inner_batch"], inner["inner_steps"]) == (0.001, 25, 3)
    assert (model["evaluation_steps"], trainer["max_steps"]) == (5, 100000)
    assert model["meta_schedule"]["init_args"]["total_iters"] == 100000


def test_omniglot_trains_and_is_meta_tested(letters: Path, tmp_path: Path) -> None:
    assert meta_tested(trained(["paper/omniglot"], LETTERS, letters, tmp_path / "kept")) == 2


@pytest.mark.parametrize(
    ("overlay", "further"),
    [
        ("omniglot_maml_plus_plus", {}),
        ("omniglot_protonet", {"data.ways": 7}),
        ("omniglot_reptile", {}),
        ("anil", {}),
    ],
)
def test_each_overlay_of_omniglot_trains(overlay: str, further: dict[str, Any], letters: Path, tmp_path: Path) -> None:
    trained(["paper/omniglot", f"paper/{overlay}"], LETTERS | UNTESTED | further, letters, tmp_path / "kept")


def test_mini_imagenet_trains_and_is_meta_tested_and_anil_on_it_trains(photos: Path, tmp_path: Path) -> None:
    names = ["mini_imagenet", "paper/mini_imagenet"]
    assert meta_tested(trained(names, PHOTOS, photos, tmp_path / "kept")) == 2
    trained([*names, "paper/anil"], PHOTOS | UNTESTED, photos, tmp_path / "anil")


def test_sinusoid_trains_and_is_meta_tested_and_cavia_on_it_trains(tmp_path: Path) -> None:
    assert meta_tested(trained(["paper/sinusoid"], SMALL, None, tmp_path / "kept")) == 2
    trained(["paper/sinusoid", "paper/sinusoid_cavia"], SMALL | UNTESTED, None, tmp_path / "cavia")
