"""A table of settings: the meta-test of each row's trainings, their time and memory, and the command of each row."""

import re
import shlex
from collections.abc import Mapping, Sequence

import pandas as pd

from dmaml_pl.errors import TrackingError
from dmaml_pl.studies.ledger import Child
from dmaml_pl.studies.plan import Point
from dmaml_pl.studies.report import Columns, Report, publish
from dmaml_pl.studies.results import RUN_METRICS, curve_of, deviation
from dmaml_pl.studies.settings_files import Settings
from dmaml_pl.studies.study import Study

NOTES = (
    "Meta-test of the best checkpoint by validation: mean over the seeds, ± one standard deviation over them.",
    "Training time is that of meta-iterations, compiling and merges; start-up and evaluation are not in it.",
    "Peak memory is what worker 0 needed beyond what it had before the first meta-iteration.",
)
_STEP = re.compile(r"test/([a-z]+)_step_(\d+)")


def conduct(study: Study, rows: Mapping[str, Settings], workers: int, steps: Sequence[int]) -> None:
    """Train each row with its own settings, and show its meta-test after each of some numbers of adaptation steps."""
    shown = (("model.evaluation_steps", str(max(*steps, 1))), ("meta_test", "true"))
    points = [Point(label, workers, (*shown, *settings)) for label, settings in rows.items()]
    study.check(points)
    with study.open({"steps": " ".join(map(str, steps)), "seeds": study.request.seeds}):
        children = [child for child in study.train(study.trainings(points)) if not child.error]
        made = {point: [child for child in children if child.training.point == point] for point in points}
        if children:
            publish(study, _report(study, {point: some for point, some in made.items() if some}, steps), [])


def _report(study: Study, made: Mapping[Point, Sequence[Child]], steps: Sequence[int]) -> Report:
    metric, rows = "", []
    for point, children in made.items():
        measured = [_measured(study, child, steps) for child in children]
        metric = measured[0][0]
        each = pd.DataFrame([row for _, row in measured])
        spread = deviation(each).add_suffix("_sd")
        rows.append({"row": point.label, "seeds": len(each), **each.mean(skipna=False), **spread})
    after = {f"{metric}, {step} step{'s' * (step != 1)}": (f"after_{step}", f"after_{step}_sd") for step in steps}
    shown: Columns = {
        "": "row",
        **after,
        "training s": ("wall_seconds", "wall_seconds_sd"),
        "peak memory MiB": "peak_memory_mib",
    }
    commands = [f"{point.label}: `{_command(study, point)}`" for point in made]
    title = f"Meta-test of {study.base.experiment_name}"
    return Report(title, {"table.csv": pd.DataFrame(rows)}, shown, [*NOTES, *commands], {})


def _measured(study: Study, child: Child, steps: Sequence[int]) -> tuple[str, dict[str, float]]:
    """The name of the metric, and what a training's meta-test, time and memory came to."""
    values = study.ledger.metrics(child)
    after = {int(match[2]): (match[1], values[name]) for name in values if (match := _STEP.fullmatch(name))}
    if not after:
        raise TrackingError(f"{child.training.label} has no meta-test in MLflow: leave meta_test at true.")
    runs = {name: study.ledger.history(child, name) for name in RUN_METRICS}
    several = child.training.point.workers > 1
    total = curve_of(child.training.label, child.training.seed, {}, runs, communicates=several).total
    most = max(after)  # where an algorithm makes none, more would change nothing
    row = {f"after_{step}": after[min(step, most)][1] for step in steps}
    row["wall_seconds"] = float(total["wall_seconds"])
    row["peak_memory_mib"] = values.get("train/peak_memory_mib", float("nan"))
    return after[most][0], row


def _command(study: Study, point: Point) -> str:
    """What makes the first of a row's trainings again."""
    own = (*point.overrides, ("seed_everything", str(study.base.seed)))
    return shlex.join(["dmaml", *study.request.command(own)])
