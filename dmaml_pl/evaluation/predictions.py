"""Writes the predictions of `dmaml predict` as CSV.

Legend: T tasks, Q query samples, I adaptation steps, D outputs of a regression.
"""

import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from dmaml_pl.checks import require_file, tell_replaced, unwritable
from dmaml_pl.runs import strategy_of_runs
from dmaml_pl.tasks import NamedColumns, SampleFiles, TaskBatch

SETTING = "predictions.file"


class PredictionWriter(pl.Callback):
    """Keeps the query predictions of each test task after the last adaptation step, and writes them in task order.

    Args:
        file: the CSV file, a row for each query sample: the number of its task, and its own there; its file, where
            samples are files, or its inputs, where they are one row of numbers; target and prediction (the class, or
            the value of each output). What was standardized is in the units of the data.

    Examples:
        >>> PredictionWriter("sines.csv").file
        'sines.csv'
    """

    def __init__(self, file: str = "predictions.csv") -> None:
        self.file = file
        self._rows: list[dict[str, Any]] = []

    def check_writable(self) -> None:
        """Check that the file can be written, before there is anything to write; one that is there is named.

        Raises:
            ConfigError: it cannot.
        """
        require_file(SETTING, Path(self.file))
        rank_zero_only(tell_replaced)(SETTING, Path(self.file))

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: TaskBatch, batch_idx: int, *args: Any
    ) -> None:
        """Take a batch's predictions (T, I + 1, Q, ...)."""
        x, y, said = batch.query_x.cpu(), batch.query_y.cpu(), outputs[:, -1].float().cpu()
        classifies, scaling = pl_module.objective.name == "classification", pl_module.scaling
        said = said.argmax(dim=-1) if classifies else said
        if scaling is not None:
            x = scaling.unscaled_inputs(x)
            said, y = (said, y) if classifies else (scaling.values(said), scaling.values(y))
        numbers = (torch.arange(batch.tasks) if batch.numbers is None else batch.numbers).tolist()
        columns: dict[str, list[Any]] = {
            "task": [number for number in numbers for _ in range(y.shape[1])],
            "query": list(range(y.shape[1])) * batch.tasks,
            **_described(getattr(trainer, "datamodule", None), x, numbers),
            **_columns("target", y),
            **_columns("prediction", said),
        }
        self._rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Join the workers' shares; worker 0 writes.

        Raises:
            ConfigError: the file cannot be written.
        """
        strategy = strategy_of_runs(trainer)
        rows, self._rows = self._rows, []
        if strategy is not None:
            rows = [row for share in strategy.gather(rows) for row in share]
        if not trainer.is_global_zero or not rows:
            return
        rows.sort(key=lambda row: (row["task"], row["query"]))
        path = Path(self.file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        except OSError as error:
            raise unwritable(SETTING, path, error) from error
        print(f"Predictions of {rows[-1]['task'] + 1} tasks: {self.file}")


def _described(data: Any, x: Tensor, numbers: list[int]) -> dict[str, list[Any]]:
    """What tells the query samples (T, Q, ...) of some tasks from each other: their files, or their inputs."""
    files = data.query_files("test", numbers) if isinstance(data, SampleFiles) else None
    if files is not None:
        return {"file": [file for task in files for file in task]}
    return _columns("input", x, data.inputs if isinstance(data, NamedColumns) else None) if x.ndim == 3 else {}


def _columns(name: str, values: Tensor, names: list[str] | None = None) -> dict[str, list[Any]]:
    """The columns of values (T, Q) or (T, Q, D), each by its name, or by its number where there are several."""
    flat = values.flatten(0, 1).reshape(values.shape[0] * values.shape[1], -1)
    count = flat.shape[1]
    names = names or ([name] if count == 1 else [f"{name}_{number}" for number in range(count)])
    return dict(zip(names, flat.T.tolist(), strict=True))
