"""What a study trains, of which configurations there is none, and its report: without trainings."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from dmaml_pl.cli.run import run
from dmaml_pl.errors import ConfigError
from dmaml_pl.studies.configuration import Configuration
from dmaml_pl.studies.plan import Point, Request
from dmaml_pl.studies.results import Group, curve_of
from dmaml_pl.studies.scaling import _knobs, _report
from dmaml_pl.studies.study import Study

RESOLVED: dict[str, Any] = {
    "seed_everything": 0,
    "data": {"class_path": "data_modules.Sinusoid", "init_args": {"meta_batch": 3, "seed": None}},
    "trainer": {
        "max_steps": 8,
        "strategy": {"class_path": "dmaml_pl.DMAMLStrategy", "init_args": {"run_length": 2, "timeout": 60.0}},
        "logger": {
            "class_path": "dmaml_pl.MLflowTracker",
            "init_args": {"experiment_name": "sinusoid", "save_dir": "mlruns", "tracking_uri": None},
        },
    },
    "checkpoint": {"monitor": "val/loss", "mode": "min"},
}
BASE = Configuration(RESOLVED)
KNOBS = ["workers", "meta-batch, learn2learn", "run length", "runs", "workers, task_parallel", "meta-batch, vectorized"]


@pytest.mark.parametrize(
    ("group", "name", "value", "told"),
    [
        ("data", "seed", 1, "data.seed is 1, but must be null for a study"),
        ("trainer", "logger", False, "trainer.logger must be dmaml_pl.MLflowTracker"),
        ("checkpoint", "monitor", "train/loss", "checkpoint.monitor is train/loss, but a study compares by it"),
    ],
)
def test_a_configuration_of_which_there_is_no_study_is_refused(group: str, name: str, value: Any, told: str) -> None:
    settings = copy.deepcopy(RESOLVED)
    settings[group].get("init_args", settings[group])[name] = value
    with pytest.raises(ConfigError, match=told):
        Configuration(settings)


def test_scaling_needs_trainings_of_a_known_length() -> None:
    endless = Configuration(RESOLVED | {"trainer": RESOLVED["trainer"] | {"max_steps": -1}})
    with pytest.raises(ConfigError, match=r"trainer\.max_steps is -1, but must be a whole number of at least 1"):
        _knobs(endless, 2, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_knob_of_scaling_sees_a_factor_of_tasks_more(workers: int) -> None:
    base, *knobs = _knobs(BASE, 3, workers)
    assert base == Point("base", workers)
    assert [point.label for point in knobs] == [f"3 x {name}" for name in KNOBS]
    for point in knobs:
        settings = dict(point.settings)
        batch, steps = (int(settings.get(name, BASE.whole(name))) for name in ("data.meta_batch", "trainer.max_steps"))
        assert point.workers * batch * steps == 3 * (workers * 3 * 8), point.label
    longer = dict(knobs[2].settings)
    assert (longer["trainer.strategy.run_length"], longer["trainer.max_steps"]) == ("6", "24")


def test_the_command_line_takes_every_knob_of_scaling(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = Request("scaling", "s", (str(repository / "configs" / "sinusoid.yaml"),), (), seeds=1, jobs=1)
    together = dict(setting for point in _knobs(BASE, 2, 1) for setting in point.settings)
    with pytest.raises(SystemExit) as stop:
        run([*request.command(tuple(together.items())), "--print_config"])
    assert stop.value.code == 0
    taken = Configuration(yaml.safe_load(capsys.readouterr().out))
    assert taken.find("trainer.strategy.class_path") == "dmaml_pl.TaskParallelStrategy"
    names = ("data.meta_batch", "trainer.max_steps", "trainer.strategy.run_length", "trainer.strategy.timeout")
    assert [taken.find(name) for name in names] == [6, 16, 2, 60.0]
    assert taken.find("model.engine") == "vectorized"


def _group(point: Point, tasks: float, seconds: float, metric: float) -> Group:
    runs = {
        "train/run": {2: 1.0},
        "train/tasks_seen": {2: tasks},
        "train/run_seconds": {2: seconds},
        "train/run_cpu_seconds": {2: seconds / 2},
        "merge/seconds": {},
        "merge/transfer_seconds": {},
    }
    return Group(point.label, (curve_of(point.label, 0, {2: metric}, runs, communicates=False),), "min")


def test_the_report_of_scaling_compares_with_the_base_and_plots_the_costs(tmp_path: Path) -> None:
    points = _knobs(BASE, 2, 1)
    found = {
        point: _group(point, 24 if point.label == "base" else 48, 4 + n, 1 / (n + 1)) for n, point in enumerate(points)
    }
    report = _report(cast("Study", SimpleNamespace(base=BASE)), found, 2)
    table = report.tables["table.csv"].set_index("knob")
    assert [*table.index] == [point.label for point in points]
    assert table["times_tasks"].tolist() == [1, 2, 2, 2, 2, 2, 2]
    assert table["times_wall"].tolist() == table["times_computed_wall"].tolist() == [1 + n / 4 for n in range(7)]
    assert table["final val/loss"].tolist() == [1 / (n + 1) for n in range(7)]
    ((name, plot),) = report.plots.items()
    plot(tmp_path / name)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
