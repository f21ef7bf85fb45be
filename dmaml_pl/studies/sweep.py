"""The sweep: the best setting of each number of workers, so that each is compared at its own best."""

import shlex
import time
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dmaml_pl.studies.plan import Point, Training, label_of
from dmaml_pl.studies.plots import COLOURS, DPI, plot_curves
from dmaml_pl.studies.report import COMPUTED, SMOOTHED, Columns, Report, number, publish
from dmaml_pl.studies.results import Group, deviation, final, placed_on
from dmaml_pl.studies.search import Search, SearchSettings, Trial
from dmaml_pl.studies.settings_files import as_settings
from dmaml_pl.studies.space import corners
from dmaml_pl.studies.study import Study

PLOTTED = ("run", "meta_iterations", "tasks_seen")
LOOK_S = 2.0
"""Seconds between two looks whether the trials of others have ended."""

PATIENCE_S = 60.0
"""Seconds that another command may take to write down its results."""

COSTS = {
    "run": "runs",
    "meta_iterations": "meta-iterations",
    "tasks_seen": "tasks",
    "wall_seconds": "measured s",
    "computed_wall_seconds": "computed s",
}
"""The axes on which the table says what it took to reach the target, and their names."""


def conduct(study: Study, workers: Sequence[int], options: SearchSettings) -> None:
    """Search for each number of workers on its own, and compare the best."""
    searches = [Search(count, study, options) for count in workers]
    settings = [as_settings(values) for values in corners(options.space)]
    most = max(workers)
    points = [Point(f"{label_of(most)}, {' '.join(map('='.join, corner))}", most, corner) for corner in settings]
    study.check(points + [Point(label_of(count), count, settings[0]) for count in workers if count != most])
    for search in searches:
        search.attempts  # noqa: B018 - a storage that cannot be used is told before anything is tracked
    asked_for = {"workers": " ".join(map(str, workers)), "trials": options.trials, "target": options.target}
    asked_for |= {"pruner": "median" if options.prunes else "none"}
    space = {f"space.{name}": distribution for name, distribution in options.space.items()}
    with study.open({**asked_for, "seeds": study.request.seeds, **space}, shared=True):
        _search(study, searches, options.trials)
        best = [(search, top, top.group) for search in searches if (top := search.best) and top.group]
        if best:
            groups = [trial.group for search, _, _ in best for trial in search.trials if trial.group]
            with study.alone(PATIENCE_S):
                publish(study, _report(study, best), groups)


def _search(study: Study, searches: Sequence[Search], trials: int) -> None:
    """Try what nobody has tried, until all is tried, here or by others."""
    known = sum(len(search.attempts.done()) for search in searches)
    if known:
        print(f"{known} of {len(searches) * trials} trials are known already.", flush=True)
    at_once = max(study.request.jobs // (len(searches) * study.request.seeds), 1)
    told = False
    while True:
        asked = [(search, *taken) for search in searches for _ in range(at_once) if (taken := search.ask())]
        if not asked:
            if all(search.attempts.over() for search in searches):
                break
            if not told:
                print("Waiting for the trials of other commands.", flush=True)
            told = True
            time.sleep(LOOK_S)
            continue
        whose = {point: (search, trial) for search, trial, point in asked}

        def hopeless(training: Training, whose: dict[Point, tuple[Search, Trial]] = whose) -> bool:
            search, trial = whose[training.point]
            return search.hopeless(trial, training)

        numbers = ", ".join(map(str, sorted({trial.number for _, trial, _ in asked})))
        trainings = [training for _, _, point in asked for training in study.trainings([point])]
        what = f"trial {numbers} of {trials}: "
        children = iter(study.train(trainings, divergence_counts=True, what=what, hopeless=hopeless))
        for search, trial, _ in asked:
            search.tell(trial, [next(children) for _ in range(study.request.seeds)])
    for search in searches:
        search.collect()


def _row(search: Search, trial: Trial, target: float) -> dict[str, object]:
    """A row of a table on a trial; empty where it did not finish."""
    found = {} if trial.group is None else trial.group.summary(search.study.base.metric) | trial.group.cost(target)
    scores = {"score": trial.scores.mean(), "score_sd": deviation(trial.scores)}
    return {"workers": search.workers, "trial": trial.number, **scores, **found, **trial.values}


def _report(study: Study, best: Sequence[tuple[Search, Trial, Group]]) -> Report:
    """Make the table of best settings, and the plots."""
    metric, options, name = study.base.metric, best[0][0].options, study.base.experiment_name
    target = final(best[0][2].mean["metric"]) if options.target is None else options.target
    objective = f"final {metric}" if options.target is None else f"runs to {number(target)}"
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
    pruned = sum(trial.pruned for search, _, _ in best for trial in search.trials)
    if pruned:
        notes.append(f"{pruned} trials were given up early by Optuna's median pruner, and have no score.")
    for search, trial, _ in best:
        settings = (("trainer.devices", str(search.workers)), *as_settings(trial.values))
        words = ["dmaml", *study.request.command(settings, defaults={})]
        notes.append(f"Best of {search.label}: `{shlex.join(words)}`")
    groups, searches = [group for _, _, group in best], [search for search, _, _ in best]
    tables = {
        "table.csv": table.assign(**{"best trial": tried, "target": target}),
        "trials.csv": pd.DataFrame([_row(search, trial, target) for search in searches for trial in search.trials]),
    }
    plots = {
        "best.png": partial(
            plot_curves, groups, placed_on(groups, PLOTTED), metric, f"{name}: {metric} at the best setting"
        ),
        "search.png": partial(_plot_search, searches, objective, f"{name}: the search"),
    }
    return Report(f"Best settings by number of workers, for {objective}", tables, shown, notes, plots)


def _plot_search(searches: Sequence[Search], objective: str, title: str, path: Path) -> None:
    """Plot the score of each trial, and the best so far."""
    figure = Figure(figsize=(6.4, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for search, colour in zip(searches, cycle(COLOURS), strict=False):
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
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
