"""Writes the predictions of `dmaml predict` as CSV."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from dmaml_pl.checks import require_file, unwritable
from dmaml_pl.runs import strategy_of_runs
from dmaml_pl.tasks import TaskBatch

SETTING = "predictions.file"


class PredictionWriter(Callback):
    """Keeps the query predictions of each test task after the last adaptation step, and writes them in task order.

    Args:
        file: the CSV file: task, query sample, target, prediction (the class, or the value of each output).
    """

    def __init__(self, file: str = "predictions.csv") -> None:
        self.file = file
        self._rows: list[list[Any]] = []

    def check_writable(self) -> None:
        """Check that the file can be written, before there is anything to write.

        Raises:
            ConfigError: it cannot.
        """
        require_file(SETTING, Path(self.file))

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: TaskBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take a batch's predictions (T, I + 1, Q, ...)."""
        last = outputs[:, -1].cpu()
        values = last.argmax(dim=-1, keepdim=True) if pl_module.objective.name == "classification" else last
        numbers = torch.arange(batch.tasks) if batch.numbers is None else batch.numbers
        for task in range(batch.tasks):
            for query in range(values.shape[1]):
                target = batch.query_y[task, query].reshape(-1).tolist()
                self._rows.append([int(numbers[task]), query, *target, *values[task, query].reshape(-1).tolist()])

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Join the workers' shares; worker 0 writes.

        Raises:
            ConfigError: the file cannot be written.
        """
        strategy = strategy_of_runs(trainer)
        if strategy is not None:
            self._rows = [row for share in strategy.gather(self._rows) for row in share]
        if trainer.is_global_zero and self._rows:
            rows = sorted(self._rows, key=lambda row: (row[0], row[1]))
            outputs = (len(rows[0]) - 2) // 2
            names = [
                f"{kind}_{k}" if outputs > 1 else kind for kind in ("target", "prediction") for k in range(outputs)
            ]
            path = Path(self.file)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("w", newline="") as stream:
                    writer = csv.writer(stream)
                    writer.writerow(["task", "query", *names])
                    writer.writerows(rows)
            except OSError as error:
                raise unwritable(SETTING, path, error) from error
            print(f"Predictions of {rows[-1][0] + 1} tasks: {self.file}")
        self._rows = []
