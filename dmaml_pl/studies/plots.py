"""Plots of the studies."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from dmaml_pl.studies.results import AXES, Group

COLOURS = ("#2b2b2b", "#1f5fa8", "#d1495b", "#3a9a5b", "#e0912f", "#7a4fa3", "#4aa7b5", "#8a6d4a")
DPI = 110


def colours_of(count: int) -> Iterable[Any]:
    """So many colours: chosen ones while there are enough, else in order from dark to light."""
    return COLOURS[:count] if count <= len(COLOURS) else colormaps["viridis"](np.linspace(0, 0.92, count))


def plot_curves(
    groups: Sequence[Group], axes: Sequence[str], metric: str, title: str, path: Path, *, log: Sequence[str] = ()
) -> None:
    """Plot the metric of each group, mean over seeds and a band, over several axes (`results.AXES`), a panel each.

    The axes in `log` are logarithmic.
    """
    rows, columns = (2, 2) if len(axes) == 4 else (1, len(axes))
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows + 0.6), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, panel in zip(axes, grid.flat, strict=True):
        for group, colour in zip(groups, colours_of(len(groups)), strict=False):
            places = group.mean[axis]
            panel.plot(places, group.mean["metric"], color=colour, linewidth=1.4, label=group.label)
            if len(group.curves) > 1:
                panel.fill_between(places, *group.band, color=colour, alpha=0.18, linewidth=0)
        panel.set_xlabel(AXES[axis])
        if axis in log:
            panel.set_xscale("log")
        elif axis == "env_steps":
            panel.xaxis.set_major_formatter(EngFormatter())
        elif not axis.endswith("seconds"):
            panel.locator_params(axis="x", integer=True)
        panel.spines[["top", "right"]].set_visible(False)
    for row in grid:
        row[0].set_ylabel(metric)
    seeds = min(len(group.curves) for group in groups)
    band = {1: "one seed", 2: "mean and range of 2 seeds"}.get(seeds, f"mean ± standard deviation of {seeds} seeds")
    figure.suptitle(f"{title} ({band})", fontsize=10)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
    figure.savefig(path)


def plot_costs(table: pd.DataFrame, label: str, metric: str, title: str, path: Path) -> None:
    """Plot wall times, measured and computed, as bars, and beside them the metric that they bought as points.

    The table has means, and their standard deviations, which are not there for a single seed; its column `label` names
    the bars. The axis of the metric, the column of the points, need not begin at zero.
    """
    figure = Figure(figsize=(10.4, 1.9 + 0.55 * len(table)), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places, thickness = np.arange(len(table)), 0.375
    deviations = table.filter(regex="^sd$|_sd$").fillna(0.0)
    for side, colour, column, name in (
        (-0.5, COLOURS[1], "wall_seconds", "measured here"),
        (0.5, COLOURS[2], "computed_wall_seconds", "computed, one machine per worker"),
    ):
        line = {"linewidth": 1, "ecolor": COLOURS[0]}
        wide, far = table[column], deviations[f"{column}_sd"]
        left.barh(places + side * thickness, wide, thickness, xerr=far, color=colour, label=name, error_kw=line)
    right.errorbar(table[metric], places, xerr=deviations["sd"], fmt="o", color=COLOURS[1], linewidth=1)
    left.set_xlabel("wall time (s)")
    right.set_xlabel(metric)
    left.set_yticks(places, table[label])
    left.invert_yaxis()
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    right.grid(axis="x", linewidth=0.4, alpha=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(f"{title} (mean ± standard deviation over seeds)", fontsize=10)
    figure.savefig(path)


def plot_predicted(
    table: pd.DataFrame, networks: Sequence[str], metric: str, target: float, title: str, path: Path
) -> None:
    """Plot meta-iterations to a target, and the seconds predicted on each network, over the number of workers.

    The table is that of a study of simulated workers; each of its `averages` is a line.
    """
    panels = {
        "meta_iterations_to_target": "meta-iterations of a worker",
        **{f"seconds_to_target_{name}": f"predicted s, {name}" for name in networks},
    }
    figure = Figure(figsize=(3.7 * len(panels), 4.0), dpi=DPI, layout="constrained")
    lines = [*table.groupby("averages", sort=False)]
    counts = sorted(table["workers"].unique())
    for (column, name), panel in zip(panels.items(), figure.subplots(1, len(panels), squeeze=False).flat, strict=True):
        for (label, rows), colour in zip(lines, colours_of(len(lines)), strict=True):
            panel.plot(rows["workers"], rows[column], "o-", color=colour, markersize=3.5, linewidth=1.4, label=label)
        first = table[column].iloc[0]
        panel.plot(counts, [first / count for count in counts], ":", color="#999999", label="one worker's / W")
        panel.set(xscale="log", yscale="log", xlabel="workers", title=name)
        panel.title.set_size(10)
        low, high = table[column].min(), table[column].max()
        if low > 0:
            panel.set_ylim(low / 2, high * 2)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter() if high > 100 * low else _twos_and_fives)
        ticks = counts if len(counts) <= 6 else counts[::2]
        panel.set_xticks(ticks, [str(count) for count in ticks], minor=False)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(which="major", linewidth=0.4, alpha=0.5)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    figure.suptitle(f"{title}: to {metric} {target:.4g}", fontsize=10)
    figure.savefig(path)


def _twos_and_fives(value: float, _: Any) -> str:
    """Labels of a logarithmic axis between those of its powers of ten."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""
