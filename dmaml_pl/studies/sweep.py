"""The sweep: the best setting of each number of workers, found by Optuna, so that each is judged at its own best.

Optuna keeps nothing on disk. Its sampler asks for the same settings again after the same results, so a sweep that goes
on asks for all of its trials anew, and those whose trainings are known cost nothing.

The sampler is the tree-structured Parzen estimator (Bergstra et al. 2011, NeurIPS 24).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dmaml_pl.studies.figures import COLOURS, draw_curves, new_figure, plain
from dmaml_pl.studies.plan import Point
from dmaml_pl.studies.report import SMOOTHED, Report, publish
from dmaml_pl.studies.results import Curve, Floats, Group, final, first_reached, read_curve, smooth, spread
from dmaml_pl.studies.space import Space
from dmaml_pl.studies.study import Child, Study
from dmaml_pl.studies.tables import number, with_spread, write_csv

Count = Literal["run", "meta_iterations", "tasks_seen"]
COUNTS: dict[str, Count] = {"runs": "run", "meta_iterations": "meta_iterations", "tasks": "tasks_seen"}

PANELS = (
    ("run", "runs"),
    ("meta_iterations", "meta-iterations of a worker"),
    ("tasks_seen", "tasks seen by all workers"),
)
_ENOUGH = 10
"""Trials from which the importance of the settings is told."""


@dataclass(frozen=True)
class Options:
    """How a sweep searches.

    Attributes:
        space: what it searches.
        workers: numbers of workers, each searched on its own.
        trials: settings tried for each number of workers.
        startup: of these, how many are drawn at random before the sampler learns from results.
        sampler_seed: of the sampler.
        target: the metric to be reached as early as possible; None asks for the best final metric.
        count: what is counted until the target is reached.
    """

    space: Space
    workers: tuple[int, ...]
    trials: int
    startup: int
    sampler_seed: int
    target: float | None
    count: Count


@dataclass(frozen=True)
class Trial:
    """A setting that was tried.

    Attributes:
        number: from 0.
        values: of the settings.
        scores: the objective of each seed, (S,); infinitely bad where a training diverged, empty where one failed.
        group: the curves, if all trainings finished.
    """

    number: int
    values: dict[str, Any]
    scores: Floats
    group: Group | None

    @property
    def score(self) -> float:
        """The mean over the seeds; nan if a training failed."""
        return float(self.scores.mean()) if len(self.scores) else math.nan


@dataclass
class Search:
    """The trials of one number of workers."""

    workers: int
    study: Study
    options: Options
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        import optuna  # noqa: PLC0415 - a second, and only when a sweep begins

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(
            seed=self.options.sampler_seed + self.workers, n_startup_trials=self.options.startup
        )
        self.optuna = optuna.create_study(sampler=sampler, direction="maximize" if self.upwards else "minimize")
        self._distributions = {name: one.distribution() for name, one in self.options.space.dimensions.items()}

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.workers} worker{'s' if self.workers > 1 else ''}"

    @property
    def upwards(self) -> bool:
        """Whether greater scores are better."""
        return self.options.target is None and self.study.base.better == "max"

    def ask(self) -> tuple[Any, Point]:
        """The next trial to make: Optuna's, and what it means for us."""
        trial = self.optuna.ask(self._distributions)
        values = {name: trial.params[name] for name in self._distributions}
        return trial, Point(f"{self.label}, trial {trial.number}", self.workers, Space.settings(values))

    def tell(self, trial: Any, children: Sequence[Child]) -> None:
        """Learn from a trial; one with a training that failed otherwise than by diverging teaches nothing."""
        values = {name: trial.params[name] for name in self._distributions}
        if any(child.error and not child.diverged for child in children):
            self.optuna.tell(trial, state=_failed())
            self.trials.append(Trial(trial.number, values, np.array([]), None))
            return
        worst = -math.inf if self.upwards else math.inf
        curves = [None if child.error else read_curve(self.study, child) for child in children]
        scores = np.array([worst if curve is None else self.score(curve) for curve in curves])
        finished = tuple(curve for curve in curves if curve is not None)
        whole = len(finished) == len(curves)
        group = Group(f"{self.label}, trial {trial.number}", finished, self.study.base.better) if whole else None
        self.optuna.tell(trial, float(scores.mean()))
        self.trials.append(Trial(trial.number, values, scores, group))

    def score(self, curve: Curve) -> float:
        """The objective of a training."""
        if self.options.target is None:
            return final(curve.metric)
        return cost(curve, self.options.target, self.options.count, self.study.base.better, self.most)

    @property
    def most(self) -> float:
        """What no training of this search can exceed, of that which is counted until the target is reached."""
        base, dimensions = self.study.base, self.options.space.dimensions
        known = {name.replace(".init_args", ""): dimension.extremes() for name, dimension in dimensions.items()}

        def extremes(name: str) -> tuple[float, float]:
            return known.get(name) or (base.whole(name), base.whole(name))

        iterations = extremes("trainer.max_steps")[1]
        if self.options.count == "run":
            return math.ceil(iterations / extremes(base.run_length_setting)[0])
        return iterations * (extremes("data.meta_batch")[1] * self.workers if self.options.count == "tasks_seen" else 1)

    @property
    def best(self) -> Trial | None:
        """The best trial whose trainings all finished; of equals the first."""
        done = [trial for trial in self.trials if trial.group is not None]
        return min(done, key=lambda trial: -trial.score if self.upwards else trial.score, default=None)

    def importance(self) -> dict[str, float]:
        """What part of the scores' variation follows from each setting; empty if there are few trials."""
        from optuna.importance import get_param_importances  # noqa: PLC0415 - only when a sweep ends

        finite = [trial for trial in self.trials if math.isfinite(trial.score)]
        if len(finite) < _ENOUGH or len(self._distributions) < 2 or len({trial.score for trial in finite}) < 2:
            return {}
        return dict(get_param_importances(self.optuna))


