"""Figures of a meta-test, plotted with matplotlib, which is imported only when something is plotted.

Legend: T tasks, S support points, Q query points, I adaptation steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmaml_pl.data import PlottedTasks
from dmaml_pl.evaluation.curves import BASELINE, ORACLE, TITLES, TRAINED, UNTRAINED, MetaTest, half_width
from dmaml_pl.evaluation.drawing import BLACK, BLUE, GREY, LIGHT_BLUE, ORANGE, RED, after, entitle, new_figure
from dmaml_pl.evaluation.policy_figures import plot_policies
from dmaml_pl.tasks import ActingSource, TaskBatch

TALL = 1.25
"""Height of a row of pictures with what is said of them, by the width of a picture and its margin."""

MANY_WAYS = 12
"""With more ways, a confusion matrix is shown by its colours alone."""


def plot_meta_test(result: MetaTest, module: Any, data: Any, count: int, folder: Path) -> dict[str, str]:
    """Plot a meta-test below a folder, with `count` tasks where the data module gives some; captions by file."""
    curve, some, confused = (f"figures/{name}.png" for name in ("adaptation_curve", "tasks", "confusion"))
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    plot_adaptation_curve(result, folder / curve)
    if isinstance(data, ActingSource):
        return {curve: "The return over adaptation steps"} | plot_policies(result, module, data, count, folder)
    captions = {curve: "The metric over adaptation steps"}
    plotted: PlottedTasks | None = data.tasks_to_plot(count) if hasattr(data, "tasks_to_plot") else None
    if plotted is None:
        return captions
    predictions = module.predictions_from(plotted.tasks).cpu()
    if result.objective.name == "regression":
        shown = tuple(sorted({0, min(1, result.steps), result.steps}))
        plot_regression_tasks(plotted, predictions, shown, folder / some)
        return captions | {some: "Some tasks, before and after adaptation"}
    plot_image_tasks(plotted, predictions, result.steps, folder / some)
    plot_confusion(plotted.tasks, predictions, result.steps, folder / confused)
    return captions | {
        some: "Some tasks: support, queries, and what they were taken for",
        confused: "Which classes of a task are taken for which others",
    }


def plot_adaptation_curve(result: MetaTest, path: Path) -> None:
    """Mean and 95 % confidence band of the metric over adaptation steps, of each network."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    steps = range(result.steps + 1)
    for name, colour in ((UNTRAINED, GREY), (BASELINE, ORANGE), (TRAINED, BLUE)):
        if name in result.metrics:
            values = result.metrics[name]
            mean, width = values.mean(dim=0), half_width(values)
            axes.plot(steps, mean, color=colour, marker="o", markersize=4, label=TITLES[name])
            axes.fill_between(steps, mean - width, mean + width, color=colour, alpha=0.2, linewidth=0)
    if ORACLE in result.metrics:
        best = result.metrics[ORACLE].mean(dim=0)
        axes.plot(steps, best, color=BLACK, linestyle=":", linewidth=1.2, label=TITLES[ORACLE])
    acts = result.objective.acts
    axes.set(xticks=steps, xlabel="adaptation steps", ylabel=result.objective.title + " on query samples" * (not acts))
    axes.set_title(f"Adaptation to {result.tasks} held-out tasks (mean, 95 % confidence)", fontsize=10)
    if not acts:
        axes.set_ylim(0, 1 if result.objective.metric == "accuracy" else None)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(result.metrics), frameon=False, fontsize=9)
    figure.savefig(path)


