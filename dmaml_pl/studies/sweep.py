"""The sweep: the best setting of each number of workers, so that each is judged at its own best."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dmaml_pl.studies.figures import COLOURS, draw_curves, new_figure, plain
from dmaml_pl.studies.plan import Point
from dmaml_pl.studies.report import COMPUTED, SMOOTHED, Report, publish
from dmaml_pl.studies.results import Group, final, spread
from dmaml_pl.studies.search import Options, Search
from dmaml_pl.studies.space import Space
from dmaml_pl.studies.study import Study
from dmaml_pl.studies.tables import number, with_spread

PANELS = (
    ("run", "runs"),
    ("meta_iterations", "meta-iterations of a worker"),
    ("tasks_seen", "tasks seen by all workers"),
)
COSTS = {
    "run": "runs",
    "meta_iterations": "meta-iterations",
    "tasks_seen": "tasks",
    "wall_seconds": "measured s",
    "computed_wall_seconds": "computed s",
}
"""The axes on which the table says what it took to reach the target, and their names."""


def conduct(study: Study, options: Options) -> None:
    """Search, for each number of workers.

    Args:
        study: checked, but not open.
        options: how.
    """
    searches = [Search(count, study, options) for count in options.workers]
    corners = [Space.settings(values) for values in options.space.corners()]
    most = max(options.workers)
    points = [Point(f"{most} workers, {_shown(corner)}", most, corner) for corner in corners]
    points += [Point(f"{count} workers", count, corners[0]) for count in options.workers if count != most]
    study.check(points)
    with study.open(
        {
            "workers": " ".join(map(str, options.workers)),
            "trials": options.trials,
            "seeds": study.request.seeds,
            "target": options.target,
            **{f"space.{name}": dimension for name, dimension in options.space.dimensions.items()},
        }
    ):
        for turn in range(options.trials):
            asked = [(search, *search.ask()) for search in searches]
            trainings = [training for _, _, point in asked for training in study.seeds(point)]
            children = iter(
                study.train(trainings, divergence_counts=True, what=f"trial {turn + 1} of {options.trials}: ")
            )
            for search, trial, _ in asked:
                search.tell(trial, [next(children) for _ in range(study.request.seeds)])
        found = [search for search in searches if search.best is not None]
        if found:
            publish(study, report(study, found), [t.group for s in found for t in s.trials if t.group is not None])


def _shown(settings: Sequence[tuple[str, str]]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings)


def _trials(searches: Sequence[Search], target: float) -> list[dict[str, Any]]:
    def reached(group: Group | None) -> dict[str, Any]:
        found = {} if group is None else group.cost(target)
        return {f"{axis}_to_target": found.get(axis) for axis in COSTS}

    return [
        {
            "workers": search.workers,
            "trial": trial.number,
            "score": trial.score,
            "sd": spread(trial.scores),
            f"final {search.study.base.metric}": float(trial.group.final.mean()) if trial.group else math.nan,
            **reached(trial.group),
            **trial.values,
        }
        for search in searches
        for trial in search.trials
    ]


def report(study: Study, searches: Sequence[Search]) -> Report:
    """The table of best settings, and the figures.

    Args:
        study: what was studied.
        searches: those with a best trial.
    """
    metric, options = study.base.metric, searches[0].options
    best = [(search, trial, trial.group) for search in searches if (trial := search.best) and trial.group]
    target = final(best[0][2].mean) if options.target is None else options.target
    objective = f"final {metric}" if options.target is None else f"{COSTS[options.count]} to {number(target)}"
    rows, shown, notes = [], [], []
    for search, trial, group in best:
        reached = group.cost(target)
        rows.append(
            {
                "workers": search.workers,
                "trial": trial.number,
                "trials": len(search.trials),
                "score": trial.score,
                "score_sd": spread(trial.scores),
                f"final {metric}": float(group.final.mean()),
                "sd": spread(group.final),
                "target": target,
                **{f"{axis}_to_target": reached.get(axis) for axis in COSTS},
                **trial.values,
            }
        )
        shown.append(
            {
                "workers": str(search.workers),
                "best trial": f"{trial.number} of {len(search.trials)}",
                f"objective: {objective}": with_spread(trial.scores),
                **({} if options.target is None else {f"final {metric}": with_spread(group.final)}),
                **{f"{name} to {number(target)}": number(reached.get(axis)) for axis, name in COSTS.items()},
                **{name: _brief(value) for name, value in trial.values.items()},
            }
        )
        settings = [f"--{name}={value}" for name, value in Space.settings(trial.values)]
        files = [word for config in study.request.configs for word in ("--config", config)]
        own = ["dmaml", "fit", *files, *study.request.words, "--trainer.devices", str(search.workers), *settings]
        notes.append(f"Best of {search.label}: `{shlex.join(own)}`")
        if important := search.importance():
            told = ", ".join(f"{name} {part:.2f}" for name, part in important.items())
            notes.append(f"Importance of the settings for {search.label}, by Optuna: {told}.")
    whose = f"what the best setting of {best[0][0].label} ends with" if options.target is None else "the target"
    notes[:0] = [
        SMOOTHED,
        COMPUTED,
        f"{number(target)} is {whose}. The columns after the objective are of the mean over the seeds.",
        "The best of many trials is partly luck: train it with other seeds before believing in a small difference.",
    ]
    title = f"Best settings by number of workers, for {objective}"
    groups = [Group(search.label, group.curves, group.better) for search, _, group in best]
    curves = partial(draw_curves, groups, PANELS, metric, f"{study.base.experiment_name}: {metric} at the best setting")
    search_figure = partial(_draw_search, searches, objective, f"{study.base.experiment_name}: the search")
    return Report(
        title,
        rows,
        shown,
        notes,
        {"best.png": lambda path: curves(path=path), "search.png": lambda path: search_figure(path=path)},
        {"trials.csv": _trials(searches, target)},
    )


def _brief(value: Any) -> str:
    return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _draw_search(searches: Sequence[Search], objective: str, title: str, path: Path) -> None:
    """The score of each trial, and the best so far."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    for place, search in enumerate(searches):
        colour = COLOURS[place % len(COLOURS)]
        scored = [trial for trial in search.trials if math.isfinite(trial.score)]
        numbers, scores = [trial.number for trial in scored], [trial.score for trial in scored]
        best = np.maximum.accumulate(scores) if search.upwards else np.minimum.accumulate(scores)
        axes.scatter(numbers, scores, color=colour, s=14, alpha=0.6)
        axes.step(numbers, best, color=colour, where="post", label=search.label)
    axes.set_xlabel("trial")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel(f"{objective}, mean over seeds")
    axes.set_title(f"{title} (lines: best so far)", fontsize=10)
    axes.legend(frameon=False)
    plain(axes)
    figure.savefig(path)
