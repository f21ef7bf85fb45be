"""Tables for people: on the terminal, and as Markdown in reports."""

import io
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import HEAVY_HEAD, MARKDOWN, Box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

NOTHING = "-"

Rows = Sequence[Mapping[str, Any]]
"""By column name; all rows have the columns of the first. Real numbers are shown with four decimals, None as `-`."""

_UNBOUND = 100_000
"""The width of what no terminal shows: nothing is folded that another program reads, or that Markdown must not fold."""

_NUMBER = re.compile(r"(-|nan|[-+]?\d[\d.,]*(e[-+]?\d+)?( ± (nan|[\d.,]+(e[-+]?\d+)?))?)")


def print_table(rows: Rows, title: str = "") -> None:
    """Print a table on standard output, below its title, folded to the width of a terminal where there is one."""
    console = _stdout()
    if title:
        console.print(Text(f"\n{title}"))
    console.print(_table(rows, HEAVY_HEAD))


def fits(rows: Rows) -> bool:
    """Whether a table is no wider than the terminal, where there is one."""
    console = _stdout()
    return (
        Measurement.get(console, console.options.update(width=_UNBOUND), _table(rows, HEAVY_HEAD)).maximum
        <= console.width
    )


def _stdout() -> Console:
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _UNBOUND)


def markdown(rows: Rows) -> str:
    """A Markdown table, whose columns line up as plain text, too; empty where there are no rows."""
    if not rows:
        return ""
    escaped = [{_escaped(name): _escaped(value) for name, value in row.items()} for row in rows]
    console = Console(file=io.StringIO(), width=_UNBOUND, color_system=None, force_jupyter=False)
    with console.capture() as capture:
        console.print(_table(escaped, MARKDOWN))
    return capture.get().strip()


def _table(rows: Rows, box: Box) -> Table:
    table = Table(box=box)
    cells = [[_text(value) for value in row.values()] for row in rows]
    for column, name in enumerate(rows[0] if rows else ()):
        is_number = all(_NUMBER.fullmatch(row[column]) for row in cells)
        table.add_column(Text(name), justify="right" if is_number else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def _text(value: Any) -> str:
    return NOTHING if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _escaped(value: Any) -> str:
    return _text(value).replace("|", "\\|")
