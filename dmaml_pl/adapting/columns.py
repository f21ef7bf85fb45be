"""A user's own numbers: CSV files with a header, whose columns are a sample's inputs, and then its targets.

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
    """A table of numbers.

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
        inputs: numbers of a sample.
        outputs: D, targets of a sample.
        needs_targets: whether it must have targets, as a support set must.
        names: of the input columns and of the target columns, where the training gave them names. The file then has
            them in any order, and may have others; else they are told by their place.

    Raises:
        DataError: names the file, and the line where it is broken.
    """
    file = f"{option} {path}"
    header, lines = _read(file, path)
    places = list(range(len(header))) if names is None else _places(file, header, *names)
    if len(places) != inputs + outputs and (needs_targets or len(places) != inputs):
        alone = "" if needs_targets else f", or {inputs} without targets"
        raise DataError(
            f"{file} has {len(places)} columns, but the network was trained for {inputs + outputs} "
            f"({inputs} of input, {outputs} of target){alone}."
        )
    values = torch.tensor([[_number(cells[place]) for place in places] for _, cells in lines])
    for row, column in (~values.isfinite()).nonzero().tolist():
        number, cells = lines[row]
        raise DataError(f"{file}, line {number}: {cells[places[column]]!r} is not a finite number.")
    chosen, y = [header[place] for place in places], values[:, inputs:] if len(places) > inputs else None
    return Columns(chosen[:inputs], chosen[inputs:], values[:, :inputs], y)


def _read(file: str, path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and the other lines that are not blank, by their number."""
    if not path.is_file():
        raise DataError(f"{file} is not a file: a CSV file with a header is expected.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            lines = [(reader.line_num, line) for line in reader if any(cell.strip() for cell in line)]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as CSV ({error}).") from error
    if len(lines) < 2:
        raise DataError(f"{file} is empty: a header and one or more lines of numbers are expected.")
    header = [cell.strip() for cell in lines[0][1]]
    if all(math.isfinite(_number(cell)) for cell in header):
        raise DataError(f"{file} begins with numbers: its first line must name the columns.")
    for number, line in lines:
        if len(line) != len(header):
            raise DataError(f"{file}, line {number}: {len(line)} columns, but the header has {len(header)}.")
    return header, lines[1:]


def _places(file: str, header: list[str], inputs: list[str], targets: list[str]) -> list[int]:
    """Where a file has the columns of a training: all of the inputs, and all of the targets or none."""
    wanted = [*inputs, *targets] if any(name in header for name in targets) else inputs
    for name in wanted:
        if header.count(name) != 1:
            raise DataError(
                f"{file} has the columns {', '.join(header)}, but must have {name} once: the network was trained on "
                f"{', '.join(inputs)} to predict {', '.join(targets)}."
            )
    return [header.index(name) for name in wanted]


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan
