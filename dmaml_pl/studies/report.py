"""What a study leaves behind: a table, the raw curves and plots, in its folder and with its MLflow run."""

import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dmaml_pl.console.tables import NOTHING, markdown
from dmaml_pl.errors import redact
from dmaml_pl.studies.plan import Point
from dmaml_pl.studies.results import Group, groups
from dmaml_pl.studies.study import Study

SMOOTHED = (
    "The final metric is the mean of the last tenth of a training's validations; ± is one standard deviation over "
    "seeds."
)
COMPUTED = (
    "*Computed* wall times are those that one machine per worker would need: in each run the seconds that the slowest "
    "worker was on a core, and the measured merge. *Measured* ones are of this machine. Neither holds start-up or "
    "validation."
)

Columns = Mapping[str, str | tuple[str, str]]
"""What people see of a table: by heading a column, or a mean's column and that of its standard deviation."""


@dataclass(frozen=True)
class Report:
    """The outcome of a study.

    Attributes:
        title: of the table.
        tables: by the file's name.
        shown: what people see of `table.csv`.
        notes: what a reader of the numbers must know.
        plots: write a plot to a file, by the file's name.
    """

    title: str
    tables: Mapping[str, pd.DataFrame]
    shown: Columns
    notes: Sequence[str]
    plots: Mapping[str, Callable[[Path], None]]


def compare_points(
    study: Study, points: Sequence[Point], options: dict[str, Any], report: Callable[[dict[Point, Group]], Report]
) -> None:
    """Train all points of a study, and publish the report on those that finished; the options are logged."""
    study.check(points)
    with study.open({**options, "seeds": study.request.seeds}):
        found = groups(study, study.train(study.trainings(points)))
        if found:
            publish(study, report(found), [*found.values()])


def publish(study: Study, report: Report, compared: Sequence[Group]) -> None:
    """Write everything, the curves of what is compared by them, too; keep it in MLflow, and print the table."""
    curves = [
        curve.validations.assign(point=curve.label, seed=curve.seed) for group in compared for curve in group.curves
    ]
    tables = dict(report.tables)
    if curves:
        tables["curves.csv"] = pd.concat(curves).set_index(["point", "seed"]).reset_index()
    for name, table in tables.items():
        table.to_csv(study.folder / name, index=False)
    notes, jobs = list(report.notes), study.request.jobs
    if jobs != 1:
        notes.append(f"{jobs or 'All'} trainings ran at the same time: measured wall times are not comparable.")
    if study.failed:
        notes.append(f"Not in the table, as they failed: {'; '.join(child.training.label for child in study.failed)}.")
    shown = "\n\n".join(
        [markdown(as_shown(report.tables["table.csv"], report.shown)), "\n".join(f"- {note}" for note in notes)]
    )
    words = redact(shlex.join(["dmaml", *sys.argv[1:]]))
    given = words if sys.argv[1:2] == ["study"] else f"Study {study.request.name}"
    (study.folder / "table.md").write_text(f"# {report.title}\n\n`{given}`\n\n{shown}\n", encoding="utf-8")
    for name, plot in report.plots.items():
        plot(study.folder / name)
    parent = study.ledger.parent
    for name in (*tables, "table.md", *report.plots):
        parent.log_file(study.folder / name)
    ui = study.base.store.ui_command(study.base.save_dir, f"#/experiments/{parent.experiment_id}/runs/{parent.run_id}")
    print(f"\n{report.title}\n\n{shown}\n\nResults: {study.folder}\nMLflow:  {ui}", flush=True)


def as_shown(table: pd.DataFrame, columns: Columns) -> list[dict[str, str]]:
    """The rows of a table of numbers and texts as people see them."""
    return [{heading: _cell(row, name) for heading, name in columns.items()} for row in table.to_dict("records")]


def _cell(row: Mapping[Any, Any], name: str | tuple[str, str]) -> str:
    if not isinstance(name, str):  # the mean alone where there is no standard deviation over the seeds
        mean, deviation = (row[column] for column in name)
        return number(mean) if math.isnan(deviation) else f"{number(mean)} ± {deviation:.2g}"
    value = row[name]
    if isinstance(value, str):
        return value
    return f"{value:.2f}" if name.startswith("times_") and math.isfinite(value) else number(value)


def number(value: float | None) -> str:
    """Four significant digits; whole numbers in full."""
    if value is None or math.isnan(value):
        return NOTHING
    if abs(value) < 1e15 and (float(value).is_integer() or abs(value) >= 1000):
        return f"{value:.0f}"
    return f"{value:.4g}"
