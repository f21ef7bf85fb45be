"""What tables have in common: which rows belong together, in which split they are, and what is odd about columns.

Legend: T tasks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from data_modules.samplers import SamplerName
from data_modules.shares import Shares, shuffle
from dmaml_pl.checks import at_home
from dmaml_pl.data import SPLITS, Split, TaskDataModule
from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.tasks import Scaling, TaskBatch

if TYPE_CHECKING:
    from data_modules.reading.tables import Dialect, Table

FAR = 100
"""So many standard deviations from its mean a column's value is said: it leaves the others next to no room."""

LARGE = 1000
"""Values of a column beyond this are said, where columns are not standardized: networks expect about one."""


class TableTasks(TaskDataModule):
    """Base of the tables: which rows are of one group, in which split it is, and what the columns are scaled by.

    A group is what tasks are sampled from: a task of the file, or a class of it.

    Args:
        path: the file: .parquet, or CSV with a header.
        inputs: names of the input columns, in the order that the network takes them in.
        split_column: name of a column that holds train, val or test, the same in all rows of a group; None where there
            is none.
        val_share: share of the groups that is dealt to validation, where no column says so.
        test_share: share of the groups that is dealt to meta-testing; the others are for meta-training.
        split_seed: seed of dealing the groups.
        standardize: whether each column is shifted and scaled to mean 0 and standard deviation 1 over the rows for
            meta-training. Losses and metrics are then in these units: a mean squared error of 1 is what the constant
            mean would have. `dmaml adapt` takes and gives the units of the file all the same.
        delimiter: character between columns; by default it is found out: comma, semicolon, tab or |.
        decimal: mark in numbers, "." or ","; by default a point, but a comma where semicolons stand between columns
            and numbers have commas.
        encoding: of the text, such as cp1252; by default UTF-8, or UTF-16 where the file begins with its mark.
        sampler: "batched" samples all tasks of a meta-batch at once; "learn2learn", the reference, one after another
            through learn2learn's task transforms. From the same seed they make other tasks of the same distribution.
        settings: those of `TaskDataModule`.

    Attributes:
        scaling: how the units of the file become those of the tasks; None where they are the same, or before `setup`.

    Examples:
        >>> written = {"delimiter": ";", "decimal": ",", "encoding": "cp1252"}
        >>> Tabular(path="table.csv", inputs=["celsius"], targets=["volt"], task_column="sensor", **written).dialect
        Dialect(delimiter=';', decimal=',', encoding='cp1252')
    """

    def __init__(
        self,
        *,
        path: str,
        inputs: list[str],
        split_column: str | None = None,
        val_share: float = 0.16,
        test_share: float = 0.2,
        split_seed: int = 0,
        standardize: bool = True,
        delimiter: str | None = None,
        decimal: str | None = None,
        encoding: str | None = None,
        sampler: SamplerName = "batched",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.shares = Shares(val_share, test_share, "tasks")
        require_columns("inputs", inputs)
        self.path = path
        self.inputs = list(inputs)
        self.split_column = split_column
        self.val_share = val_share
        self.test_share = test_share
        self.split_seed = split_seed
        self.standardize = standardize
        self.delimiter = delimiter
        self.decimal = decimal
        self.encoding = encoding
        self.sampler: SamplerName = sampler
        self.scaling: Scaling | None = None
        self._x = self._y = torch.empty(0)
        self._is_set_up = False

    @property
    def dialect(self) -> Dialect:
        """How the file is written, as far as the settings say it."""
        from data_modules.reading.tables import Dialect  # noqa: PLC0415 - PyArrow is needed here alone

        return Dialect(self.delimiter, self.decimal, self.encoding)

    def setup(self, stage: str | None = None) -> None:
        """Read the file and make ready to sample tasks; a second call does nothing.

        Raises:
            ConfigError: a group has too few rows for those asked of it.
            DataError: the file is missing or broken; names the column and the row.
        """
        if not self._is_set_up:
            from data_modules.reading.tables import Table  # noqa: PLC0415 - PyArrow is needed here alone

            self._read(Table(at_home(self.path), dialect=self.dialect))
            self._is_set_up = True

    @property
    def _group(self) -> str:
        return "task" if self.shares.what == "tasks" else "class"

    @abstractmethod
    def _read(self, table: Table) -> None:
        """Set the rows, the scaling, and what samples tasks."""

    def sample_task(self, split: Split, seed: int) -> TaskBatch:
        """One task of a split, without the T axis; the same as `sample_tasks` makes among others."""
        return self.sample_tasks(split, [seed]).task(0)

    def _check_rows(self, names: list[str], rows: NDArray[np.int64]) -> None:
        """Check that there are rows enough of what is named, such as a task."""
        wanted, smallest = self.shots + self.queries, int(rows.argmin())
        few = int((rows < wanted).sum())
        if few:
            plural = "tasks" if names[smallest].startswith("task ") else "classes"
            others = f", and {few - 1} further {plural} too few" if few > 1 else ""
            raise ConfigError(
                f"data.shots + data.queries is {self.shots} + {self.queries}, but {names[smallest]} in "
                f"{self.path} has {rows[smallest]} rows{others}: choose them to be at most {rows[smallest]} together, "
                f"or leave such {plural} out."
            )

    def _split_of(self, table: Table, setting: str, groups: NDArray[np.str_]) -> dict[str, str]:
        """The split of each group; those of all rows are given, (rows,)."""
        if self.split_column is None:
            shuffled = shuffle(np.unique(groups).tolist(), "tabular", self.split_seed)
            dealt = self.shares.deal(shuffled, f"Column {getattr(self, setting)} of {self.path}")
            return {name: split for split, chosen in dealt.items() for name in chosen}
        return self._read_splits(table, groups)

    def _scale(self, named: dict[str, list[str]], trained: NDArray[np.bool_], *values: NDArray[np.float64]) -> None:
        """Say which columns carry nothing, or are huge, and find out the scaling of the rows for meta-training.

        Args:
            named: the columns of each setting, inputs first.
            trained: which rows are for meta-training, (rows,).
            values: those of the columns of each setting, (rows, columns).
        """
        moments = [_moments(each[trained]) for each in values]
        for (setting, names), each, (mean, scale, constant) in zip(named.items(), values, moments, strict=True):
            furthest = np.abs((each - mean) / scale if self.standardize else each).max(axis=0)
            limit = FAR if self.standardize else LARGE
            for place, name in enumerate(names):
                column = f"Column {name} (data.{setting}) of {self.path}"
                if constant[place]:
                    rank_zero_info(f"{column} is {mean[place]:g} in all rows for meta-training: it carries nothing.")
                elif furthest[place] > limit and self.standardize:
                    rank_zero_info(
                        f"{column} has a value {furthest[place]:.0f} standard deviations from its mean, which leaves "
                        "the others next to no room: mend it, or take its logarithm."
                    )
                elif furthest[place] > limit:
                    rank_zero_info(
                        f"{column} reaches {furthest[place]:g}, but networks expect values of about one: set "
                        "data.standardize to true."
                    )
        if self.standardize:
            (x_mean, x_scale, _), (y_mean, y_scale, _) = [*moments, NO_UNITS][:2]
            self.scaling = Scaling(list(x_mean), list(x_scale), list(y_mean), list(y_scale))

    def _scaled(self, rows: NDArray[np.float64]) -> Tensor:
        """Inputs as tasks have them, float32."""
        x = torch.from_numpy(rows)
        return (x if self.scaling is None else self.scaling.inputs(x)).float()

    def _read_splits(self, table: Table, groups: NDArray[np.str_]) -> dict[str, str]:
        name = str(self.split_column)
        found: dict[str, str] = {}
        for row, (group, split) in enumerate(
            zip(groups.tolist(), table.texts("data.split_column", name).tolist(), strict=True), start=1
        ):
            if split not in SPLITS:
                raise DataError(f"{self.path}, row {row}: column {name} is {split!r}, but must be train, val or test.")
            if found.setdefault(group, split) != split:
                raise DataError(
                    f"{self.path}, row {row}: column {name} puts {self._group} {group} into {split}, but an "
                    f"earlier row into {found[group]}: all rows of a {self._group} belong to one split."
                )
        missing = next((split for split in SPLITS if split not in found.values()), None)
        if missing is not None:
            raise DataError(f"{self.path}: column {name} has no {missing}: each of train, val and test needs tasks.")
        return found


Moments = tuple[list[float], list[float], list[bool]]

NO_UNITS: Moments = ([0.0], [1.0], [False])
"""Of classes."""


def require_columns(setting: str, names: list[str], others: Mapping[str, str] = MappingProxyType({})) -> None:
    """Check that a setting names columns, each of them once, and none that another setting has.

    Args:
        setting: without `data.`.
        names: its columns.
        others: columns of other settings, by column.

    Raises:
        ConfigError: it does not.
    """
    if not names:
        raise ConfigError(f"data.{setting} is empty, but must name one column or more.")
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ConfigError(f"data.{setting} names {name} twice: leave it out once.")
        if name in others:
            raise ConfigError(
                f"data.{setting} names {name}, which data.{others[name]} has, too: a network that is shown what it is "
                "to tell has nothing to learn."
            )


def _moments(values: NDArray[np.float64]) -> Moments:
    """Mean and standard deviation of each column, 1 for that of a constant one, and which are constant."""
    constant = (values == values[:1]).all(axis=0)
    scale = np.where(constant, 1.0, values.std(axis=0))
    return values.mean(axis=0).tolist(), scale.tolist(), constant.tolist()
