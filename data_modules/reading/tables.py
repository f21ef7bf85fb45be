"""Columns of a CSV or Parquet file, read by PyArrow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from dmaml_pl.errors import DataError

PARQUET = (".parquet", ".pq")


class Table:
    """A table, of which columns are asked for by name.

    Args:
        path: a .parquet file, or a CSV file with a header (also .csv.gz and the like), in UTF-8.
        setting: which names the file.

    Attributes:
        names: of the columns.

    Raises:
        DataError: names the file, which is missing, empty, or cannot be read.
    """

    def __init__(self, path: Path, setting: str = "data.path") -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"{setting} is {path}, but there is no such file: a CSV or Parquet file is expected.")
        try:
            if path.suffix.lower() in PARQUET:
                self._table = pa.parquet.read_table(path)
            else:
                # With threads, an error does not say in which row.
                self._table = pa.csv.read_csv(path, pa.csv.ReadOptions(use_threads=False))
        except (OSError, pa.ArrowException) as error:
            kind = "Parquet" if path.suffix.lower() in PARQUET else "CSV"
            raise DataError(f"{path} cannot be read as {kind} ({str(error).splitlines()[0]}).") from error
        self.names: list[str] = [name.strip() for name in self._table.column_names]
        self._table = self._table.rename_columns(self.names)
        if not len(self._table):
            raise DataError(f"{path} has no rows.")

    def texts(self, setting: str, name: str) -> NDArray[np.str_]:
        """A column of names, (rows,).

        Args:
            setting: which asks for it.
            name: of the column.

        Raises:
            DataError: there is no such column, or one of its cells is empty.
        """
        cells = self._column(setting, name).to_pylist()
        for row, cell in enumerate(cells, start=1):
            if cell is None or str(cell).strip() == "":
                raise DataError(f"{self.path}, row {row}: column {name} ({setting}) is empty.")
        return np.array([str(cell).strip() for cell in cells])

    def numbers(self, setting: str, names: Sequence[str]) -> NDArray[np.float64]:
        """Columns of finite numbers, (rows, columns).

        Args:
            setting: which asks for them.
            names: of the columns.

        Raises:
            DataError: there is no such column, or one of its cells is not a finite number.
        """
        return np.stack([self._numbers(setting, name) for name in names], axis=1)

    def _numbers(self, setting: str, name: str) -> NDArray[np.float64]:
        column = self._column(setting, name)
        try:
            values = column.cast(pa.float64()).to_numpy()
        except pa.ArrowException:
            values = np.array([as_number(cell) for cell in column.to_pylist()])
        broken = np.flatnonzero(~np.isfinite(values))
        if len(broken):
            row = int(broken[0])
            cell = column[row].as_py()
            is_ = "is empty" if cell is None else f"is {cell!r}, and not a finite number"
            more = f" ({len(broken)} such rows)" if len(broken) > 1 else ""
            raise DataError(
                f"{self.path}, row {row + 1}: column {name} ({setting}) {is_}{more}: mend or leave out the row."
            )
        return np.asarray(values, dtype=np.float64)

    def _column(self, setting: str, name: str) -> Any:
        if name not in self.names:
            shown = ", ".join(self.names[:20]) + (", ..." if len(self.names) > 20 else "")
            raise DataError(f"{setting} names {name}, but {self.path} has the columns {shown}.")
        if self.names.count(name) > 1:
            raise DataError(f"{self.path} has two columns {name} ({setting}): give each a name of its own.")
        return self._table.column(name)


def as_number(cell: Any) -> float:
    """The number that a cell holds; NaN where it holds none."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return float("nan")
