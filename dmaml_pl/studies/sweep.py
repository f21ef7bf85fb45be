"""The sweep: the best setting of each number of workers, so that each is compared at its own best."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from dmaml_pl.studies.plan import Point, label_of
from dmaml_pl.studies.plots import COLOURS, new_figure, plot_curves, without_frame
from dmaml_pl.studies.report import COMPUTED, SMOOTHED, Columns, Report, number, publish
from dmaml_pl.studies.results import deviation, final
from dmaml_pl.studies.search import Options, Search, Trial
from dmaml_pl.studies.settings_files import Settings, as_settings
from dmaml_pl.studies.space import corners
from dmaml_pl.studies.study import Study

PLOTTED = ("run", "meta_iterations", "tasks_seen")
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
    settings = [as_settings(values) for values in corners(options.space)]
    most = max(options.workers)
    points = [Point(f"{label_of(most)}, {_shown(corner)}", most, corner) for corner in settings]
    points += [Point(label_of(count), count, settings[0]) for count in options.workers if count != most]
    study.check(points)
    with study.open(
        {
            "workers": " ".join(map(str, options.workers)),
            "trials": options.trials,
            "seeds": study.request.seeds,
            "target": options.target,
            **{f"space.{name}": distribution for name, distribution in options.space.items()},
        }
    ):
        for turn in range(1, options.trials + 1):
            asked = [(search, *search.ask(turn)) for search in searches]
            trainings = [training for _, _, point in asked for training in study.seeds(point)]
            what = f"trial {turn} of {options.trials}: "
            children = iter(study.train(trainings, divergence_counts=True, what=what))
            for search, trial, _ in asked:
                search.tell(trial, [next(children) for _ in range(study.request.seeds)])
        found = [search for search in searches if search.best is not None]
        if found:
            publish(study, report(study, found), [t.group for s in found for t in s.trials if t.group is not None])


def _shown(settings: Settings) -> str:
    return " ".join(f"{name}={value}" for name, value in settings)


def _row(search: Search, trial: Trial, target: float) -> dict[str, object]:
    """A row of a table on a trial; empty where it did not finish."""
    group, metric = trial.group, search.study.base.metric
    finals = {} if group is None else group.summary(metric)
    return {
        "workers": search.workers,
        "trial": trial.number,
        "score": trial.scores.mean(),
        "score_sd": deviation(trial.scores),
        f"final {metric}": finals.get(f"final {metric}", math.nan),
        "sd": finals.get("sd", math.nan),
        **({} if group is None else group.cost(target)),
        **trial.values,
    }


def report(study: Study, searches: Sequence[Search]) -> Report:
    """Make the table of best settings, and the plots.

    Args:
        study: what was studied.
        searches: those with a best trial.
    """
    metric, options, base = study.base.metric, searches[0].options, study.base
    best = [(search, trial, trial.group) for search in searches if (trial := search.best) and trial.group]
    target = final(best[0][2].mean["metric"]) if options.target is None else options.target
    objective = f"final {metric}" if options.target is None else f"{COSTS[options.count]} to {number(target)}"
    table = pd.DataFrame([_row(search, trial, target) for search, trial, _ in best])
    tried = [f"{trial.number} of {len(search.trials)}" for search, trial, _ in best]
    shown: Columns = {
        "workers": "workers",
        "best trial": "best trial",
        f"objective: {objective}": ("score", "score_sd"),
        **({} if options.target is None else {f"final {metric}": (f"final {metric}", "sd")}),
        **{f"{name} to {number(target)}": f"{axis}_to_target" for axis, name in COSTS.items()},
        **{name: name for name in options.space},
    }
    whose = f"what the best setting of {best[0][0].label} ends with" if options.target is None else "the target"
    notes = [
        SMOOTHED,
        COMPUTED,
        f"{number(target)} is {whose}. The columns after the objective are of the mean over the seeds.",
        "The best of many trials is partly luck: train it with other seeds before believing in a small difference.",
    ]
    for search, trial, _ in best:
        settings = [f"--{name}={value}" for name, value in as_settings(trial.values)]
        files = [word for config in study.request.configs for word in ("--config", config)]
        words = ["dmaml", "fit", *files, *study.request.words, "--trainer.devices", str(search.workers), *settings]
        notes.append(f"Best of {search.label}: `{shlex.join(words)}`")
        if important := search.importance():
            told = ", ".join(f"{name} {part:.2f}" for name, part in important.items())
            notes.append(f"Importance of the settings for {search.label}, by Optuna: {told}.")
    title = f"{base.experiment_name}: {metric} at the best setting"
    return Report(
        f"Best settings by number of workers, for {objective}",
        table.assign(**{"best trial": tried, "target": target}),
        shown,
        notes,
        {
            "best.png": partial(plot_curves, [group for _, _, group in best], PLOTTED, metric, title),
            "search.png": partial(_plot_search, searches, objective, f"{base.experiment_name}: the search"),
        },
        {"trials.csv": pd.DataFrame([_row(search, trial, target) for search in searches for trial in search.trials])},
    )


def _plot_search(searches: Sequence[Search], objective: str, title: str, path: Path) -> None:
    """Plot the score of each trial, and the best so far."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    for place, search in enumerate(searches):
        colour = COLOURS[place % len(COLOURS)]
        scores = pd.Series({trial.number: trial.scores.mean() for trial in search.trials})
        scores = scores[np.isfinite(scores)]
        best = scores.cummax() if search.upwards else scores.cummin()
        axes.scatter(scores.index, scores, color=colour, s=14, alpha=0.6)
        axes.step(best.index, best, color=colour, where="post", label=search.label)
    axes.set_xlabel("trial")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel(f"{objective}, mean over seeds")
    axes.set_title(f"{title} (lines: best so far)", fontsize=10)
    axes.legend(frameon=False)
    without_frame(axes)
    figure.savefig(path)
