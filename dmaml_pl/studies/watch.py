"""What a study shows while its trainings are made: which, what it says of itself, and the time left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dmaml_pl.console.meter import Meter
from dmaml_pl.studies.runner import Job

TAIL_BYTES = 4096


class Watch:
    """Shows progress over trainings, and prints their results above it, until it is closed.

    Args:
        what: said before each line.
        trainings: to be made.
    """

    def __init__(self, what: str, trainings: int) -> None:
        self._what = what
        self._done = 0
        self._meter = Meter(f"{what}trainings", trainings, unit="trainings", announce=False)
        self.close = self._meter.close

    def look(self, running: Sequence[Job]) -> None:
        """Show the trainings that are under way; called about every second."""
        if running:
            first = running[0]
            others = f" (and {len(running) - 1} more)" if len(running) > 1 else ""
            said = last_line(first.log)
            self._meter.show(self._done, f"{self._what}{first.key.label}{others}" + (f": {said}" if said else ""))

    def ended(self, text: str) -> None:
        """Tell that a training is over, and its result, on standard output, above the bar."""
        self._done += 1
        print(text, flush=True)


def last_line(log: Path) -> str:
    """The last line of a log."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(os.fstat(stream.fileno()).st_size - TAIL_BYTES, 0))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""
