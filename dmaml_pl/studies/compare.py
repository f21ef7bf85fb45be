"""`dmaml compare`: what trainings have in common, how they differ, and what came of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dmaml_pl.console.options import Options
from dmaml_pl.errors import ConfigError, TrackingError
from dmaml_pl.tracking.mlflow_run import CHANGED_PARAMS
from dmaml_pl.tracking.store import Store
from dmaml_pl.tracking.sync import settle

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

OVER = {"runs": "run", "tasks": "tasks_seen", "seconds": "wall_seconds"}
"""What curves may be plotted over, by its name in the command."""
_ID = re.compile(r"[0-9a-f]{4,32}")
_METRICS = re.compile(r"^(?:val|test)/(?!.*_step_)")
_PLACES = ("trainer.logger", "checkpoint.dirpath", "report.folder", "predictions.file")
"""Settings that say where something is put, not how was trained."""

_ENV_STEPS = "train/env_steps"
_TAGS = {"dmaml.engine": "engine", "mlflow.source.git.commit": "git commit"}


def main(words: list[str]) -> int:
    """Compare trainings; returns the exit code.

    Args:
        words: the command line after `dmaml compare`.

    Raises:
        DmamlError: they cannot be compared as asked.
    """
    parser = Options(
        "dmaml compare",
        description="Print the settings in which trainings differ beside what came of them, and plot their curves.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="name or id of an MLflow run, or the beginning of an id (4 characters)")
    add("--metric", help="what is plotted, such as val/accuracy (default: the metric of validation that all have)")
    add(
        "--over",
        nargs="+",
        choices=list(OVER),
        default=list(OVER),
        help="what over, a panel each (default: all; in environments, tasks are steps in these)",
    )
    add("--output", type=Path, default=Path("comparison.png"), metavar="FILE", help="PNG (default: comparison.png)")
    add("--save_dir", default="mlruns", help="folder of the store (default: mlruns)")
    add("--tracking_uri", help="of another store (default: MLFLOW_TRACKING_URI, or the one in --save_dir)")
    given = parser.parse_args(words)
    if given.output.suffix != ".png":
        raise ConfigError(f"--output is {given.output}, but must be a .png file.")
    if not given.output.parent.is_dir():
        raise ConfigError(f"--output is {given.output}, but there is no folder {given.output.parent}.")
    store = Store.find(given.tracking_uri, given.save_dir)
    if store.file is not None and not store.file.is_file():
        raise TrackingError(
            f"There is no tracking store in {given.save_dir} yet: `dmaml fit --config <file>` makes one. Or set "
            "--save_dir to the folder of another, or --tracking_uri."
        )
    if store.file is not None:
        settle(Path(given.save_dir))
    client = store.connect()
    trainings = _named(client, given.runs)
    print(_table(trainings))
    plotted = _plot(client, trainings, given.metric, [OVER[each] for each in given.over], given.output)
    print(f"\nCurves of {plotted}: {given.output}")
    return 0


def _named(client: MlflowClient, wanted: Sequence[str]) -> dict[str, Run]:
    """The MLflow runs meant, in the order asked for, by name, with as much of the id as tells them apart."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    everything = client.search_runs(experiments, max_results=50_000, order_by=["attributes.start_time DESC"])
    runs: dict[str, Run] = {}
    for text in wanted:
        named = [run for run in everything if run.info.run_name == text]
        several = named or [run for run in everything if _ID.fullmatch(text) and run.info.run_id.startswith(text)]
        if not several:
            known = "; ".join(f"{run.info.run_id[:8]} ({run.info.run_name})" for run in everything[:3])
            raise ConfigError(
                f"There is no MLflow run {text!r} in this store: give a name, or the beginning of an id. "
                + (f"The newest: {known}." if known else "It holds none yet.")
            )
        if len(several) > 1:
            ids = ", ".join(run.info.run_id[:12] for run in several[:5])
            raise ConfigError(f"{text!r} could be {len(several)} MLflow runs: give the beginning of an id ({ids}).")
        if several[0].info.run_id in runs:
            raise ConfigError(f"{text!r} is given twice.")
        runs[several[0].info.run_id] = several[0]
    names = [run.info.run_name for run in runs.values()]
    return {
        run.info.run_name if names.count(run.info.run_name) == 1 else f"{run.info.run_name} ({run_id[:8]})": run
        for run_id, run in runs.items()
    }


