"""`dmaml compare`: differing settings beside the figures, from a real store, and the curves in one picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from dmaml_pl.__main__ import main
from dmaml_pl.tracking.store import Store
from tests.trainings import lay_store

COMMON = {"model.inner_lr": "0.01", "checkpoint.dirpath": "somewhere"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three trainings, two of which share a name."""
    folder = tmp_path_factory.mktemp("store")
    lay_store(folder)
    client = Store.find(None, str(folder / "mlruns")).connect()
    experiment = client.create_experiment("sinusoid", artifact_location=str(folder / "artifacts"))
    for name, settings, error in (
        ("fast", {"trainer.devices": "4", "trainer.logger.run_name": "fast"}, 0.5),
        ("slow", {"trainer.devices": "1", "model.first_order": "true"}, 0.75),
        ("slow", {"trainer.devices": "2"}, 0.625),
    ):
        run = client.create_run(experiment, run_name=name, tags={"dmaml.engine": "vectorized"}).info.run_id
        for setting, value in {**COMMON, **settings}.items():
            client.log_param(run, setting, value)
        for number in (1, 2, 3):
            figures: dict[str, float] = {"train/run": number, "train/tasks_seen": 40 * number, "train/run_seconds": 0.5}
            figures |= {"val/loss": 2 * error / number, "val/mse": 2 * error / number, "val/mse_step_1": 7.0}
            for metric, figure in figures.items():
                client.log_metric(run, metric, figure, step=10 * number)
        client.log_metric(run, "test/mse", error, step=30)
        if name == "fast":
            client.set_tag(run, "dmaml.changed_params", '{"trainer.max_steps": "99"}')
        client.set_terminated(run)
    return folder


@pytest.fixture
def compare(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        code = main(["compare", *words, "--save_dir", str(folder / "mlruns")])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def ids(folder: Path, name: str) -> list[str]:
    client = MlflowClient(f"sqlite:///{folder}/mlruns/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "sinusoid"]
    return [run.info.run_id for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == name]


def rows(printed: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}


def test_differing_settings_stand_beside_the_figures_and_common_ones_do_not(
    compare: Callable[..., tuple[int, str, str]], folder: Path
) -> None:
    one, other = ids(folder, "slow")
    code, printed, error = compare("fast", one[:8], other)
    assert (code, error) == (0, "")
    found = rows(printed)
    assert found[""] == ["fast", f"slow ({one[:8]})", f"slow ({other[:8]})"]
    assert found["status"] == ["FINISHED"] * 3
    assert found["tasks seen"] == ["120"] * 3
    assert found["engine"] == ["vectorized"] * 3
    by_run = dict(zip(["fast", one, other], zip(found["trainer.devices"], found["test/mse"], strict=True), strict=True))
    assert by_run["fast"] == ("4", "0.5")
    assert {by_run[one], by_run[other]} == {("1", "0.75"), ("2", "0.625")}
    assert found["trainer.max_steps"] == ["99", "-", "-"], "what a resumed training went on with"
    assert sorted(found["model.first_order"]) == ["-", "-", "true"]
    assert not {"model.inner_lr", "checkpoint.dirpath", "trainer.logger.run_name", "val/mse_step_1"} & found.keys()
    assert "Curves of val/mse: comparison.png" in printed
    with Image.open("comparison.png") as figure:
        assert figure.size[0] > 1000


def test_curves_are_over_what_is_asked_for_alone(compare: Callable[..., tuple[int, str, str]]) -> None:
    widths = []
    for over in (["seconds"], ["runs", "seconds"]):
        code, _, error = compare("fast", "--over", *over)
        assert (code, error) == (0, "")
        with Image.open("comparison.png") as figure:
            widths.append(figure.size[0])
    assert abs(widths[1] - 2 * widths[0]) <= 2, "as wide, to a pixel each"


def test_one_training_is_shown_with_all_of_its_settings(compare: Callable[..., tuple[int, str, str]]) -> None:
    code, printed, _ = compare("fast", "--metric", "val/loss", "--output", "one.png")
    assert code == 0
    assert rows(printed)["model.inner_lr"] == ["0.01"]
    assert "Curves of val/loss: one.png" in printed
    assert Path("one.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["nobody"],
            "There is no MLflow run 'nobody' in this store: give a name, or the beginning of an id.",
        ),
        (["slow"], "'slow' could be 2 MLflow runs: give the beginning of an id"),
        (["fast", "fast"], "'fast' is given twice"),
        (
            ["fast", "--metric", "val/none"],
            "--metric is val/none, which not all of these trainings have:",
        ),
        (["fast", "--output", "x.pdf"], "--output is x.pdf, but must be a .png file"),
        (["fast", "--output", "no/x.png"], "--output is no/x.png, but there is no folder no"),
        ([], "Not set: RUN. dmaml compare --help lists all"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, compare: Callable[..., tuple[int, str, str]]) -> None:
    code, printed, error = compare(*words)
    assert (code, printed.startswith("|")) == (1, "--metric" in words)
    assert error.startswith(f"dmaml: error: {message}")
    assert error.count("\n") == 1


def test_a_folder_without_a_store_is_told_and_left_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "x", "--save_dir", str(tmp_path / "none")]) == 1
    assert "There is no tracking store in" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
