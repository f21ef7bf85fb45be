"""What a network says of a user's samples: as a table on the terminal, as CSV, and as JSON.

Legend: Q query samples, N ways, D outputs of a regression.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dmaml_pl.adapting.columns import Columns
from dmaml_pl.adapting.folders import Pictures
from dmaml_pl.console.tables import print_table
from dmaml_pl.errors import DataError

SHOWN = 50
"""Rows of the table on the terminal; the file has them all."""

SHOWN_CLASSES = 8
"""With so many classes, the table shows every probability; with more, that of the prediction."""


@dataclass(frozen=True)
class Answers:
    """Predictions.

    Attributes:
        columns: by name, a text or number for each of the Q query samples.
        brief: how many of the columns the terminal shows.
        summary: what is told of all samples, such as the accuracy.
    """

    columns: dict[str, list[Any]]
    brief: int
    summary: dict[str, Any]

    @classmethod
    def of_classes(cls, query: Pictures, probabilities: Tensor, classes: list[str]) -> Answers:
        """Of a classification: probabilities (Q, N)."""
        best, numbers = probabilities.max(dim=1)
        predictions = [classes[number] for number in numbers.tolist()]
        columns: dict[str, list[Any]] = {"file": query.names}
        summary: dict[str, Any] = {"classes": classes}
        if query.classes is not None:
            columns["class"] = query.classes
            right = sum(said == true for said, true in zip(predictions, query.classes, strict=True))
            summary |= {"accuracy": right / len(predictions), "right": right, "samples": len(predictions)}
        columns |= {"prediction": predictions, "probability": best.tolist()}
        brief = len(columns) + (len(classes) if len(classes) <= SHOWN_CLASSES else 0)
        columns |= {f"p({name})": column for name, column in zip(classes, probabilities.T.tolist(), strict=True)}
        return cls(columns, brief, summary)

    @classmethod
    def of_values(cls, query: Columns, values: Tensor, targets: list[str]) -> Answers:
        """Of a regression: values (Q, D) of the targets of these names."""
        known = query.x if query.y is None else torch.cat([query.x, query.y], dim=1)
        names = [*query.inputs, *query.targets, *(f"predicted {name}" for name in targets)]
        columns = dict(zip(names, torch.cat([known, values], dim=1).T.tolist(), strict=True))
        error = None if query.y is None else float(functional.mse_loss(values, query.y))
        return cls(columns, len(columns), {} if error is None else {"mse": error, "samples": len(values)})

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One a query sample: column to text or number."""
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*self.columns.values(), strict=True)]

    def write(self, path: Path, about: dict[str, Any]) -> None:
        """Write all rows, as JSON if the file's name ends so, else as CSV.

        Args:
            path: the file.
            about: what JSON tells first, such as the number of adaptation steps.

        Raises:
            DataError: the file cannot be written.
        """
        try:
            with path.open("w", newline="", encoding="utf-8") as stream:
                if path.suffix == ".json":
                    content = {**about, **self.summary, "predictions": self.rows}
                    stream.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
                else:
                    csv.writer(stream).writerows([self.columns, *zip(*self.columns.values(), strict=True)])
        except OSError as error:
            raise DataError(f"--output {path} cannot be written ({error.strerror}).") from error

    def print(self, title: str) -> None:
        """Print the first rows as a table, and what there is to say of all."""
        rows = self.rows
        print_table([dict(list(row.items())[: self.brief]) for row in rows[:SHOWN]], title)
        if len(rows) > SHOWN:
            print(f"... and {len(rows) - SHOWN} more")
        if "accuracy" in self.summary:
            print("Accuracy: {accuracy:.4f} ({right} of {samples} right)".format(**self.summary))
        if "mse" in self.summary:
            print("Mean squared error: {mse:.4f} over {samples} samples".format(**self.summary))
