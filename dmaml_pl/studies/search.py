"""The search of a sweep: Optuna asks for settings, and learns from what their trainings came to.

Optuna keeps its trials, so a sweep that goes on knows what was tried; what the trainings came to is read from MLflow.
Each trial has a sampler of its own, seeded by its number: a sweep that was stopped asks for the settings that one that
was not would ask for.

The sampler is the tree-structured Parzen estimator (Bergstra et al. 2011, NeurIPS 24).

Legend: S seeds.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from dmaml_pl.errors import TrackingError
from dmaml_pl.studies.attempts import Attempts, Direction
from dmaml_pl.studies.ledger import Child
from dmaml_pl.studies.plan import Point, Training, label_of
from dmaml_pl.studies.results import Better, Curve, Group, final, read_curve
from dmaml_pl.studies.settings_files import as_settings
from dmaml_pl.studies.space import Space, extremes
from dmaml_pl.studies.study import Study

LOOK_S = 10.0
"""Seconds between two signs of life, and between two looks at a curve that may be hopeless."""


@dataclass(frozen=True)
class SearchSettings:
    """How a sweep searches.

    Attributes:
        space: what it searches.
        trials: settings tried for each number of workers.
        startup: of these, how many are sampled at random before the sampler learns from results.
        sampler_seed: of the sampler.
        target: the metric to be reached in as few runs as possible; None asks for the best final metric.
        storage: where Optuna keeps the trials, a journal file or the URL of a database; None: beside the results.
        prunes: whether Optuna's median pruner ends trials whose first seed is worse than others were at that step.
    """

    space: Space
    trials: int
    startup: int
    sampler_seed: int
    target: float | None
    storage: str | None = None
    prunes: bool = False


@dataclass
class Trial:
    """A setting that is tried.

    Attributes:
        number: from 1.
        values: of the settings.
        attempt: Optuna's trial, while it is one's own.
        scores: the objective of each seed, (S,); infinitely bad where a training diverged, empty where one failed.
        group: the curves, if all trainings finished.
        pruned: whether it was given up, as others were better.
    """

    number: int
    values: dict[str, Any]
    attempt: optuna.Trial | None = None
    scores: pd.Series = field(default_factory=lambda: pd.Series(dtype=float))
    group: Group | None = None
    pruned: bool = False
    looked: float = -math.inf


@dataclass
class Search:
    """The trials of one number of workers.

    Raises:
        ConfigError: a target cannot be counted to in this space.
    """

    workers: int
    study: Study
    options: SearchSettings
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.label = label_of(self.workers)
        self._most = math.inf if self.options.target is None else self._most_runs()

    @property
    def upwards(self) -> bool:
        """Whether greater scores are better."""
        return self.options.target is None and self.study.base.better == "max"

    @cached_property
    def attempts(self) -> Attempts:
        """Those of this search; another configuration, space, objective or sampler is another one in the same storage.

        Raises:
            TrackingError: Optuna's storage cannot be used.
        """
        options, study = self.options, self.study
        space = sorted((name, str(distribution)) for name, distribution in options.space.items())
        asked = [space, options.startup, options.sampler_seed, options.target]
        name = f"{self.label}, {study.request.digest(self.workers, study.request.seeds, asked)}"
        # Curves cross early: in the first quarter a slower one may still become the best.
        warmup = max(study.base.find("trainer.max_steps") or 0, 0) // 4 if options.prunes else 0
        pruner = MedianPruner(n_warmup_steps=warmup) if options.prunes else NopPruner()
        direction: Direction = "maximize" if self.upwards else "minimize"
        place = options.storage or str(study.folder / "optuna.journal")
        return Attempts(place, name, direction, pruner, options.trials)

    def ask(self) -> tuple[Trial, Point] | None:
        """Take the first trial that nobody has or had, and what is to be trained for it; None if there is none now."""
        taken = self.attempts.take(self.options.space, self._sampler)
        if taken is None:
            return None
        number, attempt = taken
        self.trials.append(Trial(number, {name: attempt.params[name] for name in self.options.space}, attempt))
        return self.trials[-1], self._point(self.trials[-1])

    def _sampler(self, number: int) -> TPESampler:
        seed = np.random.SeedSequence([self.options.sampler_seed, self.workers, number]).generate_state(1).item()
        return TPESampler(seed=seed, n_startup_trials=self.options.startup)

    def _point(self, trial: Trial) -> Point:
        return Point(f"{self.label}, trial {trial.number}", self.workers, as_settings(trial.values))

    def hopeless(self, trial: Trial, training: Training) -> bool:
        """Give a sign of life, and say whether Optuna's pruner has given up a trial, by the curve of its first seed."""
        if trial.attempt is None or time.monotonic() - trial.looked < LOOK_S:
            return trial.pruned
        trial.looked = time.monotonic()
        with suppress(TrackingError):  # a store that is away for a while ends no training
            self.attempts.give_sign(trial.attempt)
            if self.options.prunes and training.seed == self.study.base.seed:
                digest, metric = self.study.digest(training), self.study.base.metric
                values = self.study.ledger.so_far(training, digest, metric)
                trial.pruned = trial.pruned or self._report(trial.attempt, values)
        return trial.pruned

    def _report(self, attempt: optuna.Trial, values: Mapping[int, float]) -> bool:
        """Tell of the metric by step, the other way round where the fewest runs to it are sought; whether to prune."""
        sign = -1.0 if self.study.base.better == "max" and not self.upwards else 1.0
        return self.attempts.report(attempt, {step: sign * value for step, value in values.items()})

    def tell(self, trial: Trial, children: Sequence[Child]) -> None:
        """Learn from a trial; one with a training that failed otherwise than by diverging may be tried again."""
        if trial.attempt is None:
            return
        if any(child.error and not child.diverged and not child.pruned for child in children):
            self.attempts.end(trial.attempt, TrialState.FAIL)
        elif any(child.pruned for child in children):
            self.attempts.end(trial.attempt, TrialState.PRUNED)
        else:
            self._read(trial, children)
            if self.options.prunes and not children[0].error:
                self._report(trial.attempt, self.study.ledger.history(children[0], self.study.base.metric))
            self.attempts.end(trial.attempt, TrialState.COMPLETE, trial.scores.mean())
        trial.attempt = None

    def _read(self, trial: Trial, children: Sequence[Child]) -> None:
        worst = -math.inf if self.upwards else math.inf
        curves = [None if child.error else read_curve(self.study, child) for child in children]
        trial.scores = pd.Series([worst if curve is None else self._score(curve) for curve in curves]).fillna(worst)
        if not any(child.error for child in children):
            trial.group = Group(self.label, tuple(curve for curve in curves if curve), self.study.base.better)

    def collect(self) -> None:
        """Read what others have tried, and earlier commands, from Optuna and from MLflow."""
        found = {trial.number: trial for trial in self.trials}
        for number, attempt in self.attempts.done().items():
            if number in found and (len(found[number].scores) or found[number].pruned):
                continue
            trial = Trial(number, {name: attempt.params[name] for name in self.options.space})
            trial.pruned = attempt.state == TrialState.PRUNED
            trainings = self.study.trainings([self._point(trial)])
            children = [child for child in self.study.known(trainings, divergence_counts=True) if child]
            if len(children) == len(trainings) and not trial.pruned:
                self._read(trial, children)
            found[number] = trial
        self.trials = [found[number] for number in sorted(found)]

    def _score(self, curve: Curve) -> float:
        if self.options.target is None:
            return final(curve.validations["metric"])
        return runs_to(curve, self.options.target, self.study.base.better, self._most)

    def _most_runs(self) -> int:
        """More runs no training of this search can have."""
        base, space = self.study.base, self.options.space

        def bounds(wanted: str) -> tuple[float, float]:
            searched = [entry for entry in space.items() if entry[0].replace(".init_args", "") == wanted]
            return extremes(*searched[0]) if searched else (base.whole(wanted), base.whole(wanted))

        return math.ceil(bounds("trainer.max_steps")[1] / bounds(base.run_length_setting)[0])

    @property
    def best(self) -> Trial | None:
        """The best trial whose trainings all finished; of equals the first."""
        done = [trial for trial in self.trials if trial.group is not None]
        return (max if self.upwards else min)(done, key=lambda trial: trial.scores.mean(), default=None)


def runs_to(curve: Curve, target: float, better: Better, most: float) -> float:
    """Count the runs until the smoothed metric of a training reaches a target.

    Where it never does, more than any training can have, `most`: larger by the relative distance of the final metric f
    from the target t, |f - t| / (|f| + |t|), so that the sampler sees which setting comes nearer.
    """
    reached = Group(curve.label, (curve,), better).cost(target)["run_to_target"]
    if math.isfinite(reached):
        return reached
    last = final(curve.validations["metric"])
    return most * (1 + abs(last - target) / max(abs(last) + abs(target), 1e-12))
