"""What a network says of a user's samples: as a table on the terminal, as CSV, and as JSON.

Legend: Q query samples, N ways, D outputs of a regression.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from dmaml_pl.console.tables import fits, print_table
from dmaml_pl.errors import DataError

SHOWN = 50
"""Rows of the table on the terminal; the file has them all."""

SHOWN_CLASSES = 8
"""With so many classes, the table shows every probability; with more, that of the prediction."""


@dataclass(frozen=True)
class Answers:
    """Predictions.

    Attributes:
        table: a row for each of the Q query samples.
        brief: how many of its columns the terminal shows.
        summary: what is told of all samples, such as the accuracy.
    """

    table: pd.DataFrame
    brief: int
    summary: dict[str, Any]

    @classmethod
    def of_classes(
        cls, table: pd.DataFrame, true: list[str] | None, probabilities: Tensor, classes: list[str]
    ) -> Answers:
        """Of a classification: probabilities (Q, N) of samples that a table tells from each other, by what is known."""
        best, numbers = probabilities.max(dim=1)
        table = table.copy()
        summary: dict[str, Any] = {"classes": classes}
        predictions = [classes[number] for number in numbers.tolist()]
        if true is not None:
            table["class"] = true
            right = sum(said == was for said, was in zip(predictions, true, strict=True))
            summary |= {"accuracy": right / len(table), "right": right, "samples": len(table)}
        table["prediction"], table["probability"] = predictions, best.tolist()
        brief = table.shape[1] + (len(classes) if len(classes) <= SHOWN_CLASSES else 0)
        each = pd.DataFrame(probabilities.tolist(), columns=[f"p({name})" for name in classes])
        return cls(table.join(each), brief, summary)

    @classmethod
    def of_values(cls, query: pd.DataFrame, values: Tensor, targets: list[str]) -> Answers:
        """Of a regression: values (Q, D) of the targets of these names, which the query may have, too."""
        predicted = pd.DataFrame(values.numpy().astype(float), columns=[f"predicted {name}" for name in targets])
        table = query.join(predicted)
        summary: dict[str, Any] = {}
        if set(targets) <= set(query.columns):
            summary = {"mse": ((predicted.to_numpy() - query[targets].to_numpy()) ** 2).mean(), "samples": len(query)}
        return cls(table, table.shape[1], summary)

    def write(self, path: Path, about: dict[str, Any]) -> None:
        """Write all rows, as JSON, which begins with what there is to say about them, if the name ends so, else as CSV.

        Raises:
            DataError: the file cannot be written.
        """
        text = self.table.to_csv(index=False)
        if path.suffix == ".json":
            content = {**about, **self.summary, "predictions": self.table.to_dict("records")}
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise DataError(f"--output {path} cannot be written ({error.strerror}).") from error

    def print(self, title: str) -> None:
        """Print the first rows as a table, and what there is to say of all; columns that do not fit are left out."""
        shown = self.table.iloc[:SHOWN, : self.brief].to_dict("records")
        probabilities = [name for name in shown[0] if name.startswith("p(")]
        if not fits(shown):
            shown = [{name: value for name, value in row.items() if name not in probabilities} for row in shown]
        print_table(shown, title)
        if len(self.table) > SHOWN:
            print(f"... and {len(self.table) - SHOWN} more")
        if "accuracy" in self.summary:
            print("Accuracy: {accuracy:.4f} ({right} of {samples} right)".format(**self.summary))
        if "mse" in self.summary:
            print("Mean squared error: {mse:.4f} over {samples} samples".format(**self.summary))
