"""How figures look; matplotlib is imported only when something is plotted."""

from __future__ import annotations

import textwrap
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, LIGHT_BLUE, GREY, BLACK, RED, ORANGE = "#1f5fa8", "#6fb1e8", "#b0b0b0", "#2b2b2b", "#d1495b", "#d98b1f"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, so many inches large, whose parts keep clear of each other."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second, and is needed rarely

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def entitle(figure: Figure, text: str) -> None:
    """Set a title above all panels of a figure, in as many lines as its width asks for."""
    letters = int(15 * figure.get_figwidth())  # of nine points, an inch has some sixteen
    figure.suptitle(textwrap.fill(text, letters), fontsize=9)


def in_colours(*colours: str) -> AbstractContextManager[object]:
    """What is drawn and saved inside has these for its colours "C0", "C1" and so on."""
    from matplotlib import rc_context  # noqa: PLC0415 - as above
    from matplotlib.rcsetup import cycler  # noqa: PLC0415 - as above

    return rc_context({"axes.prop_cycle": cycler(color=colours)})


def after(steps: int) -> str:
    """When something was, in words."""
    return "before adaptation" if steps == 0 else f"after {steps} step{'s' if steps > 1 else ''}"
