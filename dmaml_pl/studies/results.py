"""From what trainings wrote into MLflow to curves, and what is read off them.

Measured wall time is that of training alone: the slowest worker's seconds in each run and the merge at its end, summed
over runs. Start-up and validation are not in it. Where workers share cores, W machines would be faster: the *computed*
wall time takes, in place of the slowest worker's seconds, the seconds that it was on a core.

Legend: V validations of a training, S its seeds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd

from dmaml_pl.errors import TrackingError
from dmaml_pl.studies.ledger import Child
from dmaml_pl.studies.plan import Point
from dmaml_pl.studies.study import Study

Better = Literal["min", "max"]

AXES = {
    "run": "runs",
    "meta_iterations": "meta-iterations of a worker",
    "tasks_seen": "tasks seen by all workers",
    "env_steps": "steps in environments by all workers",
    "wall_seconds": "wall time, measured (s)",
    "computed_wall_seconds": "wall time on one machine per worker, computed (s)",
}
"""What a validation can be placed on, with titles; the last two are sums from the beginning of the training.

Only trainings in environments make steps there.
"""

_RUN, _TASKS, _SECONDS, _CPU = "train/run", "train/tasks_seen", "train/run_seconds", "train/run_cpu_seconds"
_ENV_STEPS = "train/env_steps"
_MERGE, _TRANSFER = "merge/seconds", "merge/transfer_seconds"
RUN_METRICS = (_RUN, _TASKS, _SECONDS, _CPU, _MERGE, _TRANSFER, _ENV_STEPS)
"""What a curve needs to know of each run."""


@dataclass(frozen=True)
class Curve:
    """What became of one training.

    Attributes:
        label: of its point.
        seed: its seed.
        validations: V rows: the place of each validation on each axis (`AXES`), and its `metric`.
        total: the end of the training on each axis.
    """

    label: str
    seed: int
    validations: pd.DataFrame
    total: pd.Series


def read_curve(study: Study, child: Child) -> Curve:
    """Read a finished training from MLflow.

    Raises:
        TrackingError: it has no validation.
    """
    values = study.ledger.history(child, study.base.metric)
    runs = {name: study.ledger.history(child, name) for name in RUN_METRICS}
    if not values:
        raise TrackingError(
            f"{child.training.label} has no {study.base.metric} in MLflow: set checkpoint.monitor to a metric of the "
            "validation, and trainer.val_check_interval to no more runs than there are."
        )
    label, seed = child.training.point.label, child.training.seed
    return curve_of(label, seed, values, runs, communicates=child.training.point.workers > 1)


def curve_of(
    label: str, seed: int, values: Mapping[int, float], runs: Mapping[str, Mapping[int, float]], *, communicates: bool
) -> Curve:
    """Make a curve of metric histories, which are by step, that is, by meta-iterations.

    Args:
        label: of the point.
        seed: of the training.
        values: the metric at each validation.
        runs: `RUN_METRICS` at the end of each run.
        communicates: whether there is more than one worker, so that there are merges.
    """
    ends = pd.DataFrame({name: pd.Series(runs.get(name, {}), dtype=float) for name in RUN_METRICS})
    ends = ends.loc[sorted(runs[_SECONDS])].fillna(dict.fromkeys((_RUN, _TASKS, _MERGE, _TRANSFER), 0.0))
    # Of a single merge worker 0's waiting for the slowest is not known apart: it is told with the merge after it.
    merge = ends[_TRANSFER if runs[_TRANSFER] else _MERGE] if communicates else 0.0
    places = pd.DataFrame(
        {
            "run": ends[_RUN].astype(int),
            "meta_iterations": ends.index,
            "tasks_seen": ends[_TASKS].astype(int),
            **({"env_steps": ends[_ENV_STEPS]} if runs.get(_ENV_STEPS) else {}),
            "wall_seconds": (ends[_SECONDS] + merge).cumsum(),
            "computed_wall_seconds": (ends[_CPU] + merge).cumsum(),
        }
    )
    steps = sorted(values)
    # A validation comes at the end of a run, and so has its step.
    nearest = np.clip(np.searchsorted(places.index, steps), 0, len(places) - 1)
    validations = places.iloc[nearest].assign(metric=[values[step] for step in steps]).reset_index(drop=True)
    return Curve(label, seed, validations, places.iloc[-1])


@dataclass(frozen=True)
class Group:
    """The trainings of one point, as far as all of them go (V is that of the shortest).

    Attributes:
        label: of the point.
        curves: one a seed.
        better: which values of the metric are better.
    """

    label: str
    curves: tuple[Curve, ...]
    better: Better

    @cached_property
    def _validations(self) -> pd.DataFrame:
        """Of all seeds, (S V), by the number of the validation."""
        length = min(len(curve.validations) for curve in self.curves)
        return pd.concat([curve.validations.head(length) for curve in self.curves])

    def axes(self, wanted: Iterable[str]) -> list[str]:
        """Those of some axes that all of its trainings can be placed on."""
        return [axis for axis in wanted if all(axis in curve.validations for curve in self.curves)]

    @cached_property
    def mean(self) -> pd.DataFrame:
        """Axes and metric of each validation, over the seeds, (V,)."""
        return self._validations.groupby(level=0).mean(skipna=False)

    @property
    def band(self) -> tuple[pd.Series, pd.Series]:
        """One standard deviation below and above the mean; of fewer than three seeds, the lowest and the highest."""
        by_validation = self._validations["metric"].groupby(level=0)
        if len(self.curves) < 3:
            return by_validation.min(), by_validation.max()
        mean, spread = self.mean["metric"], by_validation.std(skipna=False)
        return mean - spread, mean + spread

    @cached_property
    def totals(self) -> pd.DataFrame:
        """The end of each seed's training on each axis, and its final metric, (S,)."""
        return pd.DataFrame([{**curve.total, "final": final(curve.validations["metric"])} for curve in self.curves])

    def summary(self, metric: str) -> dict[str, float]:
        """A row of a table: means over the seeds, and standard deviations of what differs."""
        mean, spread = self.totals.mean(skipna=False), deviation(self.totals)
        values, times = self._validations["metric"], ["wall_seconds", "computed_wall_seconds"]
        return {
            "seeds": len(self.curves),
            f"final {metric}": mean["final"],
            "sd": spread["final"],
            f"best {metric}": values.max() if self.better == "max" else values.min(),
            "runs": mean["run"],
            **mean[[*self.axes(("tasks_seen", "env_steps")), *times]],
            **spread[times].add_suffix("_sd"),
        }

    def cost(self, target: float) -> dict[str, float]:
        """Where, on each axis, the smoothed mean over the seeds is first as good as `target`; nan if nowhere."""
        smoothed = smooth(self.mean["metric"])
        reached = smoothed >= target if self.better == "max" else smoothed <= target
        axes = self.axes(AXES)
        place = self.mean.loc[reached, axes].iloc[0] if reached.any() else pd.Series(np.nan, axes)
        return {f"{axis}_to_target": float(value) for axis, value in place.items()}


