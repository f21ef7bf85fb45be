"""What `dmaml study` promises, with real trainings and a real MLflow store."""

from __future__ import annotations

import io
import math
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from mlflow.entities import Run

from dmaml_pl.__main__ import main
from tests.studied import Studied, study, words_of
from tests.trainings import lay_store

# -- workers -------------------------------------------------------------------------------------------------------


@dataclass
class Grown(Studied):
    """A study that was made with one seed and a target, and then by the same command with two seeds and none."""

    first_table: list[dict[str, str]]
    first_runs: set[str]
    then_said: str


OWN_RATE = "0.02"


@pytest.fixture(scope="module")
def workers(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Grown:
    folder = tmp_path_factory.mktemp("workers")
    lay_store(folder)
    own = folder / "own.yaml"
    settings = f"{{model.meta_optimizer.init_args.lr: {OWN_RATE}, trainer.max_steps: 4}}"
    own.write_text(f"2: {settings}\n8: {settings}")  # of 8 workers nobody asks
    words = words_of(repository, folder, "workers", "--workers", "1", "2", "--own", str(own))
    first = Studied(folder, "workers", words, main([*words, "--seeds", "1", "--target", "1000"]), "")
    assert first.code == 0
    table, runs = first.table(), {run.info.run_id for run in first.children}
    with redirect_stdout(io.StringIO()) as said:
        code = main([*words, "--seeds", "2", "--jobs", "2"])
    return Grown(folder, "workers", words, code, "", table, runs, said.getvalue())


def test_a_study_of_workers_nests_its_trainings_in_one_mlflow_run(workers: Grown) -> None:
    assert workers.code == 0
    assert workers.parent.info.status == "FINISHED"
    assert workers.parent.data.params["study.workers"] == "1 2"
    made = sorted((run.data.params["trainer.devices"], run.data.params["seed_everything"]) for run in workers.children)
    assert made == [("1", "0"), ("1", "1"), ("2", "0"), ("2", "1")]
    for run in workers.children:
        assert run.info.status == "FINISHED"
        assert run.data.tags["dmaml.study.seed"] == run.data.params["seed_everything"]
        assert run.data.tags["dmaml.study.point"].startswith(run.data.params["trainer.devices"])
        runs = 4 if run.data.params["trainer.devices"] == "1" else 2
        assert len(workers.history(run, "val/loss")) == runs  # a validation after every run
        assert "test/loss" not in run.data.metrics


def test_the_table_of_workers_says_what_the_store_says(workers: Grown) -> None:
    assert [row["workers"] for row in workers.table()] == ["1", "2"]
    for row in workers.table():
        runs = [run for run in workers.children if run.data.params["trainer.devices"] == row["workers"]]
        finals = np.array([workers.history(run, "val/loss")[-1] for run in runs])
        assert float(row["final val/loss"]) == pytest.approx(finals.mean())
        assert float(row["sd"]) == pytest.approx(finals.std(ddof=1))
        assert float(row["best val/loss"]) == min(min(workers.history(run, "val/loss")) for run in runs)
        steps = 8 if row["workers"] == "1" else 4
        assert float(row["tasks_seen"]) == steps * 2 * int(row["workers"])
        assert float(row["runs"]) == steps / 2
        walls = [sum(workers.history(run, "train/run_seconds")) + merges(workers, run) for run in runs]
        assert float(row["wall_seconds"]) == pytest.approx(np.mean(walls))


def merges(workers: Studied, run: Run) -> float:
    return sum(workers.history(run, "merge/transfer_seconds") or workers.history(run, "merge/seconds"))


def test_the_runs_to_the_metric_of_one_worker_are_those_of_the_mean_curve(workers: Grown) -> None:
    curves = {
        count: np.mean(
            [workers.history(r, "val/loss") for r in workers.children if r.data.params["trainer.devices"] == count],
            axis=0,
        )
        for count in ("1", "2")
    }
    target = curves["1"][-1]
    for row in workers.table():
        assert float(row["target"]) == pytest.approx(target)
        below = [run for run, value in enumerate(curves[row["workers"]], start=1) if value <= target]
        assert row["run_to_target"] == (str(float(below[0])) if below else "")


def test_results_are_kept_with_the_parent_and_in_the_folder(workers: Grown) -> None:
    assert {"table.csv", "table.md", "curves.csv", "workers.png"} <= workers.artifacts()
    assert "2 trainings ran at the same time" in workers.then_said
    assert (workers.output / "workers.png").read_bytes().startswith(b"\x89PNG")
    lines = (workers.output / "table.md").read_text().splitlines()
    assert any(re.match(r"\| +2 \|", line) for line in lines)
    curves = workers.table("curves.csv")
    assert len(curves) == 2 * (4 + 2)
    one = next(run for run in workers.children if run.data.tags["mlflow.runName"].endswith("2 workers, seed 1"))
    drawn = [float(row["metric"]) for row in curves if (row["point"], row["seed"]) == ("2 workers", "1")]
    assert drawn == workers.history(one, "val/loss")


def test_each_number_of_workers_may_have_settings_of_its_own(workers: Grown) -> None:
    made = {(run.data.params["trainer.devices"], workers.history(run, "train/meta_lr")[0]) for run in workers.children}
    assert made == {("1", 0.005), ("2", float(OWN_RATE))}


def test_runs_may_be_counted_to_a_metric_that_is_asked_for(workers: Grown) -> None:
    assert [float(row["run_to_target"]) for row in workers.first_table] == [1, 1]
    assert [float(row["target"]) for row in workers.first_table] == [1000, 1000]


def test_what_a_study_has_trained_is_not_trained_again(workers: Grown) -> None:
    assert "2 of 4 trainings are known already" in workers.then_said
    assert len(workers.first_runs) == 2
    new = [run for run in workers.children if run.info.run_id not in workers.first_runs]
    assert [run.data.params["seed_everything"] for run in new] == ["1", "1"]


def test_simulated_workers_have_the_curves_of_real_ones_and_times_on_each_network(
    workers: Grown, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_store(tmp_path)
    shared = tmp_path / "gradients.yaml"
    shared.write_text("2: {trainer.max_steps: 4}")
    own = workers.words[workers.words.index("--own") + 1]
    options = ["--workers", "2", "--own", own, "--gradients", str(shared), "--network", "rack", "50,1", "--seeds", "1"]
    words = words_of(repository, tmp_path, "workers", "--simulate", *options)
    done = Studied(tmp_path, "simulated-workers", words, main(words), "".join(capsys.readouterr()))
    assert done.code == 0, done.printed
    curves = {run.data.tags["dmaml.study.point"]: done.history(run, "val/loss") for run in done.children}
    (real,) = [
        run
        for run in workers.children
        if (run.data.params["trainer.devices"], run.data.params["seed_everything"]) == ("2", "0")
    ]
    assert curves["2 workers"] == pytest.approx(workers.history(real, "val/loss"), rel=1e-4)
    table = {(row["averages"], row["workers"]): row for row in done.table()}
    assert set(table) == {("weights, runs of 2", "1"), ("weights, runs of 2", "2"), ("gradients", "2")}
    two, shared_by_two = table["weights, runs of 2", "2"], table["gradients", "2"]
    assert 0.1 < float(two["run_seconds_50 ms, 1 Mbit/s"]) < float(shared_by_two["run_seconds_50 ms, 1 Mbit/s"])
    assert float(two["run_seconds_rack"]) < float(two["run_seconds_50 ms, 1 Mbit/s"])
    assert {"workers.png", "predicted.png"} <= done.artifacts()
    assert "Predicted to be fastest on rack" in done.printed


# -- scaling -------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # seven trainings: test_study_plans has what they are, and the report on them
def test_a_study_of_scaling_sees_as_many_tasks_through_each_knob(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = study(repository, tmp_path, capsys, "scaling", "--factor", "2", "--seeds", "1", "--jobs", "2")
    assert done.code == 0, done.printed
    table = {row["knob"]: row for row in done.table()}
    assert list(table)[:6] == [
        "base",
        "2 x workers",
        "2 x meta-batch, learn2learn",
        "2 x run length",
        "2 x runs",
        "2 x workers, task_parallel",
    ]
    for name, row in table.items():
        assert float(row["times_tasks"]) == (1 if name == "base" else 2), name
        (run,) = [run for run in done.children if run.data.tags["dmaml.study.point"] == name]
        assert float(row["final val/loss"]) == done.history(run, "val/loss")[-1]
        assert float(row["times_wall"]) == pytest.approx(
            float(row["wall_seconds"]) / float(table["base"]["wall_seconds"])
        )
    assert {name: row["runs"] for name, row in table.items() if row["runs"] != "4.0"} == {"2 x runs": "8.0"}
    (parallel,) = [run for run in done.children if run.data.tags["dmaml.study.point"].endswith("task_parallel")]
    assert parallel.data.params["trainer.strategy.class_path"] == "dmaml_pl.TaskParallelStrategy"
    assert parallel.data.params["trainer.strategy.run_length"] == "2"
    assert {"table.csv", "scaling.png"} <= done.artifacts()
    assert "trainings ran at the same time" in done.printed


# -- sweep ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_finds_the_best_setting_makes_each_once_and_counts_divergence_as_a_result(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_store(tmp_path)
    name = "model.meta_optimizer.init_args.lr"
    merges = "trainer.strategy.merge: {choice: [dmaml_pl.MeanMerge]}"  # a choice among texts, of which there is one
    (tmp_path / "space.yaml").write_text(f"{name}: {{choice: [1e-9, 0.03, 1e30]}}\n{merges}\n")
    words = ("--space", "space.yaml", "--workers", "1", "--trials", "8", "--startup", "8", "--seeds", "1")
    done = study(repository, tmp_path, capsys, "sweep", *words)
    assert done.code == 0, done.printed
    statuses = {run.data.params["model.meta_optimizer.lr"]: run.info.status for run in done.children}
    assert statuses == {"1e-09": "FINISHED", "0.03": "FINISHED", "1e+30": "FAILED"}
    assert len(done.children) == 3  # the same setting is not trained twice
    finals = {
        run.data.params["model.meta_optimizer.lr"]: run.data.metrics.get("val/loss", math.nan) for run in done.children
    }
    (best,) = done.table()
    assert best[name] == "0.03"
    assert float(best["score"]) == finals["0.03"]
    tried = done.table("trials.csv")
    assert len(tried) == 8
    expected = {"1e-9": finals["1e-09"], "0.03": finals["0.03"], "1e30": float("inf")}
    assert {row[name]: float(row["score"]) for row in tried} == expected
    assert f"--{name}=0.03" in done.printed
    assert {"best.png", "search.png", "trials.csv"} <= done.artifacts()

    # With another objective the trainings are the same, and known: the fewest runs to what only one of them reaches.
    target = (finals["0.03"] + finals["1e-09"]) / 2
    assert main([*done.words, "--target", str(target)]) == 0
    assert capsys.readouterr().out.count("1 of 1 trainings are known already") == 8
    assert len(done.children) == 3
    (run,) = [run for run in done.children if run.data.params["model.meta_optimizer.lr"] == "0.03"]
    (runs, *_) = [number for number, loss in enumerate(done.history(run, "val/loss"), start=1) if loss <= target]
    costs = {row[name]: float(row["score"]) for row in done.table("trials.csv")}
    assert costs["0.03"] == runs <= 4 < costs["1e-9"] <= 8 < costs["1e30"]
    by_setting = {row[name]: row["run_to_target"] for row in done.table("trials.csv")}
    assert by_setting == {"1e-9": "", "0.03": str(float(runs)), "1e30": ""}
    (best,) = done.table()
    assert best["run_to_target"] == str(float(runs))
    seconds = sum(done.history(run, "train/run_cpu_seconds")[:runs])
    assert float(best["computed_wall_seconds_to_target"]) == pytest.approx(seconds)
