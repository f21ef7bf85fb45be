"""Figures of the studies, drawn with matplotlib, which is imported only when a figure is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dmaml_pl.studies.results import Group

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
        plain(panel)
    for row in grid:
        row[0].set_ylabel(metric)
    seeds = min(len(group.curves) for group in groups)
    band = {1: "one seed", 2: "mean and range of 2 seeds"}.get(seeds, f"mean ± standard deviation of {seeds} seeds")
    figure.suptitle(f"{title} ({band})", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
    figure.savefig(path)


def draw_bars(
    labels: Sequence[str],
    panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[float], Sequence[float]]]]],
    title: str,
    path: Path,
) -> None:
    """Bars beside each other for each label, a panel for each quantity.

    Args:
        labels: one for each group of bars.
        panels: title of the horizontal axis, and the kinds of bars: name, lengths, and their standard deviations.
        title: of the whole.
        path: the PNG file.
    """
    figure = new_figure(5.2 * len(panels), 1.6 + 0.55 * len(labels))
    drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    places = np.arange(len(labels))
    for panel, (name, kinds) in zip(drawn, panels, strict=True):
        thickness = 0.75 / len(kinds)
        for number, (kind, lengths, errors) in enumerate(kinds):
            panel.barh(
                places + (number - (len(kinds) - 1) / 2) * thickness,
                lengths,
                thickness,
                xerr=np.nan_to_num(np.asarray(errors, dtype=float)),
                color=COLOURS[1 + number],
                alpha=0.85,
                label=kind,
                error_kw={"linewidth": 1, "ecolor": "#2b2b2b"},
            )
        panel.set_xlabel(name)
        panel.set_yticks(places, labels)
        if len(kinds) > 1:
            panel.legend(frameon=False, fontsize=8)
        plain(panel)
    drawn[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def plain(axes: Axes) -> None:
    """Leave out the lines that say nothing."""
    axes.spines[["top", "right"]].set_visible(False)
