"""Figures of the studies, drawn with matplotlib, which is imported only when a figure is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dmaml_pl.studies.results import Floats, Group, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2b2b2b", "#1f5fa8", "#d1495b", "#3a9a5b", "#e0912f", "#7a4fa3", "#4aa7b5", "#8a6d4a")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - takes a second, and is drawn rarely
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second, and is drawn rarely

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_curves(groups: Sequence[Group], axes: Sequence[tuple[str, str]], metric: str, title: str, path: Path) -> None:
    """The metric of each point over several axes, a panel each: the mean over seeds, and a band.

    Args:
        groups: a curve each.
        axes: names (`results.AXES`) and titles of the horizontal axes.
        metric: title of the vertical axis.
        title: of the whole.
        path: the PNG file.
    """
    rows, columns = (2, 2) if len(axes) == 4 else (1, len(axes))
    figure = new_figure(4.6 * columns, 3.6 * rows + 0.6)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = [panel for row in grid for panel in row]
    for (axis, name), panel in zip(axes, panels, strict=True):
        for number, group in enumerate(groups):
            colour = COLOURS[number % len(COLOURS)]
            low, high = group.band
            panel.plot(group.at(axis), group.mean, color=colour, linewidth=1.4, label=group.label)
            if len(group.curves) > 1:
                panel.fill_between(group.at(axis), low, high, color=colour, alpha=0.18, linewidth=0)
        panel.set_xlabel(name)
        if not axis.endswith("seconds"):
            panel.locator_params(axis="x", integer=True)
        plain(panel)
    for row in grid:
        row[0].set_ylabel(metric)
    seeds = min(len(group.curves) for group in groups)
    band = {1: "one seed", 2: "mean and range of 2 seeds"}.get(seeds, f"mean ± standard deviation of {seeds} seeds")
    figure.suptitle(f"{title} ({band})", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
    figure.savefig(path)


class Measured(NamedTuple):
    """A quantity for each label: its name, the means over seeds, and their standard deviations, 0 for a single seed."""

    name: str
    means: Sequence[float]
    errors: Sequence[float]

    @classmethod
    def of(cls, name: str, values: Sequence[Floats]) -> Measured:
        """From the values of each seed, for each label."""
        errors = [spread(one) for one in values]
        return cls(name, [float(one.mean()) for one in values], [0.0 if math.isnan(e) else e for e in errors])


def draw_bars(
    labels: Sequence[str],
    bars: tuple[str, Sequence[Measured]],
    points: Measured,
    title: str,
    path: Path,
) -> None:
    """Costs as bars, and beside them what they bought as points, for each label.

    Args:
        labels: one for each group of bars.
        bars: title of their axis, and the kinds of bars that stand side by side.
        points: what is drawn in the second panel, whose axis need not begin at zero.
        title: of the whole.
        path: the PNG file.
    """
    figure = new_figure(10.4, 1.9 + 0.55 * len(labels))
    left, right = figure.subplots(1, 2, sharey=True)
    places, (name, kinds) = np.arange(len(labels)), bars
    thickness, line = 0.75 / len(kinds), {"linewidth": 1, "ecolor": COLOURS[0]}
    for number, kind in enumerate(kinds):
        offset = (number - (len(kinds) - 1) / 2) * thickness
        colour = COLOURS[1 + number]
        left.barh(
            places + offset, kind.means, thickness, xerr=kind.errors, color=colour, label=kind.name, error_kw=line
        )
    right.errorbar(points.means, places, xerr=points.errors, fmt="o", color=COLOURS[1], linewidth=1)
    left.set_xlabel(name)
    right.set_xlabel(points.name)
    left.set_yticks(places, labels)
    left.invert_yaxis()
    for panel in (left, right):
        plain(panel)
    right.grid(axis="x", linewidth=0.4, alpha=0.6)
    figure.legend(loc="outside lower center", ncols=len(kinds), frameon=False, fontsize=9)
    figure.suptitle(f"{title} (mean ± standard deviation over seeds)", fontsize=10)
    figure.savefig(path)


def plain(axes: Axes) -> None:
    """Leave out the lines that say nothing."""
    axes.spines[["top", "right"]].set_visible(False)
