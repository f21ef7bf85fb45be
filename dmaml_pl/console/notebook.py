"""What a notebook shows: pictures, and a line of progress that moves. IPython is there where a notebook is, only."""

import html
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def in_notebook() -> bool:
    """Whether this process computes what a notebook asks for."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def show_pictures(files: Iterable[Path]) -> None:
    """Display picture files where a notebook shows them; elsewhere do nothing."""
    if in_notebook():
        display = sys.modules["IPython"].display
        for file in files:
            if file.suffix in (".png", ".gif"):
                display.display(display.Image(filename=str(file)))


class MovingLine:
    """A bar and words beside it, in one place of a notebook's output."""

    def __init__(self) -> None:
        display: Any = sys.modules["IPython"].display
        self._handle = display.display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, done: float, total: float, words: str) -> None:
        """Show how far some work is; `total` is infinite where nobody knows."""
        full = "" if math.isinf(total) else f'<progress value="{done}" max="{total}"></progress> '
        self._handle.update({"text/plain": words, "text/html": full + html.escape(words)}, raw=True)

    def clear(self) -> None:
        """Take it away."""
        self._handle.update({"text/plain": "", "text/html": ""}, raw=True)
