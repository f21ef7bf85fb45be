"""What all data modules share: how Lightning is handed tasks, for training and for validation and test.

Training tasks are a pure function of (seed, worker, run, meta-iteration); validation and test tasks of
(evaluation seed, split, index). Neither has a position, so workers never share a stream of tasks,
and resuming is exact.
"""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch

from dmaml_pl.checks import require_at_most, require_counts
from dmaml_pl.errors import ConfigError
from dmaml_pl.tasks import Act, TaskBatch, TaskSource, derive_seed, derive_seeds, stack_tasks

Split = Literal["train", "val", "test"]
LARGEST_COUNT = 10**9
"""Of anything that is counted; more is a slip, which would be told as a lack of memory, or never."""

SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class PlottedTasks:
    """Tasks that a data module chose to be plotted, and how a plot of them reads.

    Attributes:
        tasks: T tasks; of a regression with one input and one target, whose queries are in the order of the input.
        x_label: what the input is, in a regression.
        y_label: what the target is, in a regression.
        queries_are_curves: whether, in a regression, the queries are the true curve on a grid, and not some points.
        ink_is_bright: whether grey pictures have large values where there is ink, which is plotted dark on light.

    Examples:
        >>> plotted = Sinusoid(shots=5).tasks_to_plot(3)
        >>> plotted.tasks.support_x.shape, plotted.queries_are_curves
        (torch.Size([3, 5, 1]), True)
    """

    tasks: TaskBatch
    x_label: str = "x"
    y_label: str = "y"
    queries_are_curves: bool = True
    ink_is_bright: bool = False


class TrainingRuns:
    """The training dataloader: hands out the task source once a run, `runs` times an epoch.

    A training batch is a run, and the module samples the run's meta-batches one by one, so nothing is held in memory.
    """

    def __init__(self, source: TaskSource, runs: int) -> None:
        self.source = source
        self.runs = runs

    def __len__(self) -> int:
        return self.runs

    def __iter__(self) -> Iterator[TaskSource]:
        for _ in range(self.runs):
            yield self.source

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a run's tasks follow from its number. Tells Lightning that resuming within an epoch is exact."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""


class EvaluationTasks:
    """A validation or test dataloader: tasks 0 .. `tasks` - 1 of a split in chunks, dealt to the workers in turn."""

    def __init__(self, module: TaskDataModule, split: Split, tasks: int, chunk: int, worker: int, workers: int) -> None:
        self.module = module
        self.split: Split = split
        self.tasks = tasks
        self.chunk = chunk
        self.worker = worker
        self.workers = workers

    def _starts(self) -> range:
        return range(self.worker * self.chunk, self.tasks, self.workers * self.chunk)

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[TaskBatch]:
        for start in self._starts():
            yield self.module.evaluation_tasks(self.split, range(start, min(start + self.chunk, self.tasks)))


