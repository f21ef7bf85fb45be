"""The study of workers: the validation metric over runs, for several numbers of workers.

Figure 5 of Soulier's thesis (TH Koeln 2020), and the same over tasks seen and over wall time.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd

from dmaml_pl.console.tables import NOTHING
from dmaml_pl.studies.plan import Point, label_of
from dmaml_pl.studies.plots import plot_curves
from dmaml_pl.studies.report import COMPUTED, SMOOTHED, Columns, Report, compare_points, number
from dmaml_pl.studies.results import Group, final, placed_on
from dmaml_pl.studies.settings_files import Settings
from dmaml_pl.studies.study import Study

PLOTTED = ("run", "tasks_seen", "wall_seconds", "computed_wall_seconds")


def conduct(study: Study, workers: Sequence[int], own: Mapping[int, Settings], target: float | None) -> None:
    """Train with each number of workers, at its `own` settings, and compare them with the first.

    Runs are counted to the metric `target`, None for what the first ends with.
    """
    points = [Point(label_of(count), count, own.get(count, ())) for count in workers]
    options = {"workers": " ".join(map(str, workers))}
    compare_points(study, points, options, lambda found: _report(study, found, target))


def _report(study: Study, found: Mapping[Point, Group], target: float | None) -> Report:
    """Make the table and the plot."""
    metric, reference = study.base.metric, next(iter(found.values()))
    whose = f"what {reference.label} ends with" if target is None else "the metric asked for"
    target = final(reference.mean["metric"]) if target is None else target
    table = pd.DataFrame(
        [
            {"workers": point.workers, **group.summary(metric), "target": target, **group.cost(target)}
            for point, group in found.items()
        ]
    )
    runs, acts = table["run_to_target"], "env_steps" in table
    shown: Columns = {
        "workers": "workers",
        f"final {metric}": (f"final {metric}", "sd"),
        "best": f"best {metric}",
        f"runs to {number(target)}": "run_to_target",
        "times fewer": "times_fewer_runs",
        **({"env steps to it": "env_steps_to_target"} if acts else {"tasks to it": "tasks_seen_to_target"}),
        "computed s to it": "computed_wall_seconds_to_target",
        "runs": "runs",
        **({"env steps": "env_steps"} if acts else {"tasks seen": "tasks_seen"}),
        "wall s measured": ("wall_seconds", "wall_seconds_sd"),
        "wall s computed": ("computed_wall_seconds", "computed_wall_seconds_sd"),
    }
    reached = (
        f"{number(target)} is {whose}, reached at the first validation at which the mean over the seeds, smoothed by a "
        f"trailing mean over a tenth of the validations, is at least as good ({NOTHING}: it never is)."
    )
    title = f"{metric} by number of workers"
    plot = partial(
        plot_curves,
        [*found.values()],
        placed_on([*found.values()], PLOTTED),
        metric,
        f"{study.base.experiment_name}: {title}",
    )
    tables = {"table.csv": table.assign(times_fewer_runs=runs.iloc[0] / runs)}
    return Report(title, tables, shown, [SMOOTHED, reached, COMPUTED], {"workers.png": plot})
