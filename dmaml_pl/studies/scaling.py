"""The study of scaling: what it costs and gains to see a factor of tasks more, through each knob in turn.

Figure 6 of Soulier's thesis (TH Koeln 2020), beside two ways that it recommends trying: meta-gradients averaged over
workers (parallel tasks), and all tasks at once in one process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

import pandas as pd

from dmaml_pl.studies.configuration import Configuration
from dmaml_pl.studies.plan import Point
from dmaml_pl.studies.plots import plot_costs
from dmaml_pl.studies.report import COMPUTED, SMOOTHED, Columns, Report, publish
from dmaml_pl.studies.results import Group, groups
from dmaml_pl.studies.study import Study

IN_STEP = (
    "task_parallel communicates at every meta-iteration. Its computed wall time holds the merge at the end of a run "
    "only: it is a lower bound."
)
SAME_UPDATES = (
    "With one worker and the plain mean, a longer run and more runs are the same training: they differ in how often it "
    "is validated."
)
_STEPS = "trainer.max_steps"


def conduct(study: Study, factor: int, workers: int) -> None:
    """Train the configuration as it is, and with each knob turned up.

    Args:
        study: checked, but not open.
        factor: by which each knob multiplies the tasks seen.
        workers: of the training that the others are compared with.

    Raises:
        ConfigError: the configuration does not say how long it trains.
    """
    points = knobs(study.base, factor, workers)
    study.check(points)
    with study.open({"factor": factor, "workers": workers, "seeds": study.request.seeds}):
        found = groups(study, study.train(study.trainings(points)))
        if found and found[0].label == points[0].label:
            publish(study, report(study, found, points, factor), found)


def knobs(base: Configuration, factor: int, workers: int) -> list[Point]:
    """Name the training to compare with, and one for each knob.

    Args:
        base: the configuration.
        factor: of tasks.
        workers: of the training to compare with.

    Raises:
        ConfigError: the configuration does not say how long it trains.
    """
    batch, length, steps = (base.whole(name) for name in ("data.meta_batch", base.run_length_setting, _STEPS))
    larger = (("data.meta_batch", str(batch * factor)),)
    longer = ((_STEPS, str(steps * factor)),)
    engines = base.has("model.engine")
    one_by_one = f"{factor} x meta-batch, learn2learn" if engines else f"{factor} x meta-batch"
    points = [
        Point("base", workers),
        Point(f"{factor} x workers", workers * factor),
        Point(one_by_one, workers, larger + ((("model.engine", "learn2learn"),) if engines else ())),
        Point(f"{factor} x run length", workers, ((base.run_length_setting, str(length * factor)), *longer)),
        Point(f"{factor} x runs", workers, longer),
        Point(f"{factor} x workers, task_parallel", workers * factor, (("trainer.strategy", _task_parallel(base)),)),
    ]
    if engines:
        points.append(Point(f"{factor} x meta-batch, vectorized", workers, (*larger, ("model.engine", "vectorized"))))
    return points


def _task_parallel(base: Configuration) -> str:
    """The strategy that averages meta-gradients, with the settings that it shares with the configuration's."""
    shared = ("timeout", "process_group_backend", "start_method")
    given = {name: base.find(f"trainer.strategy.{name}") for name in shared if base.has(f"trainer.strategy.{name}")}
    settings = {"run_length": base.run_length, **given}
    return json.dumps({"class_path": "dmaml_pl.TaskParallelStrategy", "init_args": settings})


def report(study: Study, found: Sequence[Group], points: Sequence[Point], factor: int) -> Report:
    """Make the table and the plot.

    Args:
        study: what was studied.
        found: a group for each knob, the first for the training to compare with.
        points: all knobs.
        factor: of tasks.
    """
    metric, workers = study.base.metric, {point.label: point.workers for point in points}
    table = pd.DataFrame(
        [{"knob": group.label, "workers": workers[group.label], **group.summary(metric)} for group in found]
    )
    times = {"times_tasks": "tasks_seen", "times_wall": "wall_seconds", "times_computed_wall": "computed_wall_seconds"}
    table = table.assign(**{times: table[column] / table[column].iloc[0] for times, column in times.items()})
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
    notes = [SMOOTHED, COMPUTED, IN_STEP, *([SAME_UPDATES] if points[0].workers == 1 else [])]
    plot = partial(plot_costs, table, "knob", f"final {metric}", f"{study.base.experiment_name}: {title}")
    return Report(title, table, shown, notes, {"scaling.png": plot})
