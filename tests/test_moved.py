"""The folder of a tracking store may be moved and copied: what is tracked and opened there is the one there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dmaml_pl import MLflowTracker
from dmaml_pl.tracking.mlflow_run import MLflowRun
from dmaml_pl.tracking.store import Store
from tests.trainings import lay_store


def track(folder: Path, text: str) -> str:
    """Keep a file with a new MLflow run in the store of a folder; returns the run's id."""
    tracker = MLflowTracker("letters", save_dir=str(folder), system_metrics=False)
    tracker.open()
    tracker.log_text(text, "note.txt")
    tracker.finalize("success")
    assert tracker.version is not None
    return tracker.version


def files(folder: Path) -> int:
    return len(list(folder.rglob("note.txt")))


@pytest.mark.parametrize("copied", [False, True])
def test_a_store_is_gone_on_with_where_its_folder_is_now(
    copied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "mlruns", tmp_path / "elsewhere" / "mlruns"
    lay_store(tmp_path)
    first = track(old, "first")
    new.parent.mkdir()
    shutil.copytree(old, new) if copied else old.rename(new)
    second = track(new, "second")

    assert f"The tracking store was in {old}: its files are now looked for in {new}.\n" in capsys.readouterr().err
    assert files(new) == 2
    assert files(old) == copied
    client = Store.find(None, str(new)).connect()
    for run, text in ((first, "first"), (second, "second")):
        assert Path(client.download_artifacts(run, "note.txt", str(tmp_path))).read_text() == text
        assert client.get_run(run).info.artifact_uri.startswith(f"{new}/artifacts/")
    assert "was in" not in capsys.readouterr().err, "once"
    if copied:
        beside = MLflowRun.resume(Store.find(None, str(old)), first, visits=True)
        assert beside.client.get_run(first).info.artifact_uri.startswith(f"{old}/artifacts/")


def test_another_name_of_the_same_folder_is_no_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay_store(tmp_path)
    track(tmp_path / "mlruns", "first")
    (tmp_path / "link").symlink_to(tmp_path / "mlruns")
    track(tmp_path / "link", "second")

    assert "was in" not in capsys.readouterr().err
