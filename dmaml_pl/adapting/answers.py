"""What a network said of a user's samples: as a table on the terminal, as CSV, and as JSON.

Legend: Q query samples, N ways, D outputs of a regression.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional

from dmaml_pl.console.tables import print_table
from dmaml_pl.errors import DataError

SHOWN = 50
"""Rows of the table on the terminal; the file has them all."""

SHOWN_CLASSES = 8
"""With so many classes, the table shows every probability; with more, that of the prediction."""


@dataclass(frozen=True)
class Answers:
    """Predictions as rows.

    Attributes:
        rows: one a query sample: column to text or number.
        summary: what is told of all of them, such as the accuracy.
        brief: columns that the terminal shows.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    brief: list[str] = field(default_factory=list)

    @classmethod
    def of_classes(
        cls, names: list[str], probabilities: Tensor, classes: tuple[str | int, ...], truth: list[str] | None
    ) -> Answers:
        """Of a classification.

        Args:
            names: what to call each query sample.
            probabilities: (Q, N).
            classes: names of the classes.
            truth: class of each sample, where it is known.
        """
        rows: list[dict[str, Any]] = []
        for number, name in enumerate(names):
            most = int(probabilities[number].argmax())
            row: dict[str, Any] = {"file": name}
            if truth is not None:
                row["class"] = truth[number]
            row |= {"prediction": classes[most], "probability": float(probabilities[number, most])}
            row |= {f"p({each})": float(p) for each, p in zip(classes, probabilities[number], strict=True)}
            rows.append(row)
        summary: dict[str, Any] = {"classes": list(classes)}
        if truth is not None:
            right = sum(row["prediction"] == row["class"] for row in rows)
            summary |= {"accuracy": right / len(rows), "right": right, "samples": len(rows)}
        brief = list(rows[0])
        if len(classes) > SHOWN_CLASSES:
            brief = [name for name in brief if not name.startswith("p(")]
        return cls(rows, summary, brief)

    @classmethod
    def of_values(cls, inputs: dict[str, Tensor], targets: dict[str, Tensor], values: dict[str, Tensor]) -> Answers:
        """Of a regression: columns (Q,) by name; `targets` may be empty, else they are those of `values`."""
        columns = inputs | targets | {f"predicted {name}": value for name, value in values.items()}
        rows = [
            {name: float(column[number]) for name, column in columns.items()}
            for number in range(len(next(iter(inputs.values()))))
        ]
        errors = [functional.mse_loss(values[name], target) for name, target in targets.items()]
        summary = {"mse": float(sum(errors)) / len(errors), "samples": len(rows)} if errors else {}
        return cls(rows, summary, list(columns))

    def write(self, path: Path, about: dict[str, Any]) -> None:
        """Write all rows, as JSON if the file's name ends so, else as CSV.

        Args:
            path: the file.
            about: what JSON tells first, such as the number of adaptation steps.

        Raises:
            DataError: the file cannot be written.
        """
        try:
            if path.suffix == ".json":
                content = {**about, **self.summary, "predictions": self.rows}
                path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                return
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(self.rows[0]))
                writer.writeheader()
                writer.writerows(self.rows)
        except OSError as error:
            raise DataError(f"--output {path} cannot be written ({error.strerror}).") from error

    def print(self, title: str) -> None:
        """Print the first rows as a table, and what there is to say of all."""
        print_table([{name: row[name] for name in self.brief} for row in self.rows[:SHOWN]], title)
        if len(self.rows) > SHOWN:
            print(f"... and {len(self.rows) - SHOWN} more")
        if "accuracy" in self.summary:
            right, samples = self.summary["right"], self.summary["samples"]
            print(f"Accuracy: {self.summary['accuracy']:.4f} ({right} of {samples} right)")
        if "mse" in self.summary:
            print(f"Mean squared error: {self.summary['mse']:.4f} over {self.summary['samples']} samples")
