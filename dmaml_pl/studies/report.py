"""What a study leaves behind: a table, the raw curves and plots, in its folder and with its MLflow run."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dmaml_pl.console.tables import NOTHING, markdown
from dmaml_pl.studies.results import Group
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

_PAGE = """\
# {title}

`{command}`

{table}

{notes}
"""


@dataclass(frozen=True)
class Report:
    """The outcome of a study.

    Attributes:
        title: of the table.
        table: of `table.csv`.
        shown: what of it people see.
        notes: what a reader of the numbers must know.
        plots: write a plot to a file, by the file's name.
        further: other tables, by the file's name.
    """

    title: str
    table: pd.DataFrame
    shown: Columns
    notes: Sequence[str]
    plots: Mapping[str, Callable[[Path], None]]
    further: Mapping[str, pd.DataFrame] = field(default_factory=dict)


def publish(study: Study, report: Report, groups: Sequence[Group]) -> None:
    """Write everything, keep it in MLflow, and print the table."""
    curves = [
        curve.validations.assign(point=curve.label, seed=curve.seed) for group in groups for curve in group.curves
    ]
    tables = {"table.csv": report.table, "curves.csv": pd.concat(curves).set_index(["point", "seed"]).reset_index()}
    tables |= report.further
    for name, table in tables.items():
        table.to_csv(study.output / name, index=False)
    shown = markdown(as_shown(report.table, report.shown))
    notes = "\n".join(f"- {note}" for note in [*report.notes, *_notes(study)])
    given = shlex.join(["dmaml", *sys.argv[1:]]) if sys.argv[1:2] == ["study"] else f"Study {study.request.name}"
    page = _PAGE.format(title=report.title, command=given, table=shown, notes=notes)
    (study.output / "table.md").write_text(page, encoding="utf-8")
    for name, plot in report.plots.items():
        plot(study.output / name)
    for name in (*tables, "table.md", *report.plots):
        study.ledger.parent.log_file(study.output / name)
    print(f"\n{report.title}\n\n{shown}\n\n{notes}")
    print(f"\nResults: {study.output}\nMLflow:  {study.ui_command()}", flush=True)


def _notes(study: Study) -> list[str]:
    notes = []
    if study.request.jobs > 1:
        notes.append(f"{study.request.jobs} trainings ran at the same time: measured wall times are not comparable.")
    if study.failed:
        notes.append(f"Not in the table, as they failed: {'; '.join(child.training.label for child in study.failed)}.")
    return notes


def as_shown(table: pd.DataFrame, columns: Columns) -> list[dict[str, str]]:
    """The rows of a table as people see them.

    Args:
        table: of numbers and texts.
        columns: those that are shown.
    """
    return [
        {
            heading: _cell(name, row[name]) if isinstance(name, str) else with_spread(row[name[0]], row[name[1]])
            for heading, name in columns.items()
        }
        for row in table.to_dict("records")
    ]


def _cell(name: str, value: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    return f"{value:.2f}" if name.startswith("times_") and math.isfinite(value) else number(value)


def number(value: float | None) -> str:
    """Four significant digits; whole numbers in full."""
    if value is None or math.isnan(value):
        return NOTHING
    if abs(value) < 1e15 and (float(value).is_integer() or abs(value) >= 1000):
        return f"{value:.0f}"
    return f"{value:.4g}"


def with_spread(mean: float, deviation: float) -> str:
    """Mean ± standard deviation over the seeds; the mean alone where there is none."""
    return number(mean) if math.isnan(deviation) else f"{number(mean)} ± {deviation:.2g}"
