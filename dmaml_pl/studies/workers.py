"""The study of workers: the validation metric over runs, for several numbers of workers.

Figure 5 of Soulier's thesis (TH Koeln 2020), and the same over tasks seen and over wall time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd

from dmaml_pl.console.tables import NOTHING
from dmaml_pl.studies.plan import Point, label_of
from dmaml_pl.studies.plots import plot_curves
from dmaml_pl.studies.report import COMPUTED, SMOOTHED, Columns, Report, number, publish
from dmaml_pl.studies.results import Group, final, groups
from dmaml_pl.studies.settings_files import Settings
from dmaml_pl.studies.study import Study

PLOTTED = ("run", "tasks_seen", "wall_seconds", "computed_wall_seconds")


def conduct(study: Study, workers: Sequence[int], own: Mapping[int, Settings], target: float | None) -> None:
    """Train with each number of workers, and compare.

    Args:
        study: checked, but not open.
        workers: numbers of workers; the first is what the others are compared with.
        own: settings of a number of workers' own.
        target: metric to which runs are counted; None takes what the first ends with.
    """
    points = [Point(label_of(count), count, own.get(count, ())) for count in workers]
    study.check(points)
    with study.open({"workers": " ".join(map(str, workers)), "seeds": study.request.seeds}):
        found = groups(study, study.train(study.trainings(points)))
        if found:
            publish(study, report(study, found, {point.label: point.workers for point in points}, target), found)


def report(study: Study, found: Sequence[Group], workers: Mapping[str, int], target: float | None = None) -> Report:
    """Make the table and the plot.

    Args:
        study: what was studied.
        found: a group for each number of workers.
        workers: that number by the group's label.
        target: metric to which runs are counted; None takes what the first group ends with.
    """
    metric, reference = study.base.metric, found[0]
    whose = f"what {reference.label} ends with" if target is None else "the metric asked for"
    target = final(reference.mean["metric"]) if target is None else target
    table = pd.DataFrame(
        [
            {"workers": workers[group.label], **group.summary(metric), "target": target, **group.cost(target)}
            for group in found
        ]
    )
    runs = table["run_to_target"]
    shown: Columns = {
        "workers": "workers",
        f"final {metric}": (f"final {metric}", "sd"),
        "best": f"best {metric}",
        f"runs to {number(target)}": "run_to_target",
        "times fewer": "times_fewer_runs",
        "tasks to it": "tasks_seen_to_target",
        "computed s to it": "computed_wall_seconds_to_target",
        "runs": "runs",
        "tasks seen": "tasks_seen",
        "wall s measured": ("wall_seconds", "wall_seconds_sd"),
        "wall s computed": ("computed_wall_seconds", "computed_wall_seconds_sd"),
    }
    notes = [
        SMOOTHED,
        (
            f"{number(target)} is {whose}, reached at the first validation at which the mean "
            "over the seeds, smoothed by a trailing mean over a tenth of the validations, is at least as good "
            f"({NOTHING}: it never is)."
        ),
        COMPUTED,
    ]
    title = f"{metric} by number of workers"
    plot = partial(plot_curves, found, PLOTTED, metric, f"{study.base.experiment_name}: {title}")
    return Report(title, table.assign(times_fewer_runs=runs.iloc[0] / runs), shown, notes, {"workers.png": plot})
