"""Tables as CSV, with raw numbers, and as Markdown, for people."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmaml_pl.studies.results import Floats, spread

NOTHING = "-"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows that share the keys of the first; what is None or not a number stays empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        for row in rows:
            writer.writerow({key: "" if _is_nothing(value) else value for key, value in row.items()})


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table whose columns line up in a terminal, too."""
    if not rows:
        return ""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    drawn = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    drawn.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(drawn)


def number(value: float | None) -> str:
    """Four significant digits; whole numbers in full."""
    if value is None or math.isnan(value):
        return NOTHING
    if abs(value) < 1e15 and (float(value).is_integer() or abs(value) >= 1000):
        return f"{value:.0f}"
    return f"{value:.4g}"


def with_spread(values: Floats) -> str:
    """Mean ± standard deviation over the seeds."""
    deviation = spread(values)
    text = number(float(values.mean()))
    return text if math.isnan(deviation) else f"{text} ± {deviation:.2g}"


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
