"""A user's own figures: CSV files with a header, whose columns are a sample's inputs, and then its targets.

Legend: B samples, D outputs of a regression.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmaml_pl.errors import DataError


@dataclass(frozen=True)
class Columns:
    """A table of figures.

    Attributes:
        inputs: names of the input columns.
        targets: names of the target columns; empty where the file has none.
        x: inputs, (B, inputs).
        y: targets (B, D); None where the file has none.
    """

    inputs: list[str]
    targets: list[str]
    x: Tensor
    y: Tensor | None


def read_columns(
    option: str,
    path: Path,
    inputs: int,
    outputs: int,
    *,
    needs_targets: bool,
    names: tuple[list[str], list[str]] | None = None,
) -> Columns:
    """Read a CSV file.

    Args:
        option: by which the user named it.
        path: the file.
        inputs: figures of a sample.
        outputs: D, targets of a sample.
        needs_targets: whether it must have targets, as a support set must.
        names: of the input columns and of the target columns, where the training gave them names. The file then has
            them in any order, and may have others; else they are told by their place.

    Raises:
        DataError: names the file, and the line where it is broken.
    """
    header, rows = _read(option, path, names)
    both = f"{inputs + outputs} ({inputs} of input, {outputs} of target)"
    if len(header) != inputs + outputs and (needs_targets or len(header) != inputs):
        alone = "" if needs_targets else f", or {inputs} without targets"
        raise DataError(f"{option} {path} has {len(header)} columns, but the network was trained for {both}{alone}.")
    values = torch.tensor(rows)
    has_targets = len(header) > inputs
    return Columns(header[:inputs], header[inputs:], values[:, :inputs], values[:, inputs:] if has_targets else None)


def _read(option: str, path: Path, names: tuple[list[str], list[str]] | None) -> tuple[list[str], list[list[float]]]:
    if not path.is_file():
        raise DataError(f"{option} is {path}, but there is no such file: a CSV file with a header is expected.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            lines = [(reader.line_num, line) for line in reader if any(cell.strip() for cell in line)]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{option} {path} cannot be read as CSV ({error}).") from error
    if len(lines) < 2:
        raise DataError(f"{option} {path} is empty: a header and one or more lines of figures are expected.")
    header = [cell.strip() for cell in lines[0][1]]
    if all(_number(cell) is not None for cell in header):
        raise DataError(f"{option} {path} begins with figures: its first line must name the columns.")
    chosen = header if names is None else _chosen(option, path, header, *names)
    places = [header.index(name) for name in chosen] if names is not None else list(range(len(header)))
    return chosen, [_figures(option, path, number, line, len(header), places) for number, line in lines[1:]]


def _chosen(option: str, path: Path, header: list[str], inputs: list[str], targets: list[str]) -> list[str]:
    """The columns of a training that a file has: all of the inputs, and all of the targets or none."""
    wanted = [*inputs, *targets] if any(name in header for name in targets) else inputs
    missing = [name for name in wanted if header.count(name) != 1]
    if missing:
        raise DataError(
            f"{option} {path} has the columns {', '.join(header)}, but must have {missing[0]} once: the network was "
            f"trained on {', '.join(inputs)} to predict {', '.join(targets)}."
        )
    return wanted


def _figures(option: str, path: Path, number: int, line: list[str], columns: int, places: list[int]) -> list[float]:
    if len(line) != columns:
        raise DataError(f"{option} {path}, line {number}: {len(line)} columns, but the header has {columns}.")
    figures = []
    for cell in (line[place] for place in places):
        figure = _number(cell)
        if figure is None:
            raise DataError(f"{option} {path}, line {number}: {cell!r} is not a finite number.")
        figures.append(figure)
    return figures


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
