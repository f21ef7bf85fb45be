"""From what trainings wrote into MLflow to curves, and what is read off them.

Measured wall time is that of training alone: the slowest worker's seconds in each run and the merge at its end, summed
over runs. Start-up and validation are not in it. Where workers share cores, W machines would be faster: the *computed*
wall time takes, in place of the slowest worker's seconds, the seconds that it was on a core.

Legend: V validations of a training, R its runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dmaml_pl.errors import TrackingError
from dmaml_pl.studies.ledger import Child
from dmaml_pl.studies.study import Study

Floats = NDArray[np.float64]
Better = Literal["min", "max"]

AXES = ("run", "meta_iterations", "tasks_seen", "wall_seconds", "computed_wall_seconds")
"""What a validation can be placed on; the last two are sums from the beginning of the training."""

_RUN, _TASKS, _SECONDS, _CPU = "train/run", "train/tasks_seen", "train/run_seconds", "train/run_cpu_seconds"
_MERGE, _TRANSFER = "merge/seconds", "merge/transfer_seconds"
RUN_METRICS = (_RUN, _TASKS, _SECONDS, _CPU, _MERGE, _TRANSFER)
"""What a curve needs to know of each run."""

NO_CPU = (
    "Computed wall times are from the workers' wall time, as their time on a core (train/run_cpu_seconds) was not "
    "logged: where workers share cores, W machines would be faster than computed."
)
NO_TRANSFER = (
    "The seconds of a merge contain those that worker 0 waited for the slowest, as merge/transfer_seconds was not "
    "logged: wall times are too long by them."
)


@dataclass(frozen=True)
class Curve:
    """What became of one training.

    Attributes:
        label: of its point.
        seed: its seed.
        at: the place of each validation on each axis, (V,) by name (`AXES`).
        metric: of each validation, (V,).
        total: the end of the training on each axis.
        notes: what a reader of the numbers must know.
    """

    label: str
    seed: int
    at: Mapping[str, Floats]
    metric: Floats
    total: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One row a validation, for a CSV file."""
        head = {"point": self.label, "seed": self.seed}
        return [
            head | {axis: _number(self.at[axis][index]) for axis in AXES} | {"metric": float(value)}
            for index, value in enumerate(self.metric)
        ]


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
    """A curve from metric histories, which are by step, that is, by meta-iterations.

    Args:
        label: of the point.
        seed: of the training.
        values: the metric at each validation.
        runs: at the end of each run, by the metric's name.
        communicates: whether there is more than one worker, so that there are merges.
    """
    steps = np.array(sorted(runs[_SECONDS]))
    notes = []
    seconds = _column(runs[_SECONDS], steps)
    compute = _column(runs[_CPU], steps) if runs[_CPU] else seconds
    merge = np.zeros(len(steps))
    if communicates:
        merge = _column(runs[_TRANSFER] or runs[_MERGE], steps)
        notes += [] if runs[_CPU] else [NO_CPU]
        notes += [] if runs[_TRANSFER] else [NO_TRANSFER]
    columns = {
        "run": _column(runs[_RUN], steps),
        "meta_iterations": steps.astype(float),
        "tasks_seen": _column(runs[_TASKS], steps),
        "wall_seconds": np.cumsum(seconds + merge),
        "computed_wall_seconds": np.cumsum(compute + merge),
    }
    judged = sorted(values)
    # A validation comes at the end of a run, and so has its step.
    places = np.clip(np.searchsorted(steps, judged), 0, len(steps) - 1)
    return Curve(
        label,
        seed,
        {axis: column[places] for axis, column in columns.items()},
        np.array([values[step] for step in judged]),
        {axis: float(column[-1]) for axis, column in columns.items()},
        tuple(notes),
    )


def _column(history: Mapping[int, float], steps: NDArray[np.int64]) -> Floats:
    return np.array([history.get(int(step), 0.0) for step in steps], dtype=np.float64)


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


# -- over seeds ----------------------------------------------------------------------------------------------------


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

    @property
    def metric(self) -> Floats:
        """Of each seed at each validation, (S, V)."""
        length = min(len(curve.metric) for curve in self.curves)
        return np.stack([curve.metric[:length] for curve in self.curves])

    def at(self, axis: str) -> Floats:
        """Where the validations lie on an axis: the mean over the seeds, (V,)."""
        length = self.metric.shape[1]
        return np.asarray(np.mean([curve.at[axis][:length] for curve in self.curves], axis=0))

    def total(self, axis: str) -> Floats:
        """The end of each seed's training on an axis, (S,)."""
        return np.array([curve.total[axis] for curve in self.curves])

    @property
    def mean(self) -> Floats:
        """Of the metric over the seeds, (V,)."""
        return np.asarray(self.metric.mean(axis=0))

    @property
    def band(self) -> tuple[Floats, Floats]:
        """One standard deviation below and above the mean; of fewer than three seeds, the lowest and the highest."""
        if len(self.curves) < 3:
            return self.metric.min(axis=0), self.metric.max(axis=0)
        spread = self.metric.std(axis=0, ddof=1)
        return self.mean - spread, self.mean + spread

    @property
    def final(self) -> Floats:
        """The final metric of each seed, (S,): the mean of the last tenth of its validations."""
        return np.array([final(curve.metric) for curve in self.curves])

    @property
    def best(self) -> float:
        """The best single validation of any seed."""
        return float(self.metric.max() if self.better == "max" else self.metric.min())

    def cost(self, target: float) -> dict[str, float]:
        """Where, on each axis, the smoothed mean over the seeds is first as good as `target`; empty if nowhere."""
        index = first_reached(smooth(self.mean), target, self.better)
        return {} if index is None else {axis: float(self.at(axis)[index]) for axis in AXES}


def smooth(values: Floats) -> Floats:
    """Trailing means over a tenth of all values, at least one; over fewer where there are not yet as many, (V,)."""
    window = max(len(values) // 10, 1)
    return np.array([values[max(end - window, 0) : end].mean() for end in range(1, len(values) + 1)])


def final(values: Floats) -> float:
    """The mean of the last tenth of the values, at least one."""
    return float(smooth(values)[-1])


def first_reached(values: Floats, target: float, better: Better) -> int | None:
    """Index of the first value at least as good as `target`."""
    good = values >= target if better == "max" else values <= target
    return int(np.argmax(good)) if good.any() else None


def spread(values: Floats) -> float:
    """Standard deviation over seeds; nan for a single one, and where one is infinite."""
    return float(values.std(ddof=1)) if len(values) > 1 and np.isfinite(values).all() else math.nan


def groups(study: Study, children: Sequence[Child]) -> list[Group]:
    """The finished trainings by point, in the order of the points."""
    curves: dict[str, list[Curve]] = {}
    for child in children:
        if not child.error:
            curves.setdefault(child.training.point.label, []).append(read_curve(study, child))
    return [Group(label, tuple(some), study.base.better) for label, some in curves.items()]
