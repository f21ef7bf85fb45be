"""The search of a sweep: Optuna asks for settings, and learns from what their trainings came to.

Optuna keeps its trials in a file beside the results, so a sweep that goes on knows what was tried; what the trainings
came to is read from MLflow. Each trial has a sampler of its own, seeded by its number: a sweep that was stopped asks
for the settings that one that was not would ask for.

The sampler is the tree-structured Parzen estimator (Bergstra et al. 2011, NeurIPS 24).

Legend: S seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from dmaml_pl.errors import TrackingError
from dmaml_pl.studies.ledger import Child
from dmaml_pl.studies.plan import Point, label_of
from dmaml_pl.studies.results import Better, Curve, Group, final, read_curve
from dmaml_pl.studies.settings_files import as_settings
from dmaml_pl.studies.space import Space, extremes
from dmaml_pl.studies.study import Study


@dataclass(frozen=True)
class SearchSettings:
    """How a sweep searches.

    Attributes:
        space: what it searches.
        trials: settings tried for each number of workers.
        startup: of these, how many are sampled at random before the sampler learns from results.
        sampler_seed: of the sampler.
        target: the metric to be reached in as few runs as possible; None asks for the best final metric.
    """

    space: Space
    trials: int
    startup: int
    sampler_seed: int
    target: float | None


@dataclass
class Trial:
    """A setting that is tried.

    Attributes:
        number: from 1.
        id: Optuna's number of it.
        values: of the settings.
        scores: the objective of each seed, (S,); infinitely bad where a training diverged, empty where one failed.
        group: the curves, if all trainings finished.
    """

    number: int
    id: int
    values: dict[str, Any]
    scores: pd.Series = field(default_factory=lambda: pd.Series(dtype=float))
    group: Group | None = None


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
    def optuna_study(self) -> optuna.Study:
        """Optuna's study, in a file in the study's folder, which must be open.

        Another search (another configuration, space, objective or sampler) is another one in the same file.

        Raises:
            TrackingError: the file cannot be used.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        options, file = self.options, self.study.folder / "optuna.journal"
        space = sorted((name, str(distribution)) for name, distribution in options.space.items())
        asked = [space, options.startup, options.sampler_seed, options.target]
        digest = self.study.request.digest(self.workers, self.study.request.seeds, asked)
        try:
            # A command that was killed may have left Optuna's lock; this one is alone at the study.
            file.with_name(f"{file.name}.lock").unlink(missing_ok=True)
            return optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(file))),
                study_name=f"{self.label}, {digest}",
                direction="maximize" if self.upwards else "minimize",
                load_if_exists=True,
            )
        except (OSError, ValueError, KeyError) as error:
            raise TrackingError(
                f"{file}, in which Optuna keeps its trials, cannot be used ({error}): move it away. Trainings that "
                "have finished are not made again."
            ) from error

    def ask(self, number: int) -> tuple[Trial, Point]:
        """Return the trial of a number, from 1, and what is to be trained for it; an earlier command's is known."""
        # One that a process was stopped at while it asked has not all of the settings.
        known = [trial for trial in self.optuna_study.trials if trial.params.keys() == self.options.space.keys()]
        if number <= len(known):
            asked: optuna.trial.BaseTrial = known[number - 1]
        else:
            seed = np.random.SeedSequence([self.options.sampler_seed, self.workers, number]).generate_state(1).item()
            self.optuna_study.sampler = TPESampler(seed=seed, n_startup_trials=self.options.startup)
            asked = self.optuna_study.ask(self.options.space)
        self.trials.append(Trial(number, asked.number, {name: asked.params[name] for name in self.options.space}))
        settings = as_settings(self.trials[-1].values)
        return self.trials[-1], Point(f"{self.label}, trial {number}", self.workers, settings)

    def tell(self, trial: Trial, children: Sequence[Child]) -> None:
        """Learn from a trial; one with a training that failed otherwise than by diverging is left open."""
        if any(child.error and not child.diverged for child in children):
            return
        worst = -math.inf if self.upwards else math.inf
        curves = [None if child.error else read_curve(self.study, child) for child in children]
        trial.scores = pd.Series([worst if curve is None else self._score(curve) for curve in curves]).fillna(worst)
        if not any(child.error for child in children):
            trial.group = Group(self.label, tuple(curve for curve in curves if curve), self.study.base.better)
        self.optuna_study.tell(trial.id, trial.scores.mean(), skip_if_finished=True)

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