def plot_regression_tasks(plotted: PlottedTasks, predictions: Tensor, shown: tuple[int, ...], path: Path) -> None:
    """Tasks of one input and one output: the truth, the support points, and the predictions after some steps.

    `predictions` are (T, I + 1, Q, 1).
    """
    tasks = plotted.tasks
    figure = new_figure(3.3 * tasks.tasks, 3.2)
    panels = figure.subplots(1, tasks.tasks, sharey=True, squeeze=False)[0]
    for number, axes in enumerate(panels):
        task = tasks.task(number)
        x, truth, *support = (each.squeeze(-1) for each in (task.query_x, task.query_y, task.support_x, task.support_y))
        if plotted.queries_are_curves:
            axes.plot(x, truth, color=BLACK, linewidth=1.5, label="true curve")
        else:
            axes.scatter(x, truth, color=BLACK, s=12, zorder=4, label="query points")
        for place, step in enumerate(shown):
            axes.plot(
                x,
                predictions[number, step].squeeze(-1),
                color=GREY if step == 0 else BLUE if place == len(shown) - 1 else LIGHT_BLUE,
                linestyle="--" if step == 0 else "-",
                linewidth=1.2,
                label=after(step),
            )
        axes.scatter(*support, color=RED, s=18, zorder=5, label="support points")
        axes.set_title(f"task {number}", fontsize=9)
        axes.set_xlabel(plotted.x_label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(plotted.y_label)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    figure.savefig(path)


def plot_image_tasks(plotted: PlottedTasks, predictions: Tensor, step: int, path: Path) -> None:
    """Tasks of images (C, H, W): one support image of each class, and query images framed by right and wrong.

    `predictions` are logits (T, I + 1, Q, N), of which those after `step` steps are shown.
    """
    tasks, greys = plotted.tasks, "gray_r" if plotted.ink_is_bright else "gray"
    count, ways = tasks.tasks, predictions.shape[-1]
    queries = min(10, tasks.query_y.shape[1])
    columns = ways + queries
    figure = new_figure(0.75 * columns, 0.95 * count + 0.5)
    axes = figure.subplots()  # one for all pictures, as one for each takes seconds
    axes.set_axis_off()
    for row in range(count):
        task, top = tasks.task(row), TALL * row
        guess = predictions[row, step].argmax(dim=-1).tolist()
        pick = torch.linspace(0, len(task.query_y) - 1, queries).long().tolist()
        firsts = [int((task.support_y == way).nonzero()[0]) for way in range(ways)]
        right = [guess[query] == int(task.query_y[query]) for query in pick]
        titles = [*(f"class {way}" for way in range(ways)), *(str(guess[query]) for query in pick)]
        colours = [BLACK] * ways + [BLUE if is_right else RED for is_right in right]
        pictures = [*task.support_x[firsts], *task.query_x[pick]]
        for left, (picture, title, colour) in enumerate(zip(pictures, titles, colours, strict=True)):
            place = (left + 0.05, left + 0.95, top + 0.9, top)
            shown = picture.permute(1, 2, 0).numpy()  # (H, W, 1) is grey
            axes.imshow(shown, cmap=greys, vmin=0, vmax=1, extent=place)
            width = 0.8 if colour == BLACK else 2
            axes.plot(*_frame(*place), color=colour, linewidth=width, solid_joinstyle="miter")
            axes.text(left + 0.5, top - 0.05, title, color=colour, fontsize=7, ha="center", va="bottom")
    axes.set(xlim=(0, columns), ylim=(TALL * count - 0.32, -0.25))
    title = f"A support sample per class, and queries with their predicted class after {step} adaptation steps"
    entitle(figure, f"{title} (blue right, red wrong)")
    figure.savefig(path)


def _frame(left: float, right: float, bottom: float, top: float) -> tuple[list[float], list[float]]:
    """A closed line around a picture."""
    return [left, right, right, left, left], [bottom, bottom, top, top, bottom]


def plot_confusion(tasks: TaskBatch, predictions: Tensor, step: int, path: Path) -> None:
    """Which classes of a task are taken for which others, after `step` steps: a matrix a task.

    `predictions` are logits (T, I + 1, Q, N). The classes have the numbers that `plot_image_tasks` shows.
    """
    count, ways = tasks.tasks, predictions.shape[-1]
    size = min(max(2.6, 0.42 * ways + 1.0), 7.0)
    figure = new_figure(size * count, size + 0.5)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for number, axes in enumerate(panels):
        task = tasks.task(number)
        matrix = confusion(predictions[number, step], task.query_y)
        axes.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=max(int(matrix.sum(dim=1).max()), 1))
        for true, said in matrix.nonzero().tolist() if ways <= MANY_WAYS else ():
            times = int(matrix[true, said])
            colour = "white" if times > matrix.max() / 2 else BLACK
            axes.text(said, true, str(times), ha="center", va="center", color=colour, fontsize=8)
        axes.set_title(f"task {number}: {float(matrix.trace() / matrix.sum()):.2f}", fontsize=9)
        axes.set_xlabel("predicted class", fontsize=8)
        axes.set_ylabel("true class", fontsize=8)
        axes.locator_params(integer=True, nbins=MANY_WAYS)
    entitle(figure, f"Confusion within a task: query samples after {step} adaptation steps")
    figure.savefig(path)


def confusion(logits: Tensor, targets: Tensor) -> Tensor:
    """How often each class (rows) was taken for each (columns), (N, N), from logits (Q, N) and classes (Q,)."""
    ways = logits.shape[-1]
    pairs = targets.cpu() * ways + logits.cpu().argmax(dim=-1)
    return torch.bincount(pairs, minlength=ways * ways).reshape(ways, ways)
