"""Figures of a meta-test of policies: what they do, and how they came to it.

Legend: I adaptation steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmaml_pl.evaluation.curves import MetaTest, Validation
from dmaml_pl.evaluation.drawing import BLUE, GREY, LIGHT_BLUE, ORANGE, RED, after, in_colours, new_figure
from dmaml_pl.tasks import ActingSource

SHOWN = (0, 1, 3)
"""Adaptation steps before the rollouts that are drawn, as in the MAML paper."""


def plot_policies(result: MetaTest, module: Any, data: Any, count: int, folder: Path) -> dict[str, str]:
    """Plot the return over the training, and rollouts in `count` tasks where the data module can draw some.

    Returns:
        Captions by file below the folder.
    """
    learned, rolled = (f"figures/{name}.png" for name in ("learning_curve", "rollouts"))
    captions = dict[str, str]()
    if module.validations:
        plot_learning_curve(module.validations, result.inner_steps, folder / learned)
        captions[learned] = "The return at each validation over the steps in environments"
    tasks = data.evaluation_tasks("test", range(min(count, result.tasks)))
    made = module.rollouts_from(tasks)
    by_time = {after(step): made[step] for step in SHOWN if step < len(made)}
    figure = new_figure(max(3.2 * tasks.tasks, 6.0), 3.7)  # a legend has room
    with in_colours(GREY, LIGHT_BLUE, BLUE):
        if caption := data.plot_rollouts(tasks.chosen, by_time, figure):
            figure.savefig(folder / rolled)
            captions[rolled] = caption
    return captions


def plot_learning_curve(validations: Sequence[Validation], inner_steps: int, path: Path) -> None:
    """Mean return, with 95 % confidence bands, over steps in environments, before and after adaptation."""
    from matplotlib.ticker import EngFormatter  # noqa: PLC0415 - takes a second, and is needed rarely

    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    places, last = [each.env_steps for each in validations], len(validations[0].returns) - 1
    shown = sorted({0, inner_steps, last, *(step for step in SHOWN if step <= last)})
    colours = [GREY, LIGHT_BLUE, BLUE, ORANGE, RED]
    for step, colour in zip(shown, colours, strict=False):
        mean = [each.returns[step] for each in validations]
        below, above = ([r[step] + sign * w[step] for _, r, w in validations] for sign in (-1, 1))
        axes.plot(places, mean, color=colour, marker="o", markersize=3, linewidth=1.4, label=after(step))
        axes.fill_between(places, below, above, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="steps in environments, of all workers", ylabel="return")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_title("Return of the validation tasks (mean, 95 % confidence)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(shown), frameon=False, fontsize=9)
    figure.savefig(path)


def film_policies(module: Any, data: Any, count: int, folder: Path) -> dict[str, str]:
    """Film the adapted policy in `count` tasks, as GIFs; says in a line where that cannot be.

    Returns:
        Captions by file below the folder.
    """
    from PIL import Image  # noqa: PLC0415 - needed rarely

    if not isinstance(data, ActingSource):
        print(f"No clips: report.clips is {count}, but the data has no environments.")
        return {}
    environments: Any = data
    tasks = environments.evaluation_tasks("test", range(count))
    captions = dict[str, str]()
    for place in range(count):
        pictures = module.film_from(tasks, place)
        if pictures is None:
            print("No clips: the environments draw no pictures here; those of MuJoCo take EGL (Debian: libegl1).")
            return captions
        first, *others = [Image.fromarray(each) for each in pictures]
        file = f"figures/clip_{place}.gif"
        first.save(folder / file, save_all=True, append_images=others, duration=50, loop=0)
        captions[file] = f"The policy adapted to the task {tasks.chosen[place]}"
    return captions
