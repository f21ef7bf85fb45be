"""What a study leaves behind: a table, the raw curves and a figure, in its folder and with its MLflow run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmaml_pl.studies.results import Group
from dmaml_pl.studies.study import Study
from dmaml_pl.studies.tables import markdown, write_csv

SMOOTHED = (
    "The final metric is the mean of the last tenth of a training's validations; ± is one standard deviation over "
    "seeds."
)
COMPUTED = (
    "*Computed* wall times are those that one machine per worker would need: in each run the seconds that the slowest "
    "worker was on a core, and the measured merge. *Measured* ones are of this machine. Neither holds start-up or "
    "validation."
)


@dataclass(frozen=True)
class Report:
    """The outcome of a study.

    Attributes:
        title: of the table.
        rows: of `table.csv`.
        shown: the same for people, by heading.
        notes: what a reader of the numbers must know.
        draw: draws a figure into a file, by the file's name.
        further: rows of other tables, by the file's name.
    """

    title: str
    rows: Sequence[Mapping[str, Any]]
    shown: Sequence[Mapping[str, str]]
    notes: Sequence[str]
    draw: Mapping[str, Callable[[Path], None]]
    further: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def publish(study: Study, report: Report, groups: Sequence[Group]) -> None:
    """Write everything, keep it in MLflow, and print the table."""
    raw = [row for group in groups for curve in group.curves for row in curve.rows()]
    tables = {"table.csv": report.rows, "curves.csv": raw, **report.further}
    for name, rows in tables.items():
        write_csv(study.output / name, rows)
    notes = list(dict.fromkeys([*report.notes, *_notes(study, groups)]))
    text = "\n".join(
        [
            f"# {report.title}",
            "",
            f"`{shlex.join(['dmaml', *sys.argv[1:]])}`"
            if sys.argv[1:2] == ["study"]
            else f"Study {study.request.name}",
            "",
            markdown(report.shown),
            "",
            *(f"- {note}" for note in notes),
            "",
        ]
    )
    (study.output / "table.md").write_text(text, encoding="utf-8")
    for name, draw in report.draw.items():
        draw(study.output / name)
    for name in (*tables, "table.md", *report.draw):
        study.ledger.parent.log_file(study.output / name)
    print(f"\n{report.title}\n\n{markdown(report.shown)}\n", *(f"- {note}" for note in notes), sep="\n")
    print(f"\nResults: {study.output}\nMLflow:  {study.ui_command()}", flush=True)


def _notes(study: Study, groups: Sequence[Group]) -> list[str]:
    notes = []
    if study.request.kind != "sweep":  # which tells no wall times
        notes += [note for group in groups for curve in group.curves for note in curve.notes]
    if study.request.kind != "sweep" and study.request.jobs > 1:
        notes.append(f"{study.request.jobs} trainings ran at the same time: measured wall times are not comparable.")
    if study.failed:
        notes.append(f"Not in the table, as they failed: {'; '.join(child.training.label for child in study.failed)}.")
    return notes
