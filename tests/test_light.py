"""What needs no PyTorch is told before it is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dmaml_pl.__main__ import main

WITHOUT = """
import sys
class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "pytorch_lightning", "mlflow", "pandas"):
            raise AssertionError(f"{name} was loaded")
sys.meta_path.insert(0, Refusing())
from dmaml_pl.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["fit", "--config", "nope.yaml"], "--config is nope.yaml, but there is no such file."),
        (["test", "--config", "sinusoid", "--ckpt_path", "nope.ckpt"], "--ckpt_path is nope.ckpt, but there is no su"),
        (["adapt", "--ckpt", "nope.ckpt", "--support", ".", "--query", "."], "--ckpt is nope.ckpt, but there is no"),
        (["study", "workers", "--config", "nope.yaml"], "--config is nope.yaml, but there is no such file."),
        (
            ["fit", "--config", "image_folder", "--data.root=none"],
            "data.root is none, but there is no such folder",
        ),
        (
            ["fit", "--data", "Tabular", "--data.path", "none.csv"],
            "data.path is none.csv, but there is no such file",
        ),
        (
            ["study", "workers", "--config", "tabular"],
            "data.path is data/table.csv, but there is no such file",
        ),
        (["export", "nope.ckpt", "folder"], "nope.ckpt is not there: give the checkpoint of a training, such as best."),
        (["fits"], "fits is not a command. Did you mean fit?"),
        (["fit", "more"], "more is not a setting: those are given as --NAME VALUE"),
    ],
)
def test_a_mistake_in_a_name_is_told_without_loading_pytorch(words: list[str], line: str) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"dmaml: error: {line}"), done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["test", "--config", "sinusoid", "--ckpt_path", "kept/best.ckpt"],
        ["adapt", "--ckpt", "kept/best.ckpt", "--support", ".", "--query", "."],
        ["export", "kept/best.ckpt", "folder"],
    ],
)
def test_where_there_was_no_validation_last_is_told_in_place_of_best(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "last.ckpt").touch()
    assert main(words) == 1
    assert "give kept/last.ckpt, which a training without validation leaves alone." in capsys.readouterr().err
