"""A display of long work: a bar on a terminal or in a notebook, else a plain line a minute; on standard error."""

import math
import os
import sys
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from dmaml_pl.console.notebook import MovingLine, in_notebook

PLAIN_SECONDS = "DMAML_PROGRESS_SECONDS"
"""Environment variable: seconds between two plain lines, 60 by default."""

REFRESH_PER_SECOND = 5
"""A terminal's bar is drawn so often at most."""

TASKS = "tasks"
"""What is counted beside the work, unless said otherwise."""

WINDOW_SECONDS = 30.0
"""The rate is that of so many seconds before now."""


class Meter:
    """Shows how far some work is: what is under way, how many of what a second, and the time left.

    Args:
        title: of the work.
        total: units of it; infinite where nobody knows.
        done: units that were done before.
        unit: of the work, for a plain line.
        counted: what is counted beside the units, of which the rate is told.
        before: how many of them there were before.
        announce: whether to tell of the beginning where there is no terminal.
    """

    def __init__(
        self,
        title: str,
        total: float,
        *,
        done: float = 0,
        unit: str = "",
        counted: str = TASKS,
        before: float = 0,
        announce: bool = True,
    ) -> None:
        self._total = total
        self._done_before = done
        self._unit = unit
        self._began = self._last_line = time.monotonic()
        self._next_look = 0.0
        self._between = float(os.environ.get(PLAIN_SECONDS, "60"))
        self._counted = counted
        self._counts = deque([(self._began, before)])
        self._bar: Progress | None = None
        self._line = MovingLine() if in_notebook() else None
        if self._line is not None:
            self._between = 1 / REFRESH_PER_SECOND
            self._line.show(done, total, f"{title} ...")
            return
        console = Console(stderr=True)
        # FORCE_COLOR, which notebooks and hosted CI set, makes rich take a pipe for a terminal.
        if not (console.is_terminal and sys.stderr.isatty()):
            if announce:
                say(f"{title[:1].upper()}{title[1:]} ...")
            return
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.fields[of]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            refresh_per_second=REFRESH_PER_SECOND,
            transient=True,
            expand=True,
            redirect_stdout=sys.stdout.isatty(),  # else what is printed meanwhile would not reach its file
        )
        endless = math.isinf(total)
        self._task = self._bar.add_task(
            title, total=None if endless else total, completed=int(done), of="?" if endless else f"{total:.0f}", rate=""
        )
        self._bar.start()

    def wants(self) -> bool:
        """Whether it is time to show something; asked so seldom that what is counted may be short."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + min(1 / REFRESH_PER_SECOND, self._between)
        return True

    def show(self, done: float, text: str, count: float | None = None) -> None:
        """Show the present state.

        Args:
            done: units of work.
            text: what is under way, and how well.
            count: so far, of what the rate is told of; None where there is nothing.
        """
        rate = "" if count is None else self._rate(count)
        if self._bar is not None:
            self._bar.update(self._task, completed=int(done), description=text, rate=rate)
        elif time.monotonic() - self._last_line >= self._between:
            self._last_line = time.monotonic()
            of = "" if math.isinf(self._total) else f"/{self._total:.0f}"
            words = ", ".join(filter(None, (text, f"{self._unit} {done:.0f}{of}".strip(), rate, self._left(done))))
            if self._line is None:
                say(words)
            else:
                self._line.show(done, self._total, words)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._line is not None:
            self._line.clear()
            self._line = None

    def restart_rate(self, before: float, counted: str = TASKS) -> None:
        """Count others from now on, so many of which are done, as the tasks of a validation in a training."""
        self._counted = counted
        self._counts = deque([(time.monotonic(), before)])

    def _rate(self, count: float) -> str:
        now = time.monotonic()
        self._counts.append((now, count))
        while len(self._counts) > 2 and now - self._counts[1][0] > WINDOW_SECONDS:
            self._counts.popleft()
        since, before = self._counts[0]
        rate = max(count - before, 0) / max(now - since, 1e-9)
        if self._counted != TASKS:
            return f"{brief(count)} {self._counted}, {rate:,.0f} a second"
        return f"{rate:.0f} tasks/s" if rate >= 10 else f"{rate:.1f} tasks/s"

    def _left(self, done: float) -> str:
        made = done - self._done_before
        if made <= 0 or math.isinf(self._total):
            return ""
        seconds = (time.monotonic() - self._began) / made * (self._total - done)
        return f"about {seconds / 60:.0f} min left" if seconds >= 60 else "less than a minute left"


def counted(count: int, thing: str) -> str:
    """A number of things in words, such as 1 run and 2 runs."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def brief(count: float) -> str:
    """A large count in few words, such as 1.2 M."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,.0f}"


def say(text: str) -> None:
    """A line on standard error, at once; a notebook would show it as an error there, and has it on standard output."""
    print(text, file=sys.stdout if in_notebook() else sys.stderr, flush=True)
