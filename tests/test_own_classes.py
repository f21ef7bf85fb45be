"""docs/own.md, followed from another folder: data, network, objectives and algorithm of a user's own."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from tests.trainings import dmaml, flags

SHORT = {
    "data.val_tasks": 4,
    "data.test_tasks": 4,
    "trainer.strategy.run_length": 4,
    "trainer.max_steps": 8,
    "meta_test": "false",
}


@pytest.fixture(scope="module")
def folder(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as a reader of the page would save them."""
    page, folder = (repository / "docs/own.md").read_text(), tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text("\n\n".join(re.findall(r"```py\n(.*?)```", page, re.DOTALL)))
    (folder / "mine.yaml").write_text("\n".join(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)))
    return folder


def lines(repository: Path) -> list[str]:
    page = (repository / "docs/own.md").read_text()
    blocks = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def test_every_command_of_the_page_works_with_the_pages_own_classes(repository: Path, folder: Path) -> None:
    (points,) = (line for line in lines(repository) if line.startswith("printf"))
    first, second, adapt = (shlex.split(line)[1:] for line in lines(repository) if line.startswith("dmaml"))
    trained = dmaml(folder, *first, *flags(SHORT))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    last = next(folder.rglob("last.ckpt"))
    assert "learner.algorithm.pull" in torch.load(last, weights_only=True)["state_dict"]
    subprocess.run(points, shell=True, cwd=folder, check=True)  # noqa: S602 - of our own page
    adapted = dmaml(folder, *[str(last) if word.startswith("PATH") else word for word in adapt])
    assert adapted.returncode == 0, adapted.stdout + adapted.stderr
    assert (folder / "predictions.csv").is_file()
    labelled = dmaml(folder, *second, *flags(SHORT))
    assert labelled.returncode == 0, labelled.stdout + labelled.stderr


def test_they_are_found_beside_the_configuration_from_any_folder(
    repository: Path, folder: Path, tmp_path: Path
) -> None:
    config, settings = str(folder / "mine.yaml"), flags(SHORT | {"trainer.val_check_interval": 1})
    for words in (
        ["fit", "--config", config, "--trainer.devices=2", *settings],
        ["study", "workers", f"--config={config}", "--workers", "2", "--seeds", "1", *settings[:-2]],
    ):
        ended = dmaml(tmp_path, *words)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    (tmp_path / "points.csv").write_text("x,y\n" + "\n".join(f"{x / 5},{x / 10}" for x in range(-5, 6)))
    asked = ["--ckpt", str(next(tmp_path.rglob("last.ckpt"))), "--support=points.csv", "--query=points.csv"]
    adapted = dmaml(tmp_path, "adapt", *asked, "--trust", str(folder / "mine.py"))
    assert adapted.returncode == 0, adapted.stdout + adapted.stderr
    refused = dmaml(tmp_path, "adapt", *asked, "--trust", "nowhere.py")
    assert refused.stderr.endswith("dmaml: error: --trust is nowhere.py, but there is no such file.\n")


def test_the_objective_of_weighted_classes_goes_with_letters(repository: Path, folder: Path) -> None:
    settings = SHORT | {"model.objective": "mine.Weighted", "model.network.filters": 4, "trainer.devices": 1}
    settings["meta_test"] = "true"
    ended = dmaml(folder, "fit", "--config", str(repository / "configs/glyphs.yaml"), *flags(settings))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "No baseline to compare with: Weighted has no loss for 164 classes at once (RuntimeError in " in ended.stdout
    assert ": weight tensor" in ended.stdout
