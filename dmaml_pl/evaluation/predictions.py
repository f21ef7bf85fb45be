"""Writes the predictions of `dmaml predict` as CSV."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from dmaml_pl.checks import require_file, unwritable
from dmaml_pl.runs import strategy_of_runs
from dmaml_pl.tasks import TaskBatch

SETTING = "predictions.file"


class PredictionWriter(pl.Callback):
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
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: TaskBatch, batch_idx: int, *args: Any
    ) -> None:
        """Take a batch's predictions (T, I + 1, Q, ...)."""
        last = outputs[:, -1].cpu()
        values = last.argmax(dim=-1, keepdim=True) if pl_module.objective.name == "classification" else last
        numbers = torch.arange(batch.tasks) if batch.numbers is None else batch.numbers
        for number, *task in zip(numbers.tolist(), batch.query_y, values, strict=True):
            sides = (side.reshape(len(side), -1).tolist() for side in task)
            self._rows += [[number, query, *y, *said] for query, (y, said) in enumerate(zip(*sides, strict=True))]

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
        import pandas as pd  # noqa: PLC0415 - starts threads, beside which no worker could be forked

        rows.sort(key=lambda row: row[:2])
        outputs = (len(rows[0]) - 2) // 2
        names = [f"{kind}_{k}" if outputs > 1 else kind for kind in ("target", "prediction") for k in range(outputs)]
        path = Path(self.file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows, columns=["task", "query", *names]).to_csv(path, index=False)
        except OSError as error:
            raise unwritable(SETTING, path, error) from error
        print(f"Predictions of {rows[-1][0] + 1} tasks: {self.file}")