def _failed() -> Any:
    from optuna.trial import TrialState  # noqa: PLC0415 - only when a sweep has begun

    return TrialState.FAIL


def cost(curve: Curve, target: float, count: Count, better: Literal["min", "max"], most: float) -> float:
    """What it takes until the smoothed metric reaches a target.

    Where it never does, more than any training can take, `most`: larger by the relative distance of the final metric
    from the target, |f - t| / (|f| + |t|), so that the sampler sees which setting comes nearer.

    Args:
        curve: a training.
        target: t.
        count: the axis to count on.
        better: which values of the metric are better.
        most: the most that any training can take.
    """
    smoothed = smooth(curve.metric)
    index = first_reached(smoothed, target, better)
    if index is not None:
        return float(curve.at[count][index])
    missed = abs(smoothed[-1] - target) / max(abs(smoothed[-1]) + abs(target), 1e-12)
    return float(most * (1 + missed))


def conduct(study: Study, options: Options) -> None:
    """Search, for each number of workers.

    Args:
        study: checked, but not open.
        options: how.
    """
    corners = [Space.settings(values) for values in options.space.corners()]
    most = max(options.workers)
    points = [Point(f"{most} workers, {_shown(corner)}", most, corner) for corner in corners]
    points += [Point(f"{count} workers", count, corners[0]) for count in options.workers if count != most]
    study.check(points)
    searches = [Search(count, study, options) for count in options.workers]
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
            _write_trials(study.output / "trials.csv", found)
            publish(study, report(study, found), [t.group for s in found for t in s.trials if t.group is not None])


def _shown(settings: Sequence[tuple[str, str]]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings)


def _write_trials(path: Path, searches: Sequence[Search]) -> None:
    rows = [
        {
            "workers": search.workers,
            "trial": trial.number,
            "score": trial.score,
            "sd": spread(trial.scores),
            f"final {search.study.base.metric}": float(trial.group.final.mean()) if trial.group else math.nan,
            **trial.values,
        }
        for search in searches
        for trial in search.trials
    ]
    write_csv(path, rows)


def report(study: Study, searches: Sequence[Search]) -> Report:
    """The table of best settings, and the figures.

    Args:
        study: what was studied.
        searches: those with a best trial.
    """
    metric, options = study.base.metric, searches[0].options
    best = [(search, trial, trial.group) for search in searches if (trial := search.best) and trial.group]
    target = final(best[0][2].mean) if options.target is None else options.target
    objective = f"final {metric}" if options.target is None else f"{_name_of(options.count)} to {number(target)}"
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
                **{f"{axis}_to_target": reached.get(axis) for axis, _ in PANELS},
                **trial.values,
            }
        )
        shown.append(
            {
                "workers": str(search.workers),
                "best trial": f"{trial.number} of {len(search.trials)}",
                f"objective: {objective}": with_spread(trial.scores),
                **({} if options.target is None else {f"final {metric}": with_spread(group.final)}),
                **{f"{_name_of(axis)} to {number(target)}": number(reached.get(axis)) for axis, _ in PANELS},
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
    )


def _name_of(axis: str) -> str:
    return {"run": "runs", "meta_iterations": "meta-iterations", "tasks_seen": "tasks"}[axis]


def _brief(value: Any) -> str:
    return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _draw_search(searches: Sequence[Search], objective: str, title: str, path: Path) -> None:
    """The score of each trial, and the best so far."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    for place, search in enumerate(searches):
        colour = COLOURS[place % len(COLOURS)]
        scored = [trial for trial in search.trials if math.isfinite(trial.score)]
        numbers, scores = [trial.number + 1 for trial in scored], [trial.score for trial in scored]
        best = np.maximum.accumulate(scores) if search.upwards else np.minimum.accumulate(scores)
        axes.scatter(numbers, scores, color=colour, s=14, alpha=0.6)
        axes.step(numbers, best, color=colour, where="post", label=search.label)
    axes.set_xlabel("trial")
    axes.set_ylabel(f"{objective}, mean over seeds")
    axes.set_title(f"{title} (lines: best so far)", fontsize=10)
    axes.legend(frameon=False)
    plain(axes)
    figure.savefig(path)