def placed_on(groups: Sequence[Group], axes: Iterable[str]) -> list[str]:
    """The axes to plot over: in environments, where a task may take any number of steps, these in place of tasks."""
    in_environments = all(group.axes(["env_steps"]) for group in groups)
    return [("env_steps" if axis == "tasks_seen" and in_environments else axis) for axis in axes]


def smooth(values: pd.Series) -> pd.Series:
    """Trailing means over a tenth of all values, at least one; over fewer where there are not yet as many, (V,)."""
    # By NumPy's mean, as pandas's own would leave out what is not finite.
    return values.rolling(max(len(values) // 10, 1), min_periods=1).apply(np.mean, raw=True)


def final(values: pd.Series) -> float:
    """The mean of the last tenth of the values, at least one."""
    return float(smooth(values).iloc[-1])


def deviation(values: pd.Series | pd.DataFrame) -> Any:
    """Standard deviation over seeds; nan for a single one, and where one is not finite."""
    with np.errstate(invalid="ignore"):
        return values.std(skipna=False)


def groups(study: Study, children: Sequence[Child]) -> dict[Point, Group]:
    """The finished trainings by point, in the order of the points."""
    curves: dict[Point, list[Curve]] = {}
    for child in children:
        if not child.error:
            curves.setdefault(child.training.point, []).append(read_curve(study, child))
    return {point: Group(point.label, tuple(some), study.base.better) for point, some in curves.items()}
