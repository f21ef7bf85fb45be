"""Columns of a CSV or Parquet file, read by PyArrow."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from dmaml_pl.checks import require_one_of, require_table
from dmaml_pl.errors import ConfigError, DataError

PARQUET = (".parquet", ".pq")
SPREADSHEETS = (".xlsx", ".xls", ".ods")
DELIMITERS = (",", ";", "\t", "|")

LARGEST = float(np.finfo(np.float32).max)
"""The largest number that a float32 holds."""


@dataclass(frozen=True)
class Dialect:
    """How a CSV file is written; None is found out from the file.

    Args:
        delimiter: between columns; None: whichever of comma, semicolon, tab and | makes most columns of the header.
        decimal: mark in numbers, "." or ","; None: a point, and a comma where semicolons stand between columns and
            numbers have commas, as spreadsheets write it in half of Europe.
        encoding: of the text, such as cp1252; None: UTF-8, and UTF-16 where the file begins with its mark.

    Raises:
        ConfigError: names the setting that is none of these.
    """

    delimiter: str | None = None
    decimal: str | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise ConfigError(f"data.delimiter is {self.delimiter!r}, but must be one character, such as ';', or null.")
        if self.decimal is not None:
            require_one_of("data.decimal", self.decimal, (".", ","))
        try:
            "".encode(self.encoding or "utf-8")
        except LookupError as error:
            raise ConfigError(
                f"data.encoding is {self.encoding!r}, which is no encoding that Python knows: utf-8, utf-16 and cp1252 "
                "are such."
            ) from error


class Table:
    """A table, of which columns are asked for by name.

    Args:
        path: a .parquet file, or a CSV file with a header (also .csv.gz and the like).
        setting: which names the file.
        dialect: of the CSV file.

    Attributes:
        names: of the columns.

    Raises:
        DataError: names the file, which is missing, empty, or cannot be read.
    """

    def __init__(self, path: Path, setting: str = "data.path", dialect: Dialect | None = None) -> None:
        self.path = path
        dialect = dialect or Dialect()
        require_table(path, setting)
        suffix = path.suffix.lower()
        if suffix in SPREADSHEETS:
            raise DataError(f"{setting} is {path}, which is a spreadsheet: save it as CSV, and give that.")
        self._is_csv = suffix not in PARQUET
        try:
            if self._is_csv:
                self._find_dialect(dialect)
                self._table = self._read_csv()
            else:
                self._table = pa.parquet.read_table(path)
            self._written: list[str] = self._table.column_names
        except UnicodeDecodeError as error:
            raise self._undecoded() from error
        except (OSError, pa.ArrowException) as error:
            kind = "CSV" if self._is_csv else "Parquet"
            raise DataError(f"{path} cannot be read as {kind} ({str(error).splitlines()[0]}).") from error
        self.names: list[str] = [name.strip() for name in self._written]
        if not len(self._table):
            raise DataError(f"{path} has no rows.")

    def _find_dialect(self, dialect: Dialect) -> None:
        with pa.input_stream(str(self.path)) as stream:  # unpacks .gz and the like
            head = stream.read(2**16)
        is_utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
        self._encoding = dialect.encoding or ("utf-16" if is_utf16 else "utf8")
        lines = head.decode(self._encoding, errors="replace").splitlines() or [""]
        headers = {mark: next(filter(None, csv.reader(lines, delimiter=mark)), []) for mark in DELIMITERS}
        self._delimiter = dialect.delimiter or max(headers, key=lambda mark: len(headers[mark]))
        self._decimal = dialect.decimal or "."
        if dialect.decimal is None and self._delimiter == ";" and self._has_decimal_commas():
            self._decimal = ","

    def _has_decimal_commas(self) -> bool:
        """Whether a column has commas, and nothing but numbers once they are points."""
        texts = [column.drop_null() for column in self._read_csv().columns if pa.types.is_string(column.type)]
        for cells in texts:
            try:
                pa.compute.replace_substring(cells, ",", ".").cast(pa.float64())
            except pa.ArrowException:
                continue
            if pa.compute.any(pa.compute.match_substring(cells, ",")).as_py():
                return True
        return False

    def _read_csv(self, only: str | None = None) -> Any:
        """The table, the type of each column as its cells are; or one column, its cells as they are written."""
        columns = {} if only is None else {"include_columns": [only], "column_types": {only: pa.string()}}
        return pa.csv.read_csv(
            self.path,
            # With threads, an error does not say in which row.
            pa.csv.ReadOptions(use_threads=False, encoding=self._encoding),
            pa.csv.ParseOptions(delimiter=self._delimiter),
            pa.csv.ConvertOptions(decimal_point=self._decimal, **columns),
        )

    def _undecoded(self) -> DataError:
        return DataError(
            f"{self.path} is not all text in {self._encoding.upper()}: save it as UTF-8, or set data.encoding, such as "
            "cp1252 for what Windows writes in Western Europe."
        )

    def texts(self, setting: str, name: str) -> NDArray[np.str_]:
        """A column of names, (rows,).

        Args:
            setting: which asks for it.
            name: of the column.

        Raises:
            DataError: there is no such column, or one of its cells is empty.
        """
        column = self._column(setting, name)
        if self._is_csv:
            # As they are written: 01 and 1, or 1.10 and 1.1, are two names, though one number.
            written = self._written[self.names.index(name)]
            try:
                column = self._read_csv(written).column(0)
            except pa.ArrowException as error:
                raise self._undecoded() from error
        cells = column.to_pylist()
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
            if self._is_csv and pa.types.is_string(column.type):  # some cell is no number as this file writes them
                marks = str.maketrans(",.", ".,") if self._decimal == "," else {}
                values = np.array([as_number(cell and cell.translate(marks)) for cell in column.to_pylist()])
            else:
                values = column.cast(pa.float64()).to_numpy()
        except pa.ArrowException:
            values = np.array([as_number(cell) for cell in column.to_pylist()])
        broken = np.flatnonzero(~(np.abs(values) <= LARGEST))  # nor where it is NaN
        if len(broken):
            row = int(broken[0])
            cell = column[row].as_py()
            shown = repr(cell) if isinstance(cell, str) else str(cell)
            is_ = "is empty" if cell is None else f"is {shown}, and not a finite number"
            if math.isfinite(values[row]):
                is_ = f"is {shown}, more than networks compute with ({LARGEST:.1e})"
            more = f" ({len(broken)} such rows)" if len(broken) > 1 else ""
            remedy = "mend or leave out the row"
            if not math.isfinite(values[row]) and math.isfinite(as_number(str(cell).replace(",", "."))):
                remedy = "where that is the decimal mark, set data.decimal"
            elif len(broken) == len(values) and setting.startswith("data."):  # else the network needs the column
                classes = "where it names classes, take data_modules.TabularClasses, and set data.classes to it"
                remedy = classes if setting == "data.targets" else "leave the column out"
            raise DataError(f"{self.path}, row {row + 1}: column {name} ({setting}) {is_}{more}: {remedy}.")
        return np.asarray(values, dtype=np.float64)

    def _column(self, setting: str, name: str) -> Any:
        if name not in self.names:
            shown = ", ".join(self.names[:20]) + (", ..." if len(self.names) > 20 else "")
            raise DataError(f"{setting} names {name}, but {self.path} has the columns {shown}.")
        if self.names.count(name) > 1:
            raise DataError(f"{self.path} has two columns {name} ({setting}): give each a name of its own.")
        return self._table.column(self.names.index(name))


def as_number(cell: Any) -> float:
    """The number that a cell holds; NaN where it holds none."""
    try:
        return float("nan" if "_" in str(cell) else cell)  # which Python takes for 10, where it says 1_0
    except (TypeError, ValueError):
        return float("nan")