class TaskDataModule(pl.LightningDataModule, ABC):
    """Base of the data modules: a subclass says how one task follows from a seed.

    A subclass takes its own settings and `**settings`, which it passes on: each is declared once.

    Args:
        shots: K, support samples per class (of a task, in regression).
        queries: Q, query samples per class (of a task, in regression).
        meta_batch: T, tasks in the meta-batch of one worker.
        runs_per_epoch: runs that Lightning counts as one epoch; matters for `max_epochs` and `val_check_interval` only.
        val_tasks: validation tasks, the same at every validation.
        test_tasks: tasks of a meta-test; 600 is the field's custom and gives narrow confidence intervals.
        seed: seed of the training tasks; by default that of `seed_everything`, or 0.
        evaluation_seed: seed of validation and test tasks. Apart from `seed`, so that trainings with different seeds
            are evaluated on the same tasks.

    Raises:
        ConfigError: a count is not greater than zero.

    Examples:
        >>> data: TaskDataModule = Sinusoid(shots=5, seed=3)
        >>> data.shots, data.queries
        (5, 10)
    """

    evaluation_chunk = 25
    """So many tasks are evaluated at once, or a meta-batch if that is larger: small meta-batches are for training."""

    def __init__(
        self,
        *,
        shots: int,
        queries: int,
        meta_batch: int,
        runs_per_epoch: int = 10,
        val_tasks: int = 100,
        test_tasks: int = 600,
        seed: int | None = None,
        evaluation_seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {
            "data.shots": shots,
            "data.queries": queries,
            "data.meta_batch": meta_batch,
            "data.runs_per_epoch": runs_per_epoch,
            "data.val_tasks": val_tasks,
            "data.test_tasks": test_tasks,
        }
        require_counts(**counts)
        require_at_most(LARGEST_COUNT, **counts)
        self.shots = shots
        self.queries = queries
        self.meta_batch = meta_batch
        self.runs_per_epoch = runs_per_epoch
        self.val_tasks = val_tasks
        self.test_tasks = test_tasks
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.evaluation_seed = evaluation_seed

    def __init_subclass__(cls, **options: Any) -> None:
        """Show in the subclass's signature, as `inspect` and `help` have it, the settings that it passes on, too."""
        super().__init_subclass__(**options)
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
            base = next(each for each in cls.__mro__[1:] if issubclass(each, TaskDataModule))
            passed_on = dict(inspect.signature(base).parameters)
            named = {parameter.name for parameter in own}
            own[-1:] = [each.replace(kind=each.KEYWORD_ONLY) for name, each in passed_on.items() if name not in named]
        cls.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]  # inspect's own way to tell it

    @abstractmethod
    def sample_task(self, split: Split, seed: int) -> TaskBatch:
        """One task of a split, without the T axis, as a pure function of its arguments.

        Called after `setup`. Must leave every global random generator as it found it.
        """

    def sample_tasks(self, split: Split, seeds: Sequence[int]) -> TaskBatch:
        """Tasks of a split, (T, ...): for each seed what `sample_task` makes of it, whatever is sampled beside it.

        This samples one after another. A subclass that can sample many at once for less overrides it.
        """
        return stack_tasks([self.sample_task(split, seed) for seed in seeds])

    def sample(self, *, worker: int, run: int, iteration: int, act: Act | None = None) -> TaskBatch:
        """The training meta-batch of a worker at a meta-iteration of a run (`TaskSource`), (T, ...)."""
        seeds = derive_seeds("train", self.seed, worker, run, iteration, count=self.meta_batch)
        return self.sample_tasks("train", seeds)

    def evaluation_tasks(self, split: Split, indices: Sequence[int]) -> TaskBatch:
        """Tasks of a split as they are evaluated on, (T, ...), with their numbers; the same in every training."""
        tasks = self.sample_tasks(split, self.evaluation_seeds(split, indices))
        return tasks._replace(numbers=tasks.query_x.new_tensor(indices, dtype=torch.int64))

    def evaluation_seeds(self, split: Split, indices: Sequence[int]) -> list[int]:
        """The seeds of tasks of a split as they are evaluated on."""
        return [derive_seed(split, self.evaluation_seed, index) for index in indices]

    def evaluation_task(self, split: Split, index: int) -> TaskBatch:
        """Task `index` of a split as it is evaluated on, without the T axis."""
        return self.evaluation_tasks(split, [index]).task(0)

    def train_dataloader(self) -> TrainingRuns:
        """One item a run; see `TrainingRuns`."""
        return TrainingRuns(self, self.runs_per_epoch)

    def val_dataloader(self) -> EvaluationTasks:
        """This worker's share of the validation tasks."""
        return self._evaluation("val", self.val_tasks)

    def test_dataloader(self) -> EvaluationTasks:
        """This worker's share of the meta-test tasks."""
        return self._evaluation("test", self.test_tasks)

    def predict_dataloader(self) -> EvaluationTasks:
        """The meta-test tasks, to be predicted."""
        return self.test_dataloader()

    def _evaluation(self, split: Split, tasks: int) -> EvaluationTasks:
        worker, workers = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        if tasks < workers:
            raise ConfigError(
                f"data.{split}_tasks is {tasks}, but there are {workers} workers to share the tasks: set it to "
                f"{workers} or more."
            )
        chunk = min(max(self.meta_batch, self.evaluation_chunk), tasks // workers)
        return EvaluationTasks(self, split, tasks, chunk, worker, workers)
