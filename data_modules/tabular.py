"""A user's own regressions: a table of samples, one of whose columns says which task each belongs to.

Legend: T tasks, K shots, Q queries, D targets of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_modules.samplers import Sampler, SamplerName, sampler_named
from data_modules.shares import Shares, shuffle
from dmaml_pl.data import SPLITS, PlottedTasks, Split, TaskDataModule
from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.tasks import Scaling, TaskBatch

if TYPE_CHECKING:
    from data_modules.reading.tables import Table


class Tabular(TaskDataModule):
    """Regressions from a CSV or Parquet file: a column names the task of each row, others are inputs and targets.

    A task is K + Q rows of one task of the file, none of them twice: support_x is (K, inputs), support_y
    (K, D), query_x and query_y likewise, float32. Which tasks are for meta-training, validation and meta-testing is
    said by a column (`split_column`), or they are dealt by chance, which follows from `split_seed` and their names.

    Args:
        path: the file: .parquet, or CSV with a header.
        task_column: name of the column that says which task a row belongs to.
        inputs: names of the input columns, in the order that the network takes them in.
        targets: names of the target columns.
        split_column: name of a column that holds train, val or test, the same in all rows of a task; None where there
            is none.
        val_share: share of the tasks that is dealt to validation, where no column says so.
        test_share: share of the tasks that is dealt to meta-testing; the others are for meta-training.
        split_seed: seed of dealing the tasks.
        standardize: whether each column is shifted and scaled to mean 0 and standard deviation 1 over the rows for
            meta-training. Losses and metrics are then in these units: a mean squared error of 1 is what the constant
            mean would have. `dmaml adapt` takes and gives the units of the file all the same.
        shots: K, support rows of a task.
        queries: Q, query rows of a task.
        meta_batch: T, tasks in the meta-batch of one worker.
        sampler: "batched" samples all tasks of a meta-batch at once; "learn2learn", the reference, one after another
            through learn2learn's task transforms. From the same seed they make other tasks of the same distribution.
        settings: those of `TaskDataModule`.

    Attributes:
        scaling: how the units of the file become those of the tasks; None where they are the same, or before `setup`.
    """

    def __init__(
        self,
        *,
        path: str,
        task_column: str,
        inputs: list[str],
        targets: list[str],
        split_column: str | None = None,
        val_share: float = 0.16,
        test_share: float = 0.2,
        split_seed: int = 0,
        standardize: bool = True,
        shots: int = 10,
        queries: int = 10,
        meta_batch: int = 25,
        sampler: SamplerName = "batched",
        **settings: Any,
    ) -> None:
        super().__init__(shots=shots, queries=queries, meta_batch=meta_batch, **settings)
        self.shares = Shares(val_share, test_share, "tasks")
        for setting, names in (("inputs", inputs), ("targets", targets)):
            if not names:
                raise ConfigError(f"data.{setting} is empty, but must name one column or more.")
        self.path = path
        self.task_column = task_column
        self.inputs = list(inputs)
        self.targets = list(targets)
        self.split_column = split_column
        self.val_share = val_share
        self.test_share = test_share
        self.split_seed = split_seed
        self.standardize = standardize
        self.sampler: SamplerName = sampler
        self.scaling: Scaling | None = None
        self._samplers: dict[Split, Sampler] = {}
        self._x = self._y = torch.empty(0)

    def setup(self, stage: str | None = None) -> None:
        """Read the file and make ready to sample tasks; a second call does nothing.

        Raises:
            ConfigError: a task has too few rows for those asked of it.
            DataError: the file is missing or broken; names the column and the row.
        """
        if self._samplers:
            return
        from data_modules.reading.tables import Table  # noqa: PLC0415 - PyArrow is needed here alone

        sampler = sampler_named(self.sampler)
        columns = Table(Path(self.path).expanduser())
        tasks = columns.texts("data.task_column", self.task_column)
        x, y = columns.numbers("data.inputs", self.inputs), columns.numbers("data.targets", self.targets)
        names, numbers, rows = np.unique(tasks, return_inverse=True, return_counts=True)
        split_of = self._deal(names.tolist()) if self.split_column is None else self._read_splits(columns, tasks)
        self._check_rows(names, rows)
        order = numbers.argsort(kind="stable")  # the rows of a task one after another
        if self.standardize:
            trained = np.array([split_of[name] == "train" for name in names.tolist()])[numbers]
            self.scaling = Scaling(*_moments(x[trained]), *_moments(y[trained]))
        self._x, self._y = (torch.from_numpy(values[order]) for values in (x, y))
        if self.scaling is not None:
            self._x, self._y = self.scaling.inputs(self._x), self.scaling.targets(self._y)
        self._x, self._y = self._x.float(), self._y.float()
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

    def sample_task(self, split: Split, seed: int) -> TaskBatch:
        """One task of a split, without the T axis; the same as `sample_tasks` makes among others."""
        return self.sample_tasks(split, [seed]).task(0)

    def tasks_to_plot(self, count: int) -> PlottedTasks | None:
        """Meta-test tasks 0 .. `count` - 1; None with several inputs or targets, of which there is no plot."""
        if len(self.inputs) != 1 or len(self.targets) != 1:
            return None
        tasks = self.evaluation_tasks("test", range(count))
        order = tasks.query_x.argsort(dim=1)
        tasks = tasks._replace(query=tasks.query.map(lambda column: column.gather(1, order)))
        units = " (standardized)" if self.scaling is not None else ""
        return PlottedTasks(tasks, f"{self.inputs[0]}{units}", f"{self.targets[0]}{units}", queries_are_curves=False)

    def _deal(self, names: list[str]) -> dict[str, str]:
        shuffled = shuffle(names, "tabular", self.split_seed)
        dealt = self.shares.deal(shuffled, f"Column {self.task_column} of {self.path}")
        return {name: split for split, chosen in dealt.items() for name in chosen}

    def _read_splits(self, columns: Table, tasks: NDArray[np.str_]) -> dict[str, str]:
        name = str(self.split_column)
        found: dict[str, str] = {}
        for row, (task, split) in enumerate(
            zip(tasks.tolist(), columns.texts("data.split_column", name).tolist(), strict=True), start=1
        ):
            if split not in SPLITS:
                raise DataError(f"{self.path}, row {row}: column {name} is {split!r}, but must be train, val or test.")
            if found.setdefault(task, split) != split:
                raise DataError(
                    f"{self.path}, row {row}: column {name} puts task {task} into {split}, but an earlier row into "
                    f"{found[task]}: all rows of a task belong to one split."
                )
        missing = next((split for split in SPLITS if split not in found.values()), None)
        if missing is not None:
            raise DataError(f"{self.path}: column {name} has no {missing}: each of train, val and test needs tasks.")
        return found

    def _check_rows(self, names: NDArray[np.str_], rows: NDArray[np.int64]) -> None:
        wanted, smallest = self.shots + self.queries, int(rows.argmin())
        few = int((rows < wanted).sum())
        if few:
            others = f", and {few - 1} further tasks too few" if few > 1 else ""
            raise ConfigError(
                f"data.shots + data.queries is {self.shots} + {self.queries}, but task {names[smallest]} in "
                f"{self.path} has {rows[smallest]} rows{others}: choose them to be at most {rows[smallest]} together, "
                "or leave such tasks out."
            )


def _moments(values: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each column; 1 for that of a constant one."""
    scale = values.std(axis=0)
    return values.mean(axis=0).tolist(), np.where(scale > 0, scale, 1.0).tolist()
