"""The study of scaling: what it costs and gains to see a factor of tasks more, through each knob in turn.

Figure 6 of Soulier's thesis (TH Koeln 2020), beside two ways that it recommends trying: meta-gradients averaged over
workers (parallel tasks), and all tasks at once in one process.
"""

import json
from collections.abc import Mapping
from functools import partial

import pandas as pd

from dmaml_pl.studies.configuration import Configuration
from dmaml_pl.studies.plan import Point
from dmaml_pl.studies.plots import plot_costs
from dmaml_pl.studies.report import COMPUTED, SMOOTHED, Columns, Report, compare_points
from dmaml_pl.studies.results import Group
from dmaml_pl.studies.study import Study

IN_STEP = (
    "task_parallel communicates at every meta-iteration. Its computed wall time holds the merge at the end of a run "
    "only: it is a lower bound."
)
SAME_UPDATES = (
    "With one worker and the plain mean, a longer run and more runs are the same training: they differ in how often it "
    "is validated."
)


def conduct(study: Study, factor: int, workers: int) -> None:
    """Train the configuration as it is, with some workers, and with each knob turned up by a factor of tasks.

    Raises:
        ConfigError: the configuration does not say how long it trains.
    """
    points, options = _knobs(study.base, factor, workers), {"factor": factor, "workers": workers}
    compare_points(study, points, options, lambda found: _report(study, found, factor))


def _knobs(base: Configuration, factor: int, workers: int) -> list[Point]:
    """The training to compare with, and one for each knob."""
    length_setting, steps_setting = base.run_length_setting, "trainer.max_steps"
    batch, length, steps = map(base.whole, ("data.meta_batch", length_setting, steps_setting))
    larger, longer = ("data.meta_batch", str(batch * factor)), (steps_setting, str(steps * factor))
    names = ("timeout", "process_group_backend", "start_method")
    shared = {name: base.find(f"trainer.strategy.{name}") for name in names}
    settings = {"run_length": length, **{name: value for name, value in shared.items() if value is not None}}
    parallel = json.dumps({"class_path": "dmaml_pl.TaskParallelStrategy", "init_args": settings})
    return [
        Point("base", workers),
        Point(f"{factor} x workers", workers * factor),
        Point(f"{factor} x meta-batch, learn2learn", workers, (larger, ("model.engine", "learn2learn"))),
        Point(f"{factor} x run length", workers, ((length_setting, str(length * factor)), longer)),
        Point(f"{factor} x runs", workers, (longer,)),
        Point(f"{factor} x workers, task_parallel", workers * factor, (("trainer.strategy", parallel),)),
        Point(f"{factor} x meta-batch, vectorized", workers, (larger, ("model.engine", "vectorized"))),
    ]


def _report(study: Study, found: Mapping[Point, Group], factor: int) -> Report:
    """Make the table and the plot; what there is to compare with comes first, unless it failed."""
    metric = study.base.metric
    table = pd.DataFrame(
        [{"knob": point.label, "workers": point.workers, **group.summary(metric)} for point, group in found.items()]
    )
    times = {"times_tasks": "tasks_seen", "times_wall": "wall_seconds", "times_computed_wall": "computed_wall_seconds"}
    base = table.where(table["knob"] == "base").iloc[0]
    table = table.assign(**{ratio: table[column] / base[column] for ratio, column in times.items()})
    shown: Columns = {
        "knob": "knob",
        "workers": "workers",
        "runs": "runs",
        "tasks seen": "tasks_seen",
        "x base ": "times_tasks",
        "wall s measured": ("wall_seconds", "wall_seconds_sd"),
        "x base  ": "times_wall",
        "wall s computed": ("computed_wall_seconds", "computed_wall_seconds_sd"),
        "x base   ": "times_computed_wall",
        f"final {metric}": (f"final {metric}", "sd"),
    }
    title = f"{factor} times the tasks, through each knob in turn"
    notes = [SMOOTHED, COMPUTED, IN_STEP, *([SAME_UPDATES] if table["workers"].min() == 1 else [])]
    plot = partial(plot_costs, table, "knob", f"final {metric}", f"{study.base.experiment_name}: {title}")
    return Report(title, {"table.csv": table}, shown, notes, {"scaling.png": plot})
