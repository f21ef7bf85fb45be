"""The study of workers: the validation metric over runs, for several numbers of workers.

Figure 5 of Soulier's thesis (TH Koeln 2020), and the same over tasks seen and over wall time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from dmaml_pl.studies.figures import draw_curves
from dmaml_pl.studies.plan import Point
from dmaml_pl.studies.report import COMPUTED, SMOOTHED, Report, publish
from dmaml_pl.studies.results import Group, final, groups, spread
from dmaml_pl.studies.settings_by_workers import Settings
from dmaml_pl.studies.study import Study
from dmaml_pl.studies.tables import NOTHING, number, with_spread

PANELS = (
    ("run", "runs"),
    ("tasks_seen", "tasks seen by all workers"),
    ("wall_seconds", "wall time, measured (s)"),
    ("computed_wall_seconds", "wall time on one machine per worker, computed (s)"),
)


def conduct(study: Study, workers: Sequence[int], own: Mapping[int, Settings], target: float | None) -> None:
    """Train with each number of workers, and compare.

    Args:
        study: checked, but not open.
        workers: numbers of workers; the first is what the others are compared with.
        own: settings of a number of workers' own.
        target: metric to which runs are counted; None takes what the first ends with.
    """
    points = {count: Point(_label(count), count, own.get(count, ())) for count in workers}
    study.check(list(points.values()))
    with study.open({"workers": " ".join(map(str, workers)), "seeds": study.request.seeds}):
        by_seed = zip(*(study.seeds(point) for point in points.values()), strict=True)
        children = study.train([training for trainings in by_seed for training in trainings])
        found = groups(study, children)
        if found:
            publish(study, report(study, found, {_label(count): count for count in workers}, target), found)


def _label(workers: int) -> str:
    return f"{workers} worker{'s' if workers > 1 else ''}"


def report(study: Study, found: Sequence[Group], workers: dict[str, int], target: float | None = None) -> Report:
    """The table and the figure.

    Args:
        study: what was studied.
        found: a group for each number of workers.
        workers: that number by the group's label.
        target: metric to which runs are counted; None takes what the first group ends with.
    """
    metric, reference = study.base.metric, found[0]
    whose = f"what {reference.label} ends with" if target is None else "the metric asked for"
    target = final(reference.mean) if target is None else target
    reached = [group.cost(target) for group in found]
    rows, shown = [], []
    for group, cost in zip(found, reached, strict=True):
        times = reached[0]["run"] / cost["run"] if cost and reached[0] else None
        rows.append(
            {
                "workers": workers[group.label],
                "seeds": len(group.curves),
                f"final {metric}": float(group.final.mean()),
                "sd": spread(group.final),
                f"best {metric}": group.best,
                "runs": float(group.total("run").mean()),
                "tasks_seen": float(group.total("tasks_seen").mean()),
                "wall_seconds": float(group.total("wall_seconds").mean()),
                "wall_seconds_sd": spread(group.total("wall_seconds")),
                "computed_wall_seconds": float(group.total("computed_wall_seconds").mean()),
                "computed_wall_seconds_sd": spread(group.total("computed_wall_seconds")),
                "target": target,
                **{f"{axis}_to_target": cost.get(axis) for axis, _ in PANELS},
                "times_fewer_runs": times,
            }
        )
        shown.append(
            {
                "workers": str(workers[group.label]),
                f"final {metric}": with_spread(group.final),
                "best": number(group.best),
                f"runs to {number(target)}": number(cost.get("run")),
                "times fewer": NOTHING if times is None else f"{times:.2f}",
                "tasks to it": number(cost.get("tasks_seen")),
                "computed s to it": number(cost.get("computed_wall_seconds")),
                "runs": number(float(group.total("run").mean())),
                "tasks seen": number(float(group.total("tasks_seen").mean())),
                "wall s measured": with_spread(group.total("wall_seconds")),
                "wall s computed": with_spread(group.total("computed_wall_seconds")),
            }
        )
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
    draw = partial(draw_curves, found, PANELS, metric, f"{study.base.experiment_name}: {title}")
    return Report(title, rows, shown, notes, {"workers.png": lambda path: draw(path=path)})
