"""A user's own numbers: tables with a header, whose columns are a sample's inputs, and then its targets."""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from data_modules.reading.tables import Dialect, Table, as_number
from dmaml_pl.errors import DataError


def read_columns(
    option: str,
    path: Path,
    inputs: int,
    outputs: int,
    names: tuple[list[str], list[str]] | None,
    dialect: Dialect | None,
    *,
    needs_targets: bool = False,
) -> pd.DataFrame:
    """Read a CSV or Parquet file: the columns of the inputs, then those of the targets if it has them.

    Where the training gave its input and its target columns names, the file has these in any order, and may have
    others; else they are told by their place. A support set `needs_targets`.

    Raises:
        DataError: names the file, and the row where it is broken.
    """
    table = Table(path, option, dialect)
    file = f"{option} {path}"
    if all(math.isfinite(as_number(name)) for name in table.names):
        raise DataError(f"{file} begins with numbers: its first line must name the columns.")
    chosen = table.names if names is None else _named(file, table.names, *names)
    if len(chosen) != inputs + outputs and (needs_targets or len(chosen) != inputs):
        alone = "" if needs_targets else f", or {inputs} without targets"
        raise DataError(
            f"{file} has {len(chosen)} columns, but the network was trained for {inputs + outputs} "
            f"({inputs} of input, {outputs} of target){alone}."
        )
    return pd.DataFrame(table.numbers(option, chosen), columns=chosen)


def read_classes(
    option: str, path: Path, inputs: list[str], classes: str, dialect: Dialect | None
) -> tuple[pd.DataFrame, list[str] | None]:
    """Read a CSV or Parquet file: the columns of the inputs, and the class of each row if it has that column.

    Raises:
        DataError: names the file, and the row where it is broken.
    """
    table = Table(path, option, dialect)
    found = _named(f"{option} {path}", table.names, inputs, [classes])
    names = table.texts(option, classes).tolist() if classes in found else None
    return pd.DataFrame(table.numbers(option, inputs), columns=inputs), names


def dialect_of(data: Any) -> Dialect | None:
    """How the table of a training was written, which a user's own is read by; None where there was none."""
    dialect: Dialect | None = getattr(data, "dialect", None)
    return dialect


def _named(file: str, header: list[str], inputs: list[str], targets: list[str]) -> list[str]:
    """The columns of a training: all of the inputs, and all of the targets or none."""
    wanted = [*inputs, *targets] if any(name in header for name in targets) else inputs
    for name in wanted:
        if header.count(name) != 1:
            raise DataError(
                f"{file} has the columns {', '.join(header)}, but must have {name} once: the network was trained on "
                f"{', '.join(inputs)} to predict {', '.join(targets)}."
            )
    return wanted
