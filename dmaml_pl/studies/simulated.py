"""The study of workers by simulation: up to many more than there are cores, and the time that they would take.

A training of one worker is made as it is, and its meta-iterations are timed; all others are simulated. From what was
timed, and from what a merge sends, follows the time of a run of so many machines, joined by one network or another.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from dmaml_pl.console.tables import NOTHING
from dmaml_pl.errors import ConfigError, TrackingError
from dmaml_pl.simulation.time_model import Network, Seconds, seconds_of_run
from dmaml_pl.studies.plan import Point, label_of
from dmaml_pl.studies.plots import plot_curves, plot_predicted
from dmaml_pl.studies.report import SMOOTHED, Columns, Report, number, publish
from dmaml_pl.studies.results import Group, final, groups
from dmaml_pl.studies.settings_files import Settings
from dmaml_pl.studies.study import Study

PLOTTED = ("run", "tasks_seen")
PREDICTED = (
    "*Predicted* seconds are those of as many machines as workers, each like this one: of every run the slowest "
    "worker's, expected from the seconds on a core of one worker's meta-iterations, which were measured here, and the "
    "all-reduces. Start-up and validation are not in them."
)

Own = Mapping[int, Settings]


@dataclass(frozen=True)
class Plan:
    """What is simulated.

    Attributes:
        workers: numbers of them.
        lengths: further lengths of runs than the configuration's, in meta-iterations.
        networks: that may join the workers.
        own: settings of a number of workers.
        gradients: those with which gradients are averaged at every meta-iteration, too; none leaves that out.
        target: metric to which runs and time are counted; None for what one worker ends with.
    """

    workers: Sequence[int]
    lengths: Sequence[int]
    networks: Sequence[Network]
    own: Own
    gradients: Own
    target: float | None


@dataclass(frozen=True)
class Case:
    """A point of the study: what is trained, W, H, and whether "weights" are averaged, or "gradients"."""

    point: Point
    workers: int
    length: int
    averages: str

    @property
    def name(self) -> str:
        """Whatever the number of workers."""
        return f"weights, runs of {self.length}" if self.averages == "weights" else "gradients"


def conduct(study: Study, plan: Plan) -> None:
    """Train one worker, simulate the others, and predict the time of each.

    Raises:
        ConfigError: the strategy has no runs that could be simulated.
    """
    cases = [*_cases(study, plan)]
    points = [case.point for case in cases]
    study.check(points)
    with study.open({"workers": " ".join(map(str, plan.workers)), "simulate": True, "seeds": study.request.seeds}):
        children = study.train(study.trainings(points))
        found = groups(study, children)
        if points[0] in found:
            sent: dict[Point, dict[str, float]] = {
                c.training.point: study.ledger.metrics(c) for c in children if c.run_id
            }
            made = [(case, found[case.point], sent[case.point]) for case in cases if case.point in found]
            publish(study, _report(study, plan, made, _measured(study)), [group for _, group, _ in made])


def _cases(study: Study, plan: Plan) -> Iterator[Case]:
    """One worker first, whose times are measured."""
    usual = study.base.whole(study.base.run_length_setting)
    workers = sorted({1, *plan.workers})
    file = {"file": str(study.folder / "times.npy")}
    times = json.dumps({"class_path": "dmaml_pl.simulation.times.MetaIterationTimes", "init_args": file})
    yield Case(Point(label_of(1), 1, (*plan.own.get(1, ()), ("trainer.callbacks+", times))), 1, usual, "weights")
    for length in dict.fromkeys([usual, *plan.lengths]):
        # A validation after as many meta-iterations, as far as runs allow.
        other = (
            (study.base.run_length_setting, str(length)),
            ("trainer.val_check_interval", str(max(usual // length, 1))),
        )
        lasts: Settings = () if length == usual else other
        for count in workers:
            if (count, length) != (1, usual):
                label = label_of(count) + (f", runs of {length}" if length != usual else "")
                point = _simulated(study, label, count, "weights", (*plan.own.get(count, ()), *lasts))
                yield Case(point, count, length, "weights")
    for count, own in sorted(plan.gradients.items()):
        point = _simulated(study, f"{label_of(count)}, gradients", count, "gradients", own)
        yield Case(point, count, usual, "gradients")


def _simulated(study: Study, label: str, workers: int, averages: str, settings: Settings) -> Point:
    strategy: Any = study.base.find("trainer.strategy")
    given: Mapping[str, Any] = strategy if isinstance(strategy, Mapping) else {"class_path": str(strategy)}
    kind = given["class_path"].rpartition(".")[2]
    if kind not in ("DMAMLStrategy", "dmaml"):
        raise ConfigError(f"trainer.strategy is {kind}, but must be DMAMLStrategy for workers to be simulated.")
    init = {**given.get("init_args", {}), "workers": workers, "averages": averages}
    whole = json.dumps({"class_path": "dmaml_pl.SimulatedStrategy", "init_args": init})
    return Point(label, 1, (("trainer.strategy", whole), *settings))  # one process has them all


def _measured(study: Study) -> Seconds:
    file = study.folder / "times.npy"
    try:
        found: Seconds = np.load(file)
    except OSError as error:
        raise TrackingError(f"{file}, which holds the measured times, cannot be read: give another --name.") from error
    return found


def _report(
    study: Study, plan: Plan, made: Sequence[tuple[Case, Group, Mapping[str, float]]], measured: Seconds
) -> Report:
    """Make the table and the plots; one worker comes first."""
    metric, (case, one, _) = study.base.metric, made[0]
    whose = f"what {one.label} ends with" if plan.target is None else "the metric asked for"
    target = final(one.mean["metric"]) if plan.target is None else plan.target
    rows = []
    for case, group, sent in made:
        row: dict[str, Any] = {"averages": case.name, "workers": case.workers, "run_length": case.length}
        row |= {**group.summary(metric), "target": target, **group.cost(target)}
        for network in plan.networks:
            at_end, each = sent.get("merge/bytes", 0.0), sent.get("merge/gradient_bytes")
            each = 0.0 if case.averages == "gradients" and each is None else each
            run = seconds_of_run(measured, case.workers, case.length, network, at_end, each)
            row[f"run_seconds_{network.name}"] = run
            row[f"seconds_to_target_{network.name}"] = run * row["run_to_target"]
        rows.append(row)
    table = pd.DataFrame(rows)
    steps = table["meta_iterations_to_target"]
    table = table.assign(times_fewer=steps.iloc[0] / steps)
    shown: Columns = {
        "averages": "averages",
        "workers": "workers",
        f"final {metric}": (f"final {metric}", "sd"),
        f"runs to {number(target)}": "run_to_target",
        "meta-iterations": "meta_iterations_to_target",
        "times fewer": "times_fewer",
        "tasks to it": "tasks_seen_to_target",
        **{f"s to it, {network.name}": f"seconds_to_target_{network.name}" for network in plan.networks},
    }
    reached = f"{number(target)} is {whose}, reached as in a study of real workers."
    spread = (
        f"One worker's meta-iterations took {number(1e3 * float(np.median(measured)))} ms here (median; mean "
        f"{number(1e3 * float(measured.mean()))}, 99 of 100 below {number(1e3 * float(np.quantile(measured, 0.99)))})."
    )
    notes = [SMOOTHED, reached, PREDICTED, spread, *(_fastest(table, network) for network in plan.networks)]
    title = f"{metric} by number of workers, simulated"
    usual = [group for case, group, _ in made if case.name == made[0][0].name]
    named = f"{study.base.experiment_name}: {title}"
    plots = {
        "workers.png": partial(plot_curves, usual, PLOTTED, metric, named, log=["tasks_seen"]),
        "predicted.png": partial(
            plot_predicted, table, [network.name for network in plan.networks], metric, target, named
        ),
    }
    return Report(title, {"table.csv": table}, shown, notes, plots)


def _fastest(table: pd.DataFrame, network: Network) -> str:
    """What is fastest on a network, for each way to average."""
    column = f"seconds_to_target_{network.name}"
    said = []
    for averages, rows in table.groupby(table["averages"].str.partition(",")[0], sort=False):
        if rows[column].notna().any():
            best = rows.loc[rows[column].idxmin()]
            runs = f" in runs of {best['run_length']}" if averages == "weights" else ""
            said.append(f"{averages} averaged {number(best[column])} s, with {label_of(best['workers'])}{runs}")
    return f"Predicted to be fastest on {network.name}: {'; '.join(said) or NOTHING}."