def _table(trainings: Mapping[str, Run]) -> str:
    """What differs, and the metrics, as a Markdown table with a column for each training."""
    import pandas as pd  # noqa: PLC0415 - after the help was asked for

    from dmaml_pl.console.tables import NOTHING, markdown  # noqa: PLC0415 - after the help was asked for
    from dmaml_pl.studies.report import number  # noqa: PLC0415 - after the help was asked for

    def frame(read: Callable[[Run], dict[str, str]]) -> pd.DataFrame:
        return pd.DataFrame({label: pd.Series(read(run), dtype=object) for label, run in trainings.items()})

    about = frame(
        lambda run: {
            "status": run.info.status,
            "runs": number(run.data.metrics.get("train/run")),
            "tasks seen": number(run.data.metrics.get("train/tasks_seen")),
            **({"env steps": number(run.data.metrics[_ENV_STEPS])} if _ENV_STEPS in run.data.metrics else {}),
            **{name: run.data.tags[tag][:12] for tag, name in _TAGS.items() if tag in run.data.tags},
        }
    )
    metrics = frame(lambda run: {name: number(last) for name, last in run.data.metrics.items() if _METRICS.match(name)})

    def latest(run: Run) -> dict[str, str]:
        """The parameters, and in place of a resumed training's first ones those that it went on with."""
        return {**run.data.params, **json.loads(run.data.tags.get(CHANGED_PARAMS, "{}"))}

    settings = frame(lambda run: {name: of for name, of in latest(run).items() if not name.startswith(_PLACES)})
    if len(trainings) > 1:
        settings = settings[settings.nunique(axis=1, dropna=False) > 1]
    lines = pd.concat([about, metrics.sort_index(), settings.sort_index()]).fillna(NOTHING)
    return markdown(lines.rename_axis("").reset_index().to_dict("records"))


def _plot(
    client: MlflowClient, trainings: Mapping[str, Run], metric: str | None, axes: Sequence[str], path: Path
) -> str:
    """Plot a metric of all trainings over the axes; returns the metric's name."""
    from dmaml_pl.studies.plots import plot_curves  # noqa: PLC0415 - after the help was asked for
    from dmaml_pl.studies.results import RUN_METRICS, Group, curve_of, placed_on  # noqa: PLC0415 - after the help was asked for

    common = set.intersection(*(set(run.data.metrics) for run in trainings.values()))
    shared = sorted(name for name in common if _METRICS.match(name) and re.match("val/(?!.*_ci95)", name))
    chosen = metric or next((name for name in shared if name != "val/loss"), next(iter(shared), None))
    if chosen is None or chosen not in common:
        raise ConfigError(
            f"--metric is {metric}, which not all of these trainings have: choose one of {', '.join(shared) or 'none'}."
            if metric
            else "These trainings have no metric of validation in common: set --metric to one that all have."
        )

    def history(run: Run, name: str) -> dict[int, float]:
        return {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, name)}

    groups = []
    for label, run in trainings.items():
        runs = {name: history(run, name) for name in RUN_METRICS}
        if not runs["train/run_seconds"]:
            raise ConfigError(f"{label} has no finished run of a training: leave it out.")
        curve = curve_of(label, 0, history(run, chosen), runs, communicates=bool(runs["merge/seconds"]))
        groups.append(Group(label, (curve,), "min"))
    try:
        plot_curves(groups, placed_on(groups, axes), chosen, chosen, path)
    except OSError as error:
        raise TrackingError(f"--output {path} cannot be written: {error.strerror}.") from error
    return chosen
