"""A user's own regressions: a table of samples, one of whose columns says which task each belongs to.

Legend: T tasks, K shots, Q queries, D targets of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_modules.samplers import Sampler, sampler_named
from data_modules.table_tasks import TableTasks, require_columns
from dmaml_pl.data import SPLITS, PlottedTasks, Split
from dmaml_pl.tasks import TaskBatch

if TYPE_CHECKING:
    from data_modules.reading.tables import Table


class Tabular(TableTasks):
    """Regressions from a CSV or Parquet file: a column names the task of each row, others are inputs and targets.

    A task is K + Q rows of one task of the file, none of them twice: support_x is (K, inputs), support_y
    (K, D), query_x and query_y likewise, float32. Which tasks are for meta-training, validation and meta-testing is
    said by a column (`split_column`), or they are dealt by chance, which follows from `split_seed` and their names.

    Args:
        task_column: name of the column that says which task a row belongs to, by name: 01 and 1 are two.
        targets: names of the target columns.
        shots: K, support rows of a task.
        queries: Q, query rows of a task.
        meta_batch: T, tasks in the meta-batch of one worker.
        settings: those of `TableTasks`.

    Examples:
        >>> data = Tabular(path="a.csv", task_column="sensor", inputs=["celsius"], targets=["volt"])
        >>> data.shots
        10
    """

    def __init__(
        self,
        *,
        task_column: str,
        targets: list[str],
        shots: int = 10,
        queries: int = 10,
        meta_batch: int = 25,
        **settings: Any,
    ) -> None:
        super().__init__(shots=shots, queries=queries, meta_batch=meta_batch, **settings)
        require_columns("targets", targets, dict.fromkeys(self.inputs, "inputs"))
        self.task_column = task_column
        self.targets = list(targets)
        self._samplers: dict[Split, Sampler] = {}

    def _read(self, table: Table) -> None:
        sampler = sampler_named(self.sampler)
        tasks = table.texts("data.task_column", self.task_column)
        x, y = table.numbers("data.inputs", self.inputs), table.numbers("data.targets", self.targets)
        names, numbers, rows = np.unique(tasks, return_inverse=True, return_counts=True)
        split_of = self._split_of(table, "task_column", tasks)
        self._check_rows([f"task {name}" for name in names], rows)
        order = numbers.argsort(kind="stable")  # the rows of a task one after another
        trained = np.array([split_of[name] == "train" for name in names.tolist()])[numbers]
        self._scale({"inputs": self.inputs, "targets": self.targets}, trained, x, y)
        self._x, targets = self._scaled(x[order]), torch.from_numpy(y[order])
        self._y = (targets if self.scaling is None else self.scaling.targets(targets)).float()
        starts = rows.cumsum() - rows
        for split in SPLITS:
            chosen = [number for number, name in enumerate(names.tolist()) if split_of[name] == split]
            self._samplers[split] = sampler(
                rows[chosen], starts=starts[chosen], ways=1, per_class=self.shots + self.queries
            )

    def sample_tasks(self, split: Split, seeds: Sequence[int]) -> TaskBatch:
        """Tasks of a split, each a pure function of its own seed, (T, ...)."""
        rows = torch.from_numpy(self._samplers[split](seeds)).squeeze(1)
        support, query = rows[:, : self.shots], rows[:, self.shots :]
        return TaskBatch.of(self._x[support], self._y[support], self._x[query], self._y[query])

    def tasks_to_plot(self, count: int) -> PlottedTasks | None:
        """Meta-test tasks 0 .. `count` - 1; None with several inputs or targets, of which there is no plot."""
        if len(self.inputs) != 1 or len(self.targets) != 1:
            return None
        tasks = self.evaluation_tasks("test", range(count))
        order = tasks.query_x.argsort(dim=1)
        tasks = tasks._replace(query=tasks.query.map(lambda column: column.gather(1, order)))
        units = " (standardized)" if self.scaling is not None else ""
        return PlottedTasks(tasks, f"{self.inputs[0]}{units}", f"{self.targets[0]}{units}", queries_are_curves=False)
