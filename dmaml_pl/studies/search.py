"""The search of a sweep: Optuna asks for settings, and learns from what their trainings came to.

Optuna keeps nothing on disk. Its sampler asks for the same settings again after the same results, so a sweep that goes
on asks for all of its trials anew, and those whose trainings are known cost nothing.

The sampler is the tree-structured Parzen estimator (Bergstra et al. 2011, NeurIPS 24).

Legend: S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from dmaml_pl.studies.ledger import Child
from dmaml_pl.studies.plan import Point
from dmaml_pl.studies.results import Curve, Floats, Group, final, first_reached, read_curve, smooth
from dmaml_pl.studies.space import Space
from dmaml_pl.studies.study import Study

Count = Literal["run", "meta_iterations", "tasks_seen"]
COUNTS: dict[str, Count] = {"runs": "run", "meta_iterations": "meta_iterations", "tasks": "tasks_seen"}

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
        number: from 1.
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
        self._most = math.inf if self.options.target is None else self._greatest()
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
        return trial, Point(f"{self.label}, trial {trial.number + 1}", self.workers, Space.settings(values))

    def tell(self, trial: Any, children: Sequence[Child]) -> None:
        """Learn from a trial; one with a training that failed otherwise than by diverging teaches nothing."""
        values = {name: trial.params[name] for name in self._distributions}
        if any(child.error and not child.diverged for child in children):
            self.optuna.tell(trial, state=_failed())
            self.trials.append(Trial(trial.number + 1, values, np.array([]), None))
            return
        worst = -math.inf if self.upwards else math.inf
        curves = [None if child.error else read_curve(self.study, child) for child in children]
        scores = np.array([worst if curve is None else self.score(curve) for curve in curves])
        scores = np.where(np.isnan(scores), worst, scores)
        finished = tuple(curve for curve in curves if curve is not None)
        whole = len(finished) == len(curves)
        group = Group(f"{self.label}, trial {trial.number + 1}", finished, self.study.base.better) if whole else None
        self.optuna.tell(trial, float(scores.mean()))
        self.trials.append(Trial(trial.number + 1, values, scores, group))

    def score(self, curve: Curve) -> float:
        """The objective of a training."""
        if self.options.target is None:
            return final(curve.metric)
        return cost(curve, self.options.target, self.options.count, self.study.base.better, self._most)

    def _greatest(self) -> float:
        """What no training of this search can exceed, of that which is counted until the target is reached."""
        base, dimensions = self.study.base, self.options.space.dimensions
        searched = {name.replace(".init_args", ""): dimension for name, dimension in dimensions.items()}

        def extremes(name: str) -> tuple[float, float]:
            return searched[name].extremes() if name in searched else (base.whole(name), base.whole(name))

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
