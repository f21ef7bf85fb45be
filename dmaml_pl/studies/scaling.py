"""The study of scaling: what it costs and gains to see a factor of tasks more, through each knob in turn.

Figure 6 of Soulier's thesis (TH Koeln 2020), beside two ways that it recommends trying: meta-gradients averaged over
workers (parallel tasks), and all tasks at once in one process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dmaml_pl.studies.figures import Measured, draw_bars
from dmaml_pl.studies.plan import Point
from dmaml_pl.studies.report import COMPUTED, SMOOTHED, Report, publish
from dmaml_pl.studies.resolved import Resolved
from dmaml_pl.studies.results import Group, groups, spread
from dmaml_pl.studies.study import Study
from dmaml_pl.studies.tables import number, with_spread

IN_STEP = (
    "task_parallel communicates at every meta-iteration. Its computed wall time holds the merge at the end of a run "
    "only: it is a lower bound."
)
SAME_UPDATES = (
    "With one worker and the plain mean, a longer run and more runs are the same training: they differ in how often it "
    "is validated."
)


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
        by_seed = zip(*(study.seeds(point) for point in points), strict=True)
        found = groups(study, study.train([training for trainings in by_seed for training in trainings]))
        if found and found[0].label == points[0].label:
            publish(study, report(study, found, points, factor), found)


def knobs(base: Resolved, factor: int, workers: int) -> list[Point]:
    """The training to compare with, and one for each knob.

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


_STEPS = "trainer.max_steps"


def _task_parallel(base: Resolved) -> str:
    """The strategy that averages meta-gradients, with the settings that it shares with the configuration's."""
    shared = ("timeout", "process_group_backend", "start_method")
    given = {name: base.find(f"trainer.strategy.{name}") for name in shared if base.has(f"trainer.strategy.{name}")}
    settings = {"run_length": base.run_length, **given}
    return json.dumps({"class_path": "dmaml_pl.TaskParallelStrategy", "init_args": settings})


def report(study: Study, found: Sequence[Group], points: Sequence[Point], factor: int) -> Report:
    """The table and the figure.

    Args:
        study: what was studied.
        found: a group for each knob, the first for the training to compare with.
        points: all knobs.
        factor: of tasks.
    """
    metric, base = study.base.metric, found[0]
    workers = {point.label: point.workers for point in points}
    rows, shown = [], []
    for group in found:
        wall, computed, tasks = (group.total(axis) for axis in ("wall_seconds", "computed_wall_seconds", "tasks_seen"))
        ratio = {axis: _ratio(group, base, axis) for axis in ("tasks_seen", "wall_seconds", "computed_wall_seconds")}
        rows.append(
            {
                "knob": group.label,
                "workers": workers[group.label],
                "seeds": len(group.curves),
                "runs": float(group.total("run").mean()),
                "tasks_seen": float(tasks.mean()),
                "times_tasks": ratio["tasks_seen"],
                "wall_seconds": float(wall.mean()),
                "wall_seconds_sd": spread(wall),
                "times_wall": ratio["wall_seconds"],
                "computed_wall_seconds": float(computed.mean()),
                "computed_wall_seconds_sd": spread(computed),
                "times_computed_wall": ratio["computed_wall_seconds"],
                f"final {metric}": float(group.final.mean()),
                "sd": spread(group.final),
            }
        )
        shown.append(
            {
                "knob": group.label,
                "workers": str(workers[group.label]),
                "runs": number(float(group.total("run").mean())),
                "tasks seen": number(float(tasks.mean())),
                "x base ": f"{ratio['tasks_seen']:.2f}",
                "wall s measured": with_spread(wall),
                "x base  ": f"{ratio['wall_seconds']:.2f}",
                "wall s computed": with_spread(computed),
                "x base   ": f"{ratio['computed_wall_seconds']:.2f}",
                f"final {metric}": with_spread(group.final),
            }
        )
    title = f"{factor} times the tasks, through each knob in turn"
    notes = [SMOOTHED, COMPUTED, IN_STEP, *([SAME_UPDATES] if points[0].workers == 1 else [])]
    draw = partial(_draw, found, metric, f"{study.base.experiment_name}: {title}")
    return Report(title, rows, shown, notes, {"scaling.png": lambda path: draw(path=path)})


def _ratio(group: Group, base: Group, axis: str) -> float:
    return float(group.total(axis).mean() / base.total(axis).mean())


def _draw(found: Sequence[Group], metric: str, title: str, path: Path) -> None:
    wall = [
        Measured.of("measured here", [group.total("wall_seconds") for group in found]),
        Measured.of("computed, one machine per worker", [group.total("computed_wall_seconds") for group in found]),
    ]
    final = Measured.of(f"final {metric}", [group.final for group in found])
    draw_bars([group.label for group in found], ("wall time (s)", wall), final, title, path)
