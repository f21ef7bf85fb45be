"""What `dmaml study` promises, with real trainings and a real MLflow store."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from dmaml_pl.__main__ import main
from dmaml_pl.studies import local
from dmaml_pl.studies.local import Gpus, Local, server
from dmaml_pl.studies.runner import Job, Launcher, make
from dmaml_pl.studies.settings_files import read_own
from tests.trainings import lay_store
from tests.workers import ends

TINY = """\
data: {init_args: {meta_batch: 2, val_tasks: 4}}
model: {init_args: {network: {init_args: {hidden: [4]}}}}
trainer: {max_steps: 8, strategy: {init_args: {run_length: 2}}}
"""

FRAGILE = '''\
"""A network that misbehaves in the training (not in the checks before it) as the environment says."""
import os, signal, torch
from pathlib import Path
from dmaml_pl import MLP

class Fragile(MLP):
    def forward(self, x):
        if torch.distributed.is_initialized() and torch.is_grad_enabled() and not Path("mended").exists():
            Path(f"worker-{os.getpid()}").touch()
            exec(os.environ.get("DO", ""))
        return super().forward(x)
'''


@dataclass
class Studied:
    """A study that was made, and its store."""

    folder: Path
    kind: str
    words: list[str]
    code: int
    printed: str

    @property
    def output(self) -> Path:
        return self.folder / "mlruns" / "studies" / f"{self.kind}-sinusoid"

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder}/mlruns/mlflow.db")

    @property
    def runs(self) -> list[Run]:
        (experiment,) = [e for e in self.client.search_experiments() if e.name == "sinusoid"]
        return list(self.client.search_runs([experiment.experiment_id]))

    @property
    def parent(self) -> Run:
        (run,) = [run for run in self.runs if "mlflow.parentRunId" not in run.data.tags]
        return run

    @property
    def children(self) -> list[Run]:
        return [run for run in self.runs if run.data.tags.get("mlflow.parentRunId") == self.parent.info.run_id]

    def table(self, name: str = "table.csv") -> list[dict[str, str]]:
        with (self.output / name).open() as file:
            return list(csv.DictReader(file))

    def history(self, run: Run, metric: str) -> list[float]:
        entries = self.client.get_metric_history(run.info.run_id, metric)
        return [entry.value for entry in sorted(entries, key=lambda entry: entry.step)]

    def artifacts(self) -> set[str]:
        return {file.path for file in self.client.list_artifacts(self.parent.info.run_id)}


def words_of(repository: Path, folder: Path, kind: str, *words: str) -> list[str]:
    tiny = folder / "tiny.yaml"
    tiny.write_text(TINY)
    store = f"--trainer.logger.save_dir={folder / 'mlruns'}"
    configs = ["--config", str(repository / "configs/sinusoid.yaml"), "--config", str(tiny)]
    return ["study", kind, *configs, store, *words]


def study(repository: Path, folder: Path, capsys: Any, kind: str, *words: str) -> Studied:
    given = words_of(repository, folder, kind, *words)
    code = main(given)
    return Studied(folder, kind, given, code, "".join(capsys.readouterr()))


@pytest.fixture
def fragile(tmp_path: Path) -> Path:
    """The current folder, where a network may misbehave."""
    (tmp_path / "fragile_network.py").write_text(FRAGILE)
    lay_store(tmp_path)
    return tmp_path


NETWORK = "--model.network=fragile_network.Fragile"


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


def test_a_number_of_workers_without_settings_of_its_own_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("2: {model.meta_optimizer.init_args.lr: 0.1}")
    assert read_own(own, [1, 2, 4]) == {2: (("model.meta_optimizer.init_args.lr", "0.1"),)}
    assert capsys.readouterr().out == f"--own {own} has no settings of 1, 4 workers: the configuration's are taken.\n"
    read_own(own, [2])
    assert capsys.readouterr().out == ""


def test_runs_may_be_counted_to_a_metric_that_is_asked_for(workers: Grown) -> None:
    assert [float(row["run_to_target"]) for row in workers.first_table] == [1, 1]
    assert [float(row["target"]) for row in workers.first_table] == [1000, 1000]


def test_what_a_study_has_trained_is_not_trained_again(workers: Grown) -> None:
    assert "2 of 4 trainings are known already" in workers.then_said
    assert len(workers.first_runs) == 2
    new = [run for run in workers.children if run.info.run_id not in workers.first_runs]
    assert [run.data.params["seed_everything"] for run in new] == ["1", "1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3: {model.inner_lr: 1}", "has settings of 3 workers, but --workers asks for 1, 2"),
        ("a: {model.inner_lr: 1}", "has a: {'model.inner_lr': 1}, but lines of the form `W: {NAME: VALUE, ...}`"),
        ("2: 0.1", "has 2: 0.1, but lines of the form"),
        ("", "holds no settings"),
        ("2: {", "is not valid YAML"),
        ("2: {data.shots: 3}\n2: {}", "has 2 twice in one place, in lines 1 and 2"),
        ("2: {trainer.devices: 3}", "sets trainer.devices of 2 workers: leave it out"),
    ],
)
def test_own_settings_that_make_no_sense_are_told_in_one_line(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(text)
    assert main(words_of(repository, tmp_path, "workers", "--workers", "1", "2", "--own", str(own))) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "mlruns").exists()


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


# -- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failed_training_is_told_and_made_again_by_the_same_command(
    repository: Path, fragile: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DO", "if os.environ['PL_GLOBAL_SEED'] == '1': os.kill(os.getpid(), signal.SIGKILL)")
    first = study(repository, fragile, capsys, "workers", "--workers", "1", "--seeds", "2", NETWORK)
    assert first.code == 1
    assert re.search(r"1 worker, seed 1: failed", first.printed)
    assert "dmaml: error: 1 training failed: 1 worker, seed 1" in first.printed
    assert first.parent.info.status == "FAILED"
    assert sorted(run.info.status for run in first.children) == ["FAILED", "FINISHED"]
    assert [row["seeds"] for row in first.table()] == ["1"]

    (fragile / "mended").touch()
    assert main(first.words) == 0
    assert sorted(run.info.status for run in first.children) == ["FAILED", "FINISHED", "FINISHED"]
    assert first.parent.info.status == "FINISHED"
    assert [row["seeds"] for row in first.table()] == ["2"]


def workers_of(folder: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in folder.glob("worker-*")]


def test_ctrl_c_ends_the_trainings_and_says_that_the_same_command_goes_on(
    repository: Path, fragile: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDY", str(os.getpid()))
    again = "Path('told').exists() or (Path('told').touch(), os.kill(int(os.environ['STUDY']), signal.SIGINT))"
    monkeypatch.setenv("DO", again)
    endless = ("--trainer.max_steps", "1000000", "--model.compile", "false")
    done = study(repository, fragile, capsys, "workers", "--workers", "2", "--seeds", "1", NETWORK, *endless)
    assert done.code == 130
    assert "The same command goes on" in done.printed
    assert [run.info.status for run in done.children] == ["KILLED"]
    assert done.parent.info.status == "KILLED"
    assert len(workers_of(fragile)) in (1, 2)
    assert all(ends(worker, within_s=0) for worker in workers_of(fragile))


@pytest.mark.slow  # test_fork_server has what becomes of what a killed process had forked
def test_trainings_do_not_outlive_a_study_that_is_killed(repository: Path, fragile: Path) -> None:
    words = words_of(repository, fragile, "workers", "--workers", "1", "--seeds", "1", NETWORK)
    words += ["--model.compile=false"]  # which a loaded machine does not finish within its patience
    doing = "Path('told').exists() or (Path('told').touch(), os.kill(int(os.environ['STUDY']), signal.SIGKILL))"
    code = (
        f"import os; os.environ.update(STUDY=str(os.getpid()), DO={doing!r});"
        f"from dmaml_pl.__main__ import main; main({[*words, '--trainer.max_steps=1000000']!r})"
    )
    process = server().fork(dict(os.environ), partial(exec, code))
    assert process.wait(200) == -signal.SIGKILL
    (worker,) = workers_of(fragile)
    assert ends(worker, within_s=60)
    assert [run.info.status for run in Studied(fragile, "workers", words, 0, "").children] == ["KILLED"]


def test_a_study_whose_processes_are_all_killed_repeats_nothing_that_was_finished(
    repository: Path, fragile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # benchmarks/kill_study.py does it at random moments, and often
    words = words_of(repository, fragile, "workers", "--workers", "1", "--seeds", "2", NETWORK)
    second = "os.environ['PL_GLOBAL_SEED'] == '1' and not Path('told').exists()"
    doing = f"{second} and (Path('told').touch(), os.killpg(int(os.environ['STUDY']), signal.SIGKILL))"
    code = (
        f"import os; os.setsid(); os.environ.update(STUDY=str(os.getpid()), DO={doing!r});"
        f"from dmaml_pl.__main__ import main; main({words!r})"
    )
    assert server().fork(dict(os.environ), partial(exec, code)).wait(200) == -signal.SIGKILL
    done = Studied(fragile, "workers", words, main(words), "".join(capsys.readouterr()))
    assert done.code == 0
    assert "1 of 2 trainings are known already" in done.printed
    made = sorted((run.data.params["seed_everything"], run.info.status) for run in done.children)
    assert made == [("0", "FINISHED"), ("1", "FINISHED"), ("1", "KILLED")]


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


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["workers", "--workers", "0"], "--workers is 0, but must be a whole number of at least 1"),
        (["workers", "--workers", "2", "2"], "each number may be given once"),
        (["workers", "--seeds", "none"], "--seeds is none, but must be a whole number"),
        (["workers", "--network", "rack"], "--network is given, but is for simulated workers: give --simulate, too"),
        (
            ["workers", "--simulate", "--network", "ether"],
            "--network is ether, but must be machine, rack, internet, or",
        ),
        (["workers", "--trainer.devices", "2"], "--trainer.devices cannot be set in a study: --workers"),
        (["workers", "again"], "again is not a setting"),
        (["scaling", "--factor", "1"], "--factor is 1, but must be a whole number of at least 2"),
        (["sweep"], "Not set: --space"),
        (["workers", "--launcher", "condor"], "--launcher invalid choice: 'condor' (choose from"),
        (["workers", "--resources", "time=3"], "--resources time=3 is for --launcher slurm or ray: leave it out"),
        (
            ["workers", "--launcher", "slurm", "--resources", "long"],
            "--resources has long, but must be",
        ),
        (
            ["workers", "--simulate", "--trainer.strategy", "task_parallel"],
            "--trainer.strategy cannot be set in a study",
        ),
        (["sweep", "--space", "none.yaml"], "--space is none.yaml, which cannot be read"),
        (["sweep", "--space", "SPACE", "--target", "low"], "--target is low, but must be a number"),
        (["weather"], "invalid choice: 'weather'"),
    ],
)
def test_bad_words_are_told_in_one_line_at_once(
    words: list[str], told: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", str(repository / "configs/sinusoid.yaml")] if words[0] != "weather" else []
    assert main(["study", words[0], *config, *words[1:]]) == 1
    said = capsys.readouterr().err
    assert told in said
    assert said.startswith("dmaml: error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("a: 3", "a is 3, but must be {int: [LOW, HIGH]}"),
        ("a: {int: [5]}", "a is {'int': [5]}, but must be {int: [LOW, HIGH]}"),
        ("a: {int: [5, 1]}", "a is {'int': [5, 1]}, but must be {int: [LOW, HIGH]}"),
        ("a: {int: [1, 2.5]}", "both must be whole numbers"),
        ("a: {float: [1, .inf]}", "inf is no number"),
        ("a: {float: [low, high]}", "a is {'float': ['low', 'high']}, but must be {int: [LOW, HIGH]}"),
        ("a: {float: [0, 1], log: true}", "a is {'float': [0, 1], 'log': True}, but must be {int: [LOW, HIGH]}"),
        ("a: {float: [0, 1], log: 3}", "a is {'float': [0, 1], 'log': 3}, but must be {int: [LOW, HIGH]}"),
        ("a: {float: [0, 1], lgo: true}", "a is {'float': [0, 1], 'lgo': True}, but must be {int: [LOW, HIGH]}"),
        ("a: {choice: []}", "a is {'choice': []}, but must be {int: [LOW, HIGH]}"),
        ("trainer.devices: {int: [1, 2]}", "which a sweep sets itself"),
        ("- a", "holds no settings"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_space_that_makes_no_sense_is_told_in_one_line(
    entry: str, told: str, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "space.yaml").write_text(entry)
    config = ["--config", str(repository / "configs/sinusoid.yaml")]
    assert main(["study", "sweep", *config, "--space", "space.yaml"]) == 1
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "words", "told"),
    [
        ("workers", ["--trainer.max_step=3"], "trainer.max_step is not a setting. Did you mean"),
        ("workers", ["--workers", "9", "--data.val_tasks=8"], "data.val_tasks is 8"),
        (
            "workers",
            ["--workers", "1", "--trainer.limit_val_batches", "0"],
            "trainer.limit_val_batches is 0, but must ",
        ),
        ("sweep", ["--workers", "1", "--space", "space.yaml"], "model.inner_rl"),
    ],
)
def test_what_cannot_be_trained_is_told_before_anything_is_tracked(
    kind: str, words: list[str], told: str, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "space.yaml").write_text("model.inner_rl: {choice: [0.1]}")
    done = study(repository, tmp_path, capsys, kind, *words)
    assert done.code == 1
    assert told in done.printed
    assert done.printed.count("\n") == 1
    assert not (tmp_path / "mlruns").exists()


def test_the_help_loads_neither_pytorch_nor_mlflow() -> None:
    script = (
        "import sys; from dmaml_pl.__main__ import main\n"
        "try: main(['study', 'workers', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'mlflow', 'optuna', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "--seeds" in done.stdout
    assert done.stdout.endswith("[]\n")


# -- GPUs ----------------------------------------------------------------------------------------------------------


def test_gpus_are_shared_out_evenly_each_training_having_as_many_as_workers() -> None:
    gpus = Gpus({"CUDA_VISIBLE_DEVICES": "0,1,2,GPU-d"})
    assert gpus.take(2) == ("0", "1")
    assert gpus.take(1) == ("2",)
    assert gpus.take(1) == ("GPU-d",)
    gpus.give_back(("2",))
    assert gpus.take(3) == ("2", "0", "1")  # first that which nobody has
    assert set(gpus.take(9)) == {"GPU-d", "0", "1", "2"}  # all that there are
    assert gpus.take(0) == ()  # a check
    assert Gpus({"CUDA_VISIBLE_DEVICES": ""}).take(1) == Gpus({"CUDA_VISIBLE_DEVICES": "-1"}).take(1) == ()


def test_trainings_at_the_same_time_are_never_all_on_the_first_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []

    class Process:
        sentinel = -1

        def __init__(self) -> None:
            self.looked = 0

        def poll(self) -> int | None:
            self.looked += 1
            return 0 if self.looked > 1 else None

    class Watching:
        def fork(self, environment: dict[str, str], _: Any) -> Process:
            given.append(environment["CUDA_VISIBLE_DEVICES"])
            return Process()

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    monkeypatch.setattr(local, "server", Watching)
    monkeypatch.setattr("multiprocessing.connection.wait", lambda *_: None)
    jobs = [Job(number, ("fit",), tmp_path / f"{number}.log", workers=1) for number in range(6)]
    assert len(list(make(jobs, 3, Local()))) == 6
    assert given == ["5", "6", "7", "5", "6", "7"]


def test_a_job_that_is_hopeless_is_ended_and_one_that_waits_is_not_begun(tmp_path: Path) -> None:
    asked: list[str] = []

    class Told(Launcher):
        def start(self, job: Job) -> list[int]:
            asked.append(f"start {job.key}")
            return []

        def code(self, started: list[int]) -> int | None:
            return started[0] if started else None

        def end(self, started: list[int], *, kill: bool = False) -> None:
            asked.append("end")
            started.append(143)

        def wait(self, started: Any) -> None:
            pass

    jobs = [Job(number, ("fit",), tmp_path / "log") for number in range(2)]
    ended = list(make(jobs, 1, Told(), hopeless=lambda job: "start 0" in asked))
    assert [each.code for each in ended] == [143, None]
    assert asked == ["start 0", "end"]
