"""`dmaml compare`: what trainings have in common, how they differ, and what came of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmaml_pl.console.options import Options
from dmaml_pl.errors import ConfigError, DmamlError, TrackingError
from dmaml_pl.tracking.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

INTERRUPTED = 130

PANELS = (
    ("run", "runs"),
    ("tasks_seen", "tasks seen by all workers"),
    ("wall_seconds", "seconds of training"),
)
_ID = re.compile(r"[0-9a-f]{4,32}")
_FIGURES = re.compile(r"^(?:val|test)/(?!.*_step_)")
_PLACES = ("trainer.logger", "checkpoint.dirpath", "report.folder", "predictions.file")
"""Settings that say where something is put, not how was trained."""

_TAGS = {"dmaml.engine": "engine", "mlflow.source.git.commit": "git commit"}


@dataclass(frozen=True)
class Compared:
    """A training to compare.

    Attributes:
        label: its name, with as much of its id as tells it from the others.
        run: as MLflow knows it.
    """

    label: str
    run: Run

    @property
    def params(self) -> dict[str, str]:
        """The settings it was made with."""
        return {name: value for name, value in self.run.data.params.items() if not name.startswith(_PLACES)}

    @property
    def figures(self) -> dict[str, float]:
        """The last values of the metrics of validation and test."""
        return {name: value for name, value in self.run.data.metrics.items() if _FIGURES.match(name)}


def main(words: list[str]) -> int:
    """Compare trainings; returns the exit code.

    Args:
        words: the command line after `dmaml compare`.
    """
    parser = Options(
        "dmaml compare",
        description="Print the settings in which trainings differ beside what came of them, and draw their curves.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="name or id of an MLflow run, or the beginning of an id (4 characters)")
    add("--metric", help="what is drawn, such as val/accuracy (default: the metric of validation that all have)")
    add("--output", type=Path, default=Path("comparison.png"), metavar="FILE", help="PNG (default: comparison.png)")
    add("--save_dir", default="mlruns", help="folder of the store (default: mlruns)")
    add("--tracking_uri", help="of another store (default: MLFLOW_TRACKING_URI, or the one in --save_dir)")
    try:
        given = parser.parse_args(words)
        if given.output.suffix != ".png":
            raise ConfigError(f"--output is {given.output}, but must be a .png file.")
        if not given.output.parent.is_dir():
            raise ConfigError(f"--output is {given.output}, but there is no folder {given.output.parent}.")
        client = _client(given.tracking_uri, given.save_dir)
        trainings = _found(client, given.runs)
        print(table(trainings))
        drawn = draw(client, trainings, given.metric, given.output)
        print(f"\nCurves of {drawn}: {given.output}")
    except KeyboardInterrupt:
        return INTERRUPTED
    except DmamlError as error:
        print(f"dmaml: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _client(tracking_uri: str | None, save_dir: str) -> MlflowClient:
    store = Store.find(tracking_uri, save_dir)
    if store.file is not None and not store.file.is_file():
        raise TrackingError(
            f"There is no tracking store in {save_dir} yet: `dmaml fit --config <file>` makes one. Or set --save_dir "
            "to the folder of another, or --tracking_uri."
        )
    return store.connect()


def _found(client: MlflowClient, wanted: Sequence[str]) -> list[Compared]:
    """The MLflow runs meant, in the order asked for.

    Raises:
        ConfigError: one is not there, is meant twice, or could be several.
    """
    everything = [
        run
        for experiment in client.search_experiments()
        for run in client.search_runs([experiment.experiment_id], max_results=50_000)
    ]
    runs: list[Run] = []
    for text in wanted:
        named = [run for run in everything if run.info.run_name == text]
        begun = [run for run in everything if _ID.fullmatch(text) and run.info.run_id.startswith(text)]
        several = named or begun
        if not several:
            newest = sorted(everything, key=lambda run: -run.info.start_time)[:3]
            known = "; ".join(f"{run.info.run_id[:8]} ({run.info.run_name})" for run in newest)
            raise ConfigError(
                f"There is no MLflow run {text!r} in this store: give a name, or the beginning of an id. "
                + (f"The newest: {known}." if newest else "It holds none yet.")
            )
        if len(several) > 1:
            ids = ", ".join(run.info.run_id[:12] for run in several[:5])
            raise ConfigError(f"{text!r} could be {len(several)} MLflow runs: give the beginning of an id ({ids}).")
        if several[0].info.run_id in (run.info.run_id for run in runs):
            raise ConfigError(f"{text!r} is given twice.")
        runs += several
    names = [run.info.run_name for run in runs]
    return [Compared(run.info.run_name if names.count(run.info.run_name) == 1 else _with_id(run), run) for run in runs]


def _with_id(run: Run) -> str:
    return f"{run.info.run_name} ({run.info.run_id[:8]})"


def table(trainings: Sequence[Compared]) -> str:
    """What differs, and the figures, as a Markdown table with a column for each training."""
    from dmaml_pl.studies.tables import NOTHING, markdown, number  # noqa: PLC0415 - after the help was asked for

    def rows(values: Sequence[Mapping[str, str]], *, differing: bool) -> list[dict[str, str]]:
        names = dict.fromkeys(name for one in values for name in one)
        return [
            {"": name, **{t.label: one.get(name, NOTHING) for t, one in zip(trainings, values, strict=True)}}
            for name in names
            if not differing or len({one.get(name) for one in values}) > 1
        ]

    figures = [{name: number(value) for name, value in sorted(t.figures.items())} for t in trainings]
    about = [
        {
            "status": t.run.info.status,
            "runs": number(t.run.data.metrics.get("train/run")),
            "tasks seen": number(t.run.data.metrics.get("train/tasks_seen")),
            **{name: t.run.data.tags[tag][:12] for tag, name in _TAGS.items() if tag in t.run.data.tags},
        }
        for t in trainings
    ]
    settings = [dict(sorted(t.params.items())) for t in trainings]
    lines = [*rows(about, differing=False), *rows(figures, differing=False)]
    differing = rows(settings, differing=len(trainings) > 1)
    return markdown([*lines, *differing])


def draw(client: MlflowClient, trainings: Sequence[Compared], metric: str | None, path: Path) -> str:
    """Draw a metric of all trainings over runs, tasks and time; returns the metric's name.

    Raises:
        ConfigError: they have no such metric in common.
        TrackingError: the file cannot be written.
    """
    from dmaml_pl.studies.figures import draw_curves  # noqa: PLC0415 - after the help was asked for
    from dmaml_pl.studies.results import RUN_METRICS, Group, curve_of  # noqa: PLC0415 - after the help was asked for

    common = set.intersection(*(set(t.run.data.metrics) for t in trainings))
    judged = sorted(name for name in common if name.startswith("val/") and _FIGURES.match(name) and "_ci95" not in name)
    chosen = metric or next((name for name in judged if name != "val/loss"), next(iter(judged), None))
    if chosen is None or chosen not in common:
        raise ConfigError(
            f"--metric is {metric}, which not all of these trainings have: choose one of {', '.join(judged) or 'none'}."
            if metric
            else "These trainings have no metric of validation in common: set --metric to one that all have."
        )

    def history(run: Run, name: str) -> dict[int, float]:
        return {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, name)}

    groups = []
    for training in trainings:
        runs = {name: history(training.run, name) for name in RUN_METRICS}
        values = history(training.run, chosen)
        if not runs["train/run_seconds"]:
            raise ConfigError(f"{training.label} has no finished run of a training: leave it out.")
        curve = curve_of(training.label, 0, values, runs, communicates=bool(runs["merge/seconds"]))
        groups.append(Group(training.label, (curve,), "min"))
    try:
        draw_curves(groups, PANELS, chosen, chosen, path)
    except OSError as error:
        raise TrackingError(f"--output {path} cannot be written: {error.strerror}.") from error
    return chosen
