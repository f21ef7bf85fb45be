"""A user's own classifications: a table of samples, one of whose columns says which class each is of.

Legend: T tasks, N ways, K shots, Q queries a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_modules.samplers import Sampler, sampler_named
from data_modules.shares import Shares
from data_modules.table_tasks import TableTasks, require_columns
from dmaml_pl.data import SPLITS, Split
from dmaml_pl.errors import ConfigError
from dmaml_pl.tasks import LabelledSamples, TaskBatch, derive_seed

if TYPE_CHECKING:
    from data_modules.reading.tables import Table


class TabularClasses(TableTasks):
    """Classifications from a CSV or Parquet file: a column names the class of each row, others are its inputs.

    A task is K + Q rows of each of N classes, none of them twice, sorted by label: support_x is (N * K, inputs),
    support_y (N * K,), query_x and query_y likewise. Without a `task_column` the classes are dealt to the splits, so
    that a meta-test is of classes never seen; a task takes N of its split's, and gives them labels by chance. With one,
    the tasks of the file are dealt: a task takes N of the classes that a task of the file has, and labels them in the
    order of their names, so that where all have the same classes a label means the same everywhere.

    Args:
        classes: name of the column that holds the class of each row, by name: 01 and 1 are two.
        task_column: name of the column that says which task a row belongs to; None where classes are all there is.
        ways: N, classes of a task.
        shots: K, support rows per class.
        queries: Q, query rows per class.
        meta_batch: T, tasks in the meta-batch of one worker.
        settings: those of `TableTasks`.

    Examples:
        >>> data = TabularClasses(path="table.csv", inputs=["length", "width"], classes="species", ways=3)
        >>> data.ways
        3
    """

    def __init__(
        self,
        *,
        classes: str,
        task_column: str | None = None,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        meta_batch: int = 4,
        **settings: Any,
    ) -> None:
        super().__init__(shots=shots, queries=queries, meta_batch=meta_batch, **settings)
        if ways < 2:
            raise ConfigError(f"data.ways is {ways}, but a task needs at least 2 classes to tell apart.")
        require_columns("classes", [classes], dict.fromkeys(self.inputs, "inputs"))
        self.shares = Shares(self.val_share, self.test_share, "classes" if task_column is None else "tasks")
        self.classes = classes
        self.task_column = task_column
        self.ways = ways
        self.targets = [classes]
        self._samplers: dict[Split, list[Sampler]] = {}
        self._labels = torch.empty(0, dtype=torch.int64)

    def _read(self, table: Table) -> None:
        classes = table.texts("data.classes", self.classes)
        of_task = "classes" if self.task_column is None else "task_column"
        groups = classes if self.task_column is None else table.texts("data.task_column", self.task_column)
        x = table.numbers("data.inputs", self.inputs)
        split_of = self._split_of(table, of_task, groups)
        order = np.lexsort((classes, groups))  # the rows of a class of a task one after another
        x, classes, groups = x[order], classes[order], groups[order]
        splits = np.array([split_of[group] for group in groups.tolist()])
        self._scale({"inputs": self.inputs}, splits == "train", x)
        self._x = self._scaled(x)
        begins = (classes[1:] != classes[:-1]) | (groups[1:] != groups[:-1])
        starts = np.flatnonzero(np.r_[True, begins])
        rows = np.diff(np.r_[starts, len(classes)])
        named = [f"class {classes[n]}" + f" of task {groups[n]}" * (self.task_column is not None) for n in starts]
        self._check_rows(named, rows)
        for split in SPLITS:
            here = np.flatnonzero(splits[starts] == split)
            together = [here]
            if self.task_column is not None:
                together = [here[groups[starts[here]] == task] for task in np.unique(groups[starts[here]])]
            self._samplers[split] = [
                self._sampler(split, groups[starts[some[0]]], starts[some], rows[some]) for some in together
            ]
        trained = np.flatnonzero(splits == "train")
        self._trained = torch.from_numpy(trained)
        self._labels = torch.from_numpy(np.unique(classes[trained], return_inverse=True)[1])

    def _sampler(self, split: str, task: str, starts: NDArray[np.int64], rows: NDArray[np.int64]) -> Sampler:
        if len(rows) < self.ways:
            where = f"the {split} split" if self.task_column is None else f"task {task}"
            raise ConfigError(
                f"data.ways is {self.ways}, but {where} of {self.path} has {len(rows)} "
                f"class{'es' if len(rows) > 1 else ''}: choose a smaller one, or add classes there."
            )
        sampler = sampler_named(self.sampler)
        return sampler(rows, starts=starts, ways=self.ways, per_class=self.shots + self.queries)

    def sample_tasks(self, split: Split, seeds: Sequence[int]) -> TaskBatch:
        """Tasks of a split, each a pure function of its own seed, (T, ...)."""
        samplers = self._samplers[split]
        chosen = np.array([derive_seed("task of a table", seed) % len(samplers) for seed in seeds])
        rows = np.empty((len(seeds), self.ways, self.shots + self.queries), dtype=np.int64)
        for number in np.unique(chosen).tolist():
            places = np.flatnonzero(chosen == number)
            rows[places] = samplers[number]([seeds[place] for place in places.tolist()])
        if self.task_column is not None:  # in the order of their names, in which they lie
            rows = np.take_along_axis(rows, rows[:, :, :1].argsort(axis=1), axis=1)
        x = self._x[torch.from_numpy(rows)]
        labels = torch.arange(self.ways).view(1, -1, 1).expand(rows.shape)
        support, query = (
            (part.flatten(1, 2), label.flatten(1, 2))
            for part, label in zip(
                x.split([self.shots, self.queries], dim=2), labels.split([self.shots, self.queries], dim=2), strict=True
            )
        )
        return TaskBatch.of(*support, *query)

    def sample_labelled(self, samples: int, seed: int) -> LabelledSamples:
        """Rows of the training split and their classes, (samples, inputs), all rows equally likely."""
        chosen = torch.randint(len(self._trained), (samples,), generator=torch.Generator().manual_seed(seed))
        return LabelledSamples(self._x[self._trained[chosen]], self._labels[chosen], int(self._labels.max()) + 1)
